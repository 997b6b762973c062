# SPDX-License-Identifier: Apache-2.0
"""A plugin of pytest for the guest: a test that is skipped there has failed, since that kernel has what it needs."""

from __future__ import annotations

from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn what was skipped into a failure, with its reason."""
    report = yield
    if report.skipped:
        report.outcome, report.longrepr = "failed", f"skipped: {report.longrepr}"
    return report
