# SPDX-License-Identifier: Apache-2.0
"""What is still to be ended on the node: in which order, how much of it is kept, and that nothing is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

import pytest

from enforcer_daemon.daemon import staleflows
from enforcer_daemon.daemon.staleflows import StaleFlows
from enforcer_daemon.dataplane import nodeflows
from enforcer_daemon.dataplane.established import ReleasedFlow
from enforcer_daemon.dataplane.nodeflows import SentTuple
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import Identity, NetnsId, PodRef

NETNS = NetnsId(4, 1)


def identity(name: str, last: int) -> Identity:
    return Identity(PodRef("x", name), (ip_address(f"10.0.0.{last}"),), {}, {}, "a")


def released(source: str, destination: str) -> ReleasedFlow:
    ends = (ip_address(source), 4444), (ip_address(destination), 53)
    return ReleasedFlow(17, *ends[0], *ends[1], 2, ends[1], b"")


@dataclass
class FakeEndpoint:
    identity: Identity
    done: list[Any]
    is_open: bool = True

    async def reevaluate_peers(self, changes: Sequence[tuple[Identity, Identity | None]]) -> list[ReleasedFlow]:
        self.done += [(str(self.identity.pod), old.pod.name, new and dict(new.labels)) for old, new in changes]
        return []

    async def end_strangers(self, newcomer: Identity) -> list[ReleasedFlow]:
        self.done.append((str(self.identity.pod), "strangers", newcomer.pod.name))
        return []


@dataclass
class ClusterState:
    """The kernel, the endpoints, and what was done to them in which order."""

    done: list[Any] = field(default_factory=list)
    refused: int = 0
    """How often the kernel refuses."""
    unanswered: int = 0
    """Entries without a reply in its table."""

    def __post_init__(self) -> None:
        self.endpoints = [FakeEndpoint(identity("one", 1), self.done), FakeEndpoint(identity("two", 2), self.done)]
        log = SimpleNamespace(
            info=lambda *_, **__: None, warning=lambda *_, **__: None, error=lambda *_, **__: self.done.append("error")
        )
        metrics = SimpleNamespace(ended_flows=SimpleNamespace(inc=lambda _: None))
        self.stale = StaleFlows(self, lambda: self.endpoints, log, metrics)  # type: ignore[arg-type, return-value]

    async def freshen(self, addresses: Iterable[object], *, is_clean: bool = True) -> None:
        if self.refused:
            self.refused -= 1
            raise DataplaneError("no")
        self.done.append(("fresh" if is_clean else "unclean", sorted(map(str, addresses))))

    def remove_flows(self, flows: Iterable[SentTuple]) -> None:
        self.done.append(("flows", [(str(flow.source), str(flow.destination)) for flow in flows]))

    def remove_of(self, addresses: Iterable[object], limit: int, is_answered: bool) -> int:
        self.done.append(("answered" if is_answered else "entries", sorted(map(str, addresses))))
        removed = 0 if is_answered else min(limit, self.unanswered)
        self.unanswered -= removed
        return removed


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ClusterState:
    world = ClusterState()
    monkeypatch.setattr(nodeflows, "remove_flows", world.remove_flows)
    monkeypatch.setattr(nodeflows, "remove_of", world.remove_of)
    return world


def test_an_address_is_fresh_before_its_entries_are_removed(world: ClusterState) -> None:
    endpoint = world.endpoints[0]
    world.stale.note_ended(endpoint, [released("10.0.0.1", "10.0.0.9"), released("10.0.0.8", "10.0.0.1")])  # type: ignore[arg-type]
    asyncio.run(world.stale.settle())
    assert world.done == [
        ("fresh", ["10.0.0.1"]),
        ("flows", [("10.0.0.1", "10.0.0.9"), ("10.0.0.1", "10.0.0.8")]),  # as the pod sends in them
    ]
    asyncio.run(world.stale.settle())
    assert len(world.done) == 2


def test_peers_beside_are_told_of_a_change_and_of_an_end(world: ClusterState) -> None:
    before = world.endpoints[0].identity
    after = Identity(before.pod, before.ips, {"app": "new"}, {}, "a")
    world.stale.note_change(before, after)
    world.stale.note_gone(identity("gone", 3))
    asyncio.run(world.stale.settle())
    assert world.done == [
        ("x/one", "gone", None),
        ("x/two", "one", {"app": "new"}),
        ("x/two", "gone", None),
        ("entries", ["10.0.0.3"]),
    ]


def test_what_the_kernel_refuses_is_kept_and_tried_again(world: ClusterState) -> None:
    world.refused = 1
    world.endpoints.pop()
    world.stale.note_ended(world.endpoints[0], [released("10.0.0.1", "10.0.0.9")])  # type: ignore[arg-type]
    assert asyncio.run(world.stale.settle_or_leave()) is False
    assert world.done[-1] == "error"
    assert asyncio.run(world.stale.settle_or_leave()) is True
    assert world.done[-2:] == [("fresh", ["10.0.0.1"]), ("flows", [("10.0.0.1", "10.0.0.9")])]


def test_a_newcomer_starts_clean_or_not_at_all(world: ClusterState, monkeypatch: pytest.MonkeyPatch) -> None:
    newcomer = identity("two", 2)

    def refuse(*_: object) -> int:
        raise DataplaneError("no")

    world.stale.note_start(NETNS, newcomer)
    monkeypatch.setattr(nodeflows, "remove_of", refuse)
    with pytest.raises(DataplaneError):
        asyncio.run(world.stale.start_clean(NETNS))
    monkeypatch.setattr(nodeflows, "remove_of", world.remove_of)
    world.done.clear()
    asyncio.run(world.stale.start_clean(NETNS))
    own = ["10.0.0.2"]
    assert world.done == [("x/one", "strangers", "two"), ("answered", own), ("entries", own)]
    asyncio.run(world.stale.start_clean(NETNS))
    assert len(world.done) == 3


def test_a_newcomer_does_not_wait_for_flows_without_a_reply(world: ClusterState) -> None:
    """Anybody can make them: what is left is the guard's, and nothing is removed later."""
    world.unanswered = 10 * staleflows.MAX_UNANSWERED
    world.endpoints.clear()
    world.stale.note_gone(identity("old", 2))
    world.stale.note_start(NETNS, identity("two", 2))
    asyncio.run(world.stale.start_clean(NETNS))
    own = ["10.0.0.2"]
    assert world.done == [("answered", own), ("entries", own), ("unclean", own)]
    assert world.unanswered == 9 * staleflows.MAX_UNANSWERED
    asyncio.run(world.stale.settle())
    assert len(world.done) == 3


def test_entries_that_appear_without_end_are_an_error(world: ClusterState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodeflows, "remove_of", lambda *_: nodeflows.MAX_REMOVED_AT_ONCE)
    world.stale.note_start(NETNS, identity("two", 2))
    with pytest.raises(DataplaneError, match="as fast as they are removed"):
        asyncio.run(world.stale.start_clean(NETNS))


def test_what_waits_is_bounded(world: ClusterState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staleflows, "MAX_PENDING", 2)
    for last in (1, 2, 3):
        world.stale.note_gone(identity("gone", last))
    world.endpoints.clear()
    asyncio.run(world.stale.settle())
    assert world.done == [("entries", ["10.0.0.2", "10.0.0.3"])]
