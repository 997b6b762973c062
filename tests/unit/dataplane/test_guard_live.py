# SPDX-License-Identifier: Apache-2.0
"""Connections that the daemon vouches for: the sets never overflow, and an address leaves them as a whole."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from enforcer_daemon.dataplane import guard_live
from enforcer_daemon.dataplane.guard_live import LIVE, REFUSED, ReportedFlows
from enforcer_daemon.dataplane.nodeflows import SentTuple


def sent(port: int, last: int = 1) -> SentTuple:
    return SentTuple(6, ip_address(f"10.0.0.{last}"), port, ip_address("10.0.9.9"), 80)


def test_a_flow_is_added_once_until_its_time_is_over() -> None:
    told = ReportedFlows()
    one = "add element inet trireme_guard live4 { 10.0.0.1 . 1 . 10.0.9.9 . 80 timeout 60s }"
    assert told.add_lines(LIVE, [sent(1), sent(1)], 100.0) == [one]
    assert told.add_lines(LIVE, [sent(1)], 159.0) == []
    assert told.add_lines(LIVE, [sent(1)], 160.0) == [one]


def test_families_have_sets_of_their_own() -> None:
    six = SentTuple(6, ip_address("fd00::1"), 1, ip_address("fd00::2"), 80)
    lines = ReportedFlows().add_lines(REFUSED, [sent(1), six], 0.0)
    assert [line.split(" {")[0].split()[-1] for line in lines] == ["refused4", "refused6"]
    assert "fd00::1 . 1 . fd00::2 . 80 timeout 10s" in lines[1]


def test_an_address_leaves_all_sets_and_no_other_does() -> None:
    told = ReportedFlows()
    told.add_lines(LIVE, [sent(1), sent(2, last=2)], 0.0)
    told.add_lines(REFUSED, [sent(3)], 0.0)
    lines = told.remove_lines([ip_address("10.0.0.1"), ip_address("10.0.0.7")])
    assert [line.split()[0] + " " + line.split()[4] for line in lines] == [
        *("add live4", "delete live4", "add refused4", "delete refused4")
    ]
    assert all("10.0.0.2" not in line for line in lines)
    assert told.remove_lines([ip_address("10.0.0.1")]) == []


def test_sets_have_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_live, "MAX_FLOWS", 5)
    monkeypatch.setattr(guard_live, "MAX_FLOWS_OF_ONE", 3)
    told = ReportedFlows()

    def added(last: int, now: float) -> int:
        return "".join(told.add_lines(LIVE, [sent(port, last) for port in range(9)], now)).count(" timeout ")

    assert [added(1, 0.0), added(2, 0.0), added(3, 0.0)] == [3, 2, 0]
    assert added(3, 60.0) == 3
    told.clear()
    assert added(1, 60.0) == 3
