# SPDX-License-Identifier: Apache-2.0
"""What the attack tests share: the plugin's bundle, ports of their own, and a summary of what the sweeps sent."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import plugin, port

__all__ = ["plugin", "port"]

SWEPT = "swept"
"""Property of a test that the summary shows."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many packets were sent, and with which seed: a failure is repeated with the same one."""
    lines = [
        f"{report.nodeid.partition('::')[2]}: {value}"
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for name, value in report.user_properties
        if name == SWEPT
    ]
    if lines:
        terminalreporter.section("sweeps")
        for line in lines:
            terminalreporter.line(line)
