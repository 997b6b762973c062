# SPDX-License-Identifier: Apache-2.0
"""Endpoints after a change: brought to the latest world namespace by namespace, none of which waits for another.

The policies of a namespace are compiled in a thread within its budget (`sources/turns.py`). Worlds may follow one
another meanwhile; a namespace takes the latest when its turn comes, and skips those between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from enforcer_daemon.daemon.endpoint import Change, Endpoint
from enforcer_daemon.daemon.kernel import Kernel, guarded
from enforcer_daemon.daemon.rejudging import Rejudging
from enforcer_daemon.daemon.staleflows import StaleFlows
from enforcer_daemon.daemon.world import CompiledWorld
from enforcer_daemon.errors import DataplaneError, EnforcerError
from enforcer_daemon.model import Identity, NetnsId
from enforcer_daemon.policy.address_rules import size_of
from enforcer_daemon.sources.turns import Turns
from enforcer_daemon.telemetry.logs import Logger

MAX_BATCH_SPANS = 4_096
"""Spans of addresses and ports in one transaction of the guard; an endpoint that has more is one by itself. Others wait
while a transaction runs: some 20 ms for so many."""


@dataclass(slots=True)
class _Turn:
    """A namespace that follows."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    asked: int = 0
    """How many worlds it was to follow."""
    done: int = 0
    """How many of them it has followed."""
    waiting: int = 0


class FollowingWork(NamedTuple):
    """What a change is brought in force by."""

    kernel: Kernel
    turns: Turns
    rejudging: Rejudging
    stale: StaleFlows


class Following:
    """Follows worlds. For the event loop's thread alone."""

    def __init__(
        self,
        endpoints: Mapping[NetnsId, Endpoint],
        work: FollowingWork,
        leave_unsettled: Callable[[Endpoint, EnforcerError], None],
        log: Logger,
    ) -> None:
        """Follow for these endpoints, as they are at any time."""
        self._endpoints = endpoints
        self._kernel, self._turns, self._rejudging, self._stale = work
        self._leave_unsettled = leave_unsettled
        self._log = log
        self._world: CompiledWorld | None = None
        self._namespaces: dict[str, _Turn] = {}
        self._labelled: set[str] = set()
        """Namespaces that have not seen yet that some namespace's labels changed."""

    async def follow(self, world: CompiledWorld) -> None:
        """Bring what the world changes to it; return when that is done."""
        before, self._world = self._world, world
        touched = {
            endpoint.identity.pod.namespace
            for endpoint in self._endpoints.values()
            if before is None or endpoint.is_touched(before, world)
        }
        if before is None or before.world.namespaces != world.world.namespaces:
            touched = namespaces_of(self._endpoints.values())
            self._labelled |= touched
        async with asyncio.TaskGroup() as tasks:
            for namespace in touched:
                tasks.create_task(self._follow(namespace))

    async def _follow(self, namespace: str) -> None:
        turn = self._namespaces.setdefault(namespace, _Turn())
        turn.asked += 1
        turn.waiting += 1
        number = turn.asked
        try:
            async with turn.lock:
                if turn.done < number:  # Else one before took this world along.
                    asked = turn.asked
                    await self._bring(namespace)
                    turn.done = asked
        finally:
            turn.waiting -= 1
            if not turn.waiting:
                del self._namespaces[namespace]

    async def _bring(self, namespace: str) -> None:
        """Bring one namespace's endpoints to the latest world."""
        world = self._latest()
        await self._turns.run(namespace, partial(_prepare, world, self._compiled_for(world, namespace)))
        are_labels_new = namespace in self._labelled
        self._labelled.discard(namespace)
        reguarded: list[Endpoint] = []
        changed: list[tuple[Endpoint, Change]] = []
        for endpoint in self._of(namespace):
            before = guarded(endpoint.sandbox, endpoint.policy)
            known_as = endpoint.identity
            change = endpoint.update(world.identity_of(endpoint.sandbox.requests, known_as), world.snapshot)
            if change.is_identity_new:
                self._stale.note_change(known_as, endpoint.identity)
            if guarded(endpoint.sandbox, endpoint.policy) != before:
                reguarded.append(endpoint)
            if change.is_identity_new or change.is_policy_new or are_labels_new:
                endpoint.forget_unfinished(world, change)
                changed.append((endpoint, change))
        async with asyncio.TaskGroup() as tasks:
            for endpoint, change in changed:
                tasks.create_task(self._rejudging.judge(endpoint, world, change))
        for endpoint in reguarded:
            if problem := endpoint.policy.ingress.problem or endpoint.policy.egress.problem:
                self._log.error("rules left out", pod=str(endpoint.identity.pod), problem=problem)
        await self._guard(reguarded)
        await self._rejudging.judge_masqueraded(reguarded)
        if self._stale.is_pending and changed:  # What ended is this namespace's, or of pods that have flows with it.
            await self._stale.settle_or_leave()

    async def _guard(self, endpoints: list[Endpoint]) -> None:
        for batch in batches(endpoints, _weight):
            try:
                await self._kernel.guard(*batch)
            except DataplaneError as err:
                for endpoint in batch:
                    self._leave_unsettled(endpoint, err)

    def _compiled_for(self, world: CompiledWorld, namespace: str) -> list[Identity]:
        """Return the pods whose policies are asked for: the namespace's own, and of those with new labels the peers."""
        found = []
        for endpoint in self._of(namespace):
            identity = world.identity_of(endpoint.sandbox.requests, endpoint.identity)
            found.append(identity)
            if endpoint.is_identity_new(identity):
                peers = (judged.peer for _, judged in endpoint.flows)
                found += [peer for peer in peers if world.evaluates(peer)]
        return found

    def _of(self, namespace: str) -> list[Endpoint]:
        return [endpoint for endpoint in self._endpoints.values() if endpoint.identity.pod.namespace == namespace]

    def _latest(self) -> CompiledWorld:
        if self._world is None:
            raise RuntimeError("a namespace follows a world before there is one")
        return self._world


def _prepare(world: CompiledWorld, identities: Iterable[Identity]) -> None:
    for identity in identities:
        world.prepare(identity)


def namespaces_of(endpoints: Iterable[Endpoint]) -> set[str]:
    """Return the namespaces of endpoints."""
    return {endpoint.identity.pod.namespace for endpoint in endpoints}


def _weight(endpoint: Endpoint) -> int:
    policy = endpoint.policy
    return size_of((*policy.ingress.address_rules(), *policy.egress.address_rules()))


def batches(endpoints: Iterable[Endpoint], weigh: Callable[[Endpoint], int]) -> Iterator[list[Endpoint]]:
    """Put endpoints together as long as they are no more than one transaction may hold."""
    batch: list[Endpoint] = []
    weight = 0
    for endpoint in endpoints:
        own = weigh(endpoint)
        if batch and weight + own > MAX_BATCH_SPANS:
            yield batch
            batch, weight = [], 0
        batch.append(endpoint)
        weight += own
    if batch:
        yield batch
