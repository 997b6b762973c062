# SPDX-License-Identifier: Apache-2.0
"""For which connections the daemon vouches, and how often it looks at a pod."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

import pytest

from enforcer_daemon.daemon import vouching
from enforcer_daemon.daemon.vouching import MAX_AT_ONCE, MAX_PACE_S, MIN_PACE_S, Vouching
from enforcer_daemon.dataplane.nodeflows import SentTuple
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import Direction


def sent(port: int) -> SentTuple:
    return SentTuple(6, ip_address("10.0.0.1"), port, ip_address("10.0.0.2"), 80)


@dataclass(eq=False)
class FakeEndpoint:
    flows: frozenset[SentTuple] = frozenset()
    is_open: bool = True
    endings: int = 0
    looks: int = 0
    ends_meanwhile: bool = False
    identity: Any = field(default_factory=lambda: SimpleNamespace(pod="x/one", ips=("10.0.0.1",)))

    async def live_flows(self) -> frozenset[SentTuple]:
        self.looks += 1
        self.endings += self.ends_meanwhile
        return self.flows


@dataclass
class ClusterState:
    """The kernel, and what it was told."""

    told: list[Any] = field(default_factory=list)
    now: float = 1_000.0
    is_refusing: bool = False

    async def vouch(self, live: Iterable[SentTuple], refused: Sequence[SentTuple]) -> None:
        if self.is_refusing:
            raise DataplaneError("no")
        self.told.append((set(live), list(refused)))

    async def freshen(self, addresses: Iterable[object]) -> None:
        self.told.append(("fresh", *addresses))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ClusterState:
    world = ClusterState()
    monkeypatch.setattr(vouching, "time", SimpleNamespace(monotonic=lambda: world.now))
    return world


def look(watch: Vouching, endpoint: FakeEndpoint, *ports: int, way: Direction = Direction.EGRESS) -> None:
    asyncio.run(watch.look(endpoint, {sent(port): way for port in ports}))  # type: ignore[arg-type]


def vouching_of(world: ClusterState) -> Vouching:
    log = SimpleNamespace(info=lambda *_, **__: None, error=lambda *_, **__: world.told.append("error"))
    return Vouching(world, log)  # type: ignore[arg-type]


def test_what_the_pod_has_is_vouched_for_with_all_others_of_its_connections(world: ClusterState) -> None:
    look(vouching_of(world), FakeEndpoint(frozenset(map(sent, range(3)))), 1, 9)
    assert world.told == [({sent(0), sent(1), sent(2)}, [])]


def test_no_more_connections_are_vouched_for_at_once_than_a_number_and_those_asked_for(world: ClusterState) -> None:
    look(vouching_of(world), FakeEndpoint(frozenset(map(sent, range(2 * MAX_AT_ONCE)))), 7)
    (live, _), *_ = world.told
    assert sent(7) in live
    assert len(live) in (MAX_AT_ONCE, MAX_AT_ONCE + 1)


def test_only_what_a_peer_sends_is_refused(world: ClusterState) -> None:
    watch = vouching_of(world)
    look(watch, FakeEndpoint(), 1)
    assert world.told == []
    look(watch, FakeEndpoint(frozenset({sent(2)})), 1, 2, way=Direction.INGRESS)
    assert world.told == [({sent(2)}, [sent(1)])]


def test_a_pod_of_which_nothing_is_found_is_looked_at_less_and_less(world: ClusterState) -> None:
    watch, endpoint = vouching_of(world), FakeEndpoint()
    for _ in range(1_000):
        look(watch, endpoint, 1)
        world.now += 0.1
    assert endpoint.looks < 12
    world.now += 2 * MAX_PACE_S
    looks = endpoint.looks
    endpoint.flows = frozenset({sent(1)})
    for _ in range(10):
        look(watch, endpoint, 1)
        world.now += MIN_PACE_S
    assert endpoint.looks == looks + 10


def test_flows_that_end_during_a_look_are_not_vouched_for(world: ClusterState) -> None:
    look(vouching_of(world), FakeEndpoint(frozenset({sent(1)}), ends_meanwhile=True), 1)
    assert world.told[-1] == ("fresh", "10.0.0.1")


def test_what_the_kernel_refuses_is_logged_and_asked_for_again(world: ClusterState) -> None:
    watch, endpoint = vouching_of(world), FakeEndpoint(frozenset({sent(1)}))
    world.is_refusing = True
    look(watch, endpoint, 1)
    assert world.told == ["error"]
    world.is_refusing = False
    look(watch, endpoint, 1)
    assert world.told[-1] == ({sent(1)}, [])


def test_a_closed_endpoint_is_left_alone(world: ClusterState) -> None:
    endpoint = FakeEndpoint(is_open=False)
    look(vouching_of(world), endpoint, 1)
    assert endpoint.looks == 0
