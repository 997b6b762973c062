# SPDX-License-Identifier: Apache-2.0
"""The unit for systemd: nothing in it may keep a node's enforcer away for good."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from enforcer_daemon.__main__ import main as enforcer

UNIT = Path(__file__).parents[3] / "install/systemd/trireme-enforcer.service"


def _values(key: str) -> list[str]:
    return [line.partition("=")[2] for line in UNIT.read_text().splitlines() if line.startswith(f"{key}=")]


def test_the_enforcer_is_started_again_without_limit() -> None:
    assert _values("Restart") == ["always"]
    assert _values("StartLimitIntervalSec") == ["0"]


def test_a_manifest_that_is_at_fault_does_not_keep_the_enforcer_from_starting(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("kind: NetworkPolice\n")
    settings = tmp_path / "enforcer.yaml"
    directories = f"stateDir: {tmp_path}/state\nregistration: {{runDir: {tmp_path}/run}}\n"
    settings.write_text(f"node: a\npolicyDir: {tmp_path}\n{directories}")
    checked = CliRunner().invoke(enforcer, ["--check-config", "--config", str(settings)])
    assert checked.exit_code == 2, "the check fails for it, and so must not stand before the start"
    assert _values("ExecStartPre") == []
    assert _values("ExecStart") == ["/opt/trireme/venv/bin/trireme-enforcer"]
