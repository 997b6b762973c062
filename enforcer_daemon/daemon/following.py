# SPDX-License-Identifier: Apache-2.0
"""Endpoints after a change: brought to the latest state namespace by namespace, none of which waits for another.

The policies of a namespace are compiled in a thread within its budget (`sources/turns.py`). Worlds may follow one
another meanwhile; a namespace takes the latest when its turn comes, and skips those between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from enforcer_daemon.daemon.clusterstate import CompiledState
from enforcer_daemon.daemon.endpoint import Change, Endpoint
from enforcer_daemon.daemon.kernel import Kernel, guarded
from enforcer_daemon.daemon.reevaluation import Reevaluation
from enforcer_daemon.daemon.staleflows import StaleFlows
from enforcer_daemon.errors import DataplaneError, EnforcerError
from enforcer_daemon.model import Identity, NetnsId
from enforcer_daemon.policy.address_rules import size_of
from enforcer_daemon.sources.turns import Turns

MAX_BATCH_SPANS = 4_096
"""Spans of addresses and ports in one transaction of the guard; an endpoint that has more is one by itself. Others wait
while a transaction runs: some 20 ms for so many."""


@dataclass(slots=True)
class _Turn:
    """A namespace that follows."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    asked: int = 0
    """How many states it was to follow."""
    done: int = 0
    """How many of them it has followed."""
    waiting: int = 0


class FollowingWork(NamedTuple):
    """What a change is brought in force by."""

    kernel: Kernel
    turns: Turns
    reevaluation: Reevaluation
    stale: StaleFlows


class Following:
    """Follows states. For the event loop's thread alone."""

    def __init__(
        self,
        endpoints: Mapping[NetnsId, Endpoint],
        work: FollowingWork,
        leave_pending: Callable[[Endpoint, EnforcerError], None],
    ) -> None:
        """Follow for these endpoints, as they are at any time."""
        self._endpoints = endpoints
        self._kernel, self._turns, self._reevaluation, self._stale = work
        self._leave_pending = leave_pending
        self._state: CompiledState | None = None
        self._namespaces: dict[str, _Turn] = {}
        self._labelled: set[str] = set()
        """Namespaces that have not seen yet that some namespace's labels changed."""

    async def follow(self, state: CompiledState) -> None:
        """Bring what the state changes to it; return when that is done."""
        before, self._state = self._state, state
        touched = {
            endpoint.identity.pod.namespace
            for endpoint in self._endpoints.values()
            if before is None or endpoint.is_touched(before, state)
        }
        if before is None or before.cluster.namespaces != state.cluster.namespaces:
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
                if turn.done < number:  # Else one before took this state along.
                    asked = turn.asked
                    await self._bring(namespace)
                    turn.done = asked
        finally:
            turn.waiting -= 1
            if not turn.waiting:
                del self._namespaces[namespace]

    async def _bring(self, namespace: str) -> None:
        """Bring one namespace's endpoints to the latest state."""
        state = self._latest()
        await self._turns.run(namespace, partial(_prepare, state, self._compiled_for(state, namespace)))
        are_labels_new = namespace in self._labelled
        self._labelled.discard(namespace)
        to_guard: list[Endpoint] = []
        changed: list[tuple[Endpoint, Change]] = []
        for endpoint in self._of(namespace):
            before = guarded(endpoint.sandbox, endpoint.policy)
            known_as = endpoint.identity
            change = endpoint.update(state.identity_of(endpoint.sandbox.requests, known_as), state.snapshot)
            if change.is_identity_new:
                self._stale.note_change(known_as, endpoint.identity)
            if guarded(endpoint.sandbox, endpoint.policy) != before:
                to_guard.append(endpoint)
            if change.is_identity_new or change.is_policy_new or are_labels_new:
                endpoint.end_half_open(state, change)
                changed.append((endpoint, change))
        async with asyncio.TaskGroup() as tasks:
            for endpoint, change in changed:
                tasks.create_task(self._reevaluation.evaluate(endpoint, state, change))
        await self._guard(to_guard)
        await self._reevaluation.reevaluate_masqueraded(to_guard)
        if self._stale.is_pending and changed:  # What ended is this namespace's, or of pods that have flows with it.
            await self._stale.settle_or_leave()

    async def _guard(self, endpoints: list[Endpoint]) -> None:
        for batch in batches(endpoints, _weight):
            try:
                await self._kernel.guard(*batch)
            except DataplaneError as err:
                for endpoint in batch:
                    self._leave_pending(endpoint, err)

    def _compiled_for(self, state: CompiledState, namespace: str) -> list[Identity]:
        """Return the pods whose policies are asked for: the namespace's own, and of those with new labels the peers."""
        found = []
        for endpoint in self._of(namespace):
            identity = state.identity_of(endpoint.sandbox.requests, endpoint.identity)
            found.append(identity)
            if endpoint.is_identity_new(identity):
                peers = (evaluated.peer for _, evaluated in endpoint.flows)
                found += [peer for peer in peers if state.evaluates(peer)]
        return found

    def _of(self, namespace: str) -> list[Endpoint]:
        return [endpoint for endpoint in self._endpoints.values() if endpoint.identity.pod.namespace == namespace]

    def _latest(self) -> CompiledState:
        if self._state is None:
            raise RuntimeError("a namespace follows a state before there is one")
        return self._state


def _prepare(state: CompiledState, identities: Iterable[Identity]) -> None:
    for identity in identities:
        state.prepare(identity)


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
