# SPDX-License-Identifier: Apache-2.0
"""Namespaces follow states by themselves: none waits for another, and those between are skipped."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from enforcer_daemon.daemon import following as module
from enforcer_daemon.daemon.endpoint import Change
from enforcer_daemon.daemon.following import Following, FollowingWork, batches
from enforcer_daemon.model import Identity, PodRef
from enforcer_daemon.sources.turns import Turns

NOTHING_NEW = Change(False, False, False)


@dataclass
class FakeState:
    """A state by its number; compiling waits for the namespace's gate."""

    number: int
    gates: dict[str, threading.Event] = field(default_factory=dict)

    @property
    def cluster(self) -> FakeState:
        return self

    @property
    def namespaces(self) -> dict[str, object]:
        return {}

    @property
    def snapshot(self) -> int:
        return self.number

    def identity_of(self, _: object, identity: Identity) -> Identity:
        return identity

    def prepare(self, identity: Identity) -> None:
        if gate := self.gates.get(identity.pod.namespace):
            assert gate.wait(10)


class FakeEndpoint:
    """An endpoint that notes by which states it was updated."""

    policy = None
    sandbox = SimpleNamespace(requests={})
    flows = ()

    def __init__(self, namespace: str) -> None:
        self.identity = Identity(PodRef(namespace, "pod"), (), {}, {}, "node")
        self.seen: list[int] = []

    def is_touched(self, *_: object) -> bool:
        return True

    def is_identity_new(self, _: Identity) -> bool:
        return False

    def update(self, _: Identity, snapshot: int) -> Change:
        self.seen.append(snapshot)
        return NOTHING_NEW

    def end_half_open(self, *_: object) -> None:
        """Do nothing."""


class FakeRejudging:
    """Ends nothing."""

    async def evaluate(self, *_: object) -> None:
        """Do nothing."""

    async def reevaluate_masqueraded(self, _: object) -> None:
        """Do nothing."""


class FakeStale:
    """Has nothing to end."""

    is_pending = False


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeEndpoint, FakeEndpoint]:
    monkeypatch.setattr(module, "guarded", lambda *_: None)
    return FakeEndpoint("slow"), FakeEndpoint("quick")


def following(*endpoints: FakeEndpoint) -> Following:
    by_netns: Any = dict(enumerate(endpoints))
    nothing = cast(Any, None)
    work = FollowingWork(nothing, Turns(), cast(Any, FakeRejudging()), cast(Any, FakeStale()))
    return Following(by_netns, work, nothing)


def test_a_slow_namespace_holds_up_no_other_and_skips_what_lies_between(
    pair: tuple[FakeEndpoint, FakeEndpoint],
) -> None:
    slow, quick = pair

    async def work() -> None:
        gate = threading.Event()
        follower = following(slow, quick)
        states = [FakeState(number, {"slow": gate}) for number in (1, 2, 3)]
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            for state in states:
                tasks.create_task(follower.follow(cast(Any, state)))
            while quick.seen[-1:] != [3]:  # noqa: ASYNC110 - a fake's list
                await asyncio.sleep(0.001)
            assert slow.seen == []
            gate.set()
        assert slow.seen[-1] == 3
        assert len(slow.seen) <= 2
        assert follower._namespaces == {}

    asyncio.run(work())


def test_one_transaction_has_so_many_spans_and_at_least_one_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BATCH_SPANS", 10)
    weights: Any = [4, 4, 4, 30, 1]
    found: Any = batches(weights, lambda weight: cast(int, weight))
    assert list(found) == [[4, 4], [4], [30], [1]]
