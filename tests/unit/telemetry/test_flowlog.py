# SPDX-License-Identifier: Apache-2.0
"""Decisions as lines, counters and a short memory of denials."""

from __future__ import annotations

import json

import pytest

from enforcer_daemon.datapath.context import FlowReport
from enforcer_daemon.model import Direction, Identity, PodRef, RuleRef
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings import LogLevel, LogSettings
from enforcer_daemon.telemetry import flowlog
from enforcer_daemon.telemetry.flowlog import QUIET_S, FlowLog
from enforcer_daemon.telemetry.logs import open_log
from enforcer_daemon.telemetry.metrics import Metrics

PEER = Identity(PodRef("shop", "web"), (), {}, {}, "node-1")


class Clock:
    """A wall clock that stands still."""

    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def report(reason: Reason = Reason.INGRESS_DENIED, port: int = 80, *, is_allowed: bool = False) -> FlowReport:
    rules = (RuleRef("shop", "deny", None),)
    return FlowReport(is_allowed, reason, Direction.INGRESS, 6, b"\x0a\0\0\1", port, PEER, rules, "why")


def open_flow_log(level: str = "info") -> tuple[FlowLog, Metrics, Clock]:
    clock, metrics = Clock(), Metrics()
    log = open_log(LogSettings(level=LogLevel(level)))
    return FlowLog(PodRef("shop", "db"), log, metrics, clock), metrics, clock


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_denial_is_a_line_that_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    flow_log, _, _ = open_flow_log()
    flow_log.take([report()])
    (line,) = lines(capsys)
    del line["timestamp"]
    assert line == {
        "event": "flow denied", "level": "info", "pod": "shop/db", "direction": "ingress", "address": "10.0.0.1",
        "port": 80, "protocol": "TCP", "reason": "ingress-denied", "rules": ["shop/deny"], "peer": "shop/web",
        "detail": "why",
    }  # fmt: skip


def test_a_denial_that_repeats_is_counted_and_written_again_later(capsys: pytest.CaptureFixture[str]) -> None:
    flow_log, _, clock = open_flow_log()
    for _ in range(5):
        flow_log.take([report()])
    assert len(lines(capsys)) == 1
    clock.now += QUIET_S
    flow_log.take([report()])
    (line,) = lines(capsys)
    assert line["repeated"] == 4


def test_a_scan_is_not_a_line_for_each_packet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowlog, "_MAX_TRACKED", 10)
    flow_log, _, clock = open_flow_log()
    flow_log.take([report(port=port) for port in range(1_000)])
    assert len(lines(capsys)) == 10
    assert flow_log.counts() == {"ingress-denied": 1_000}
    clock.now += QUIET_S
    flow_log.take([report(port=2_000)])
    (line,) = lines(capsys)
    assert line["unwritten"] == 990
    assert len(flow_log._repetitions) == 10


def test_an_internal_error_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    flow_log, _, _ = open_flow_log()
    flow_log.take([report(Reason.INTERNAL_ERROR)])
    assert lines(capsys)[0]["level"] == "error"


@pytest.mark.parametrize(("level", "count"), [("info", 0), ("debug", 1)])
def test_what_is_allowed_is_written_at_debug_alone(capsys: pytest.CaptureFixture[str], level: str, count: int) -> None:
    flow_log, metrics, _ = open_flow_log(level)
    flow_log.take([report(Reason.POLICY, is_allowed=True)])
    assert len(lines(capsys)) == count
    assert metrics.denials() == {}


def test_denials_are_remembered_up_to_a_bound() -> None:
    flow_log, metrics, _ = open_flow_log("error")
    flow_log.take([report(port=port) for port in range(60)])
    assert [denial.port for denial in flow_log.recent] == list(range(10, 60))
    assert flow_log.recent[0].as_json()["when"] == "2027-01-15T08:00:00+00:00"
    assert metrics.denials() == {"ingress-denied": 60}


def test_a_packet_that_could_not_be_read_has_no_address() -> None:
    flow_log, _, _ = open_flow_log("error")
    unreadable = FlowReport(False, Reason.MALFORMED_PACKET, Direction.INGRESS, 0, b"", None, None, (), "")
    flow_log.take([unreadable])
    assert (flow_log.recent[0].address, flow_log.recent[0].peer) == ("", "")


def test_metrics_have_closed_labels() -> None:
    flow_log, metrics, _ = open_flow_log("error")
    flow_log.take([report(), report(Reason.POLICY, is_allowed=True)])
    text = metrics.render()
    assert 'trireme_decisions_total{decision="deny",direction="ingress",reason="ingress-denied"} 1.0' in text
    assert "shop" not in text


def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    open_log(LogSettings(), is_aligned=True).info("ready", endpoints=3)
    assert "ready" in capsys.readouterr().err
