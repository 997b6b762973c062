# SPDX-License-Identifier: Apache-2.0
"""The shell of the leases: what is read and ended when, what is tried again, and what the next daemon finds."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from enforcer_daemon.daemon import leases as module
from enforcer_daemon.daemon.flowstore import FlowStore
from enforcer_daemon.daemon.leases import LeaseKeeper
from enforcer_daemon.daemon.leasestore import LeaseStore
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.handshake.leasepairs import Lapse, LeaseEvent, LeaseTimes, Replaced
from enforcer_daemon.model import Identity, NetnsId, PodRef, Protocol
from enforcer_daemon.telemetry.metrics import Metrics
from tests.unit.daemon.test_flowstore import PEER, Log

KEYS = {("cluster.local", PodRef("x", "a"), bytes((10, 0, 0, 1))): 0.0, ("other", PodRef("x", "b"), bytes(16)): 61.5}
LAPSE = Lapse(PEER, bytes((10, 0, 0, 9)), frozenset({Protocol.UDP}))
REPLACED = Replaced(PEER, PEER)


class AnyLog(Log):
    def info(self, event: str, **details: object) -> None: ...

    warning = info


class FakeEndpoint:
    """An endpoint whose kernel refuses as often as it is told to."""

    def __init__(self, events: Sequence[LeaseEvent] = (), refusals: int = 0, *, has_flows: bool = True) -> None:
        self.sandbox = SimpleNamespace(netns=NetnsId(1, id(self)))
        self.identity = SimpleNamespace(pod=PodRef("x", "pod"))
        self.is_open = True
        self.has_flows = has_flows
        self.looks = self.saves = 0
        self.done: list[object] = []
        self.events = list(events)
        self.refusals = refusals
        self.leases = self

    def save_leases(self) -> None:
        self.saves += 1

    # As leases.

    def take_events(self) -> list[LeaseEvent]:
        events, self.events = self.events, []
        return events

    def unanswered(self) -> int:
        return 2

    def note_ended(self, lapses: list[Lapse]) -> None:
        self.done.append(("ended", tuple(lapses)))

    # As an endpoint.

    def _refuse(self) -> None:
        if self.refusals:
            self.refusals -= 1
            raise DataplaneError("busy")

    async def look_for_flows(self) -> None:
        self.looks += 1
        self._refuse()

    async def end_lapsed(self, lapses: list[Lapse]) -> list[object]:
        self._refuse()
        return [object()]

    async def reevaluate_peers(self, changes: list[tuple[Identity, Identity | None]]) -> list[object]:
        self.done.append(("reevaluated", *changes[0]))
        return [object()]


def run(endpoint: FakeEndpoint, seconds: float = 0.2) -> tuple[AnyLog, Metrics]:
    log, metrics = AnyLog(), Metrics()
    fakes: Any = [endpoint]
    keeper = LeaseKeeper(fakes, LeaseTimes(lease_s=0.02), log, metrics)  # type: ignore[arg-type]

    async def for_a_while() -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(keeper.run(), seconds)

    asyncio.run(for_a_while())
    return log, metrics


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TICK_S", 0.01)


def test_what_lapsed_is_ended_and_what_changed_is_evaluated_again() -> None:
    endpoint = FakeEndpoint([REPLACED, LAPSE])
    _, metrics = run(endpoint)
    assert endpoint.done == [("reevaluated", PEER, PEER), ("ended", (LAPSE,))]
    text = metrics.render()
    assert "trireme_lapsed_flows_total 1.0" in text
    assert "trireme_unanswered_leases 2.0" in text


def test_what_the_kernel_refuses_is_tried_again() -> None:
    endpoint = FakeEndpoint([LAPSE], refusals=2)
    log, _ = run(endpoint)
    assert endpoint.done == [("ended", (LAPSE,))]
    assert len(log.errors) == 2


def test_flows_are_read_once_in_a_leases_time_and_only_where_there_may_be_some() -> None:
    endpoint, idle = FakeEndpoint(), FakeEndpoint(has_flows=False)
    run(endpoint)
    run(idle)
    assert 2 <= endpoint.looks <= 11
    assert endpoint.saves >= 2
    assert idle.looks == 0


def test_an_endpoint_that_was_closed_is_left_alone() -> None:
    endpoint = FakeEndpoint([LAPSE], has_flows=False)
    endpoint.is_open = False
    run(endpoint, 0.05)
    assert endpoint.done == []


def store(path: Path, log: Log) -> LeaseStore:
    return LeaseStore(FlowStore(path / "1-2.jsonl", log))  # type: ignore[arg-type]


def test_pairs_come_back_and_end_with_the_endpoint(tmp_path: Path) -> None:
    log = Log()
    store(tmp_path, log).save(KEYS)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert store(tmp_path, log).load() == KEYS
    FlowStore(tmp_path / "1-2.jsonl", log).remove()  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    assert store(tmp_path, log).load() == {}
    assert log.errors == []


def test_what_did_not_change_is_not_written(tmp_path: Path) -> None:
    leases = store(tmp_path, Log())
    leases.save(KEYS)
    next(tmp_path.iterdir()).unlink()
    leases.save(KEYS)
    assert list(tmp_path.iterdir()) == []
    leases.save({})
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "content", ["{", "[1]", '[["a", "b", "c", "nowhere", 0]]', '[["a", "b", "c", "10.0.0.1", "long"]]', "7"]
)
def test_a_damaged_file_is_reported_and_empty(tmp_path: Path, content: str) -> None:
    log = Log()
    (tmp_path / "1-2.leases").write_text(content)
    assert store(tmp_path, log).load() == {}
    assert len(log.errors) == 1


def test_a_file_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    log = Log()
    (tmp_path / "flows").write_text("no folder")
    store(tmp_path / "flows", log).save(KEYS)
    assert len(log.errors) == 1
