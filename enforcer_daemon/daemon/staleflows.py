# SPDX-License-Identifier: Apache-2.0
"""What is left on the node of flows that have ended: entries of its conntrack, and the other ends in pods beside.

A flow belongs to the life and the identity of the pod that has it. When the pod goes, its address starts clean for the
next one; when a flow is no longer allowed, what is sent in it later is a new flow to the node. The address is fresh
first (dataplane/guard_fresh.py), then the entries are removed, so that nothing finds a gap between the two.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from enforcer_daemon.daemon.endpoint import Endpoint, PeerChange
from enforcer_daemon.daemon.kernel import Kernel
from enforcer_daemon.dataplane import nodeflows
from enforcer_daemon.dataplane.established import ReleasedFlow
from enforcer_daemon.dataplane.nodeflows import SentTuple
from enforcer_daemon.errors import DataplaneError, NetnsError
from enforcer_daemon.model import Identity, IPAddress, NetnsId
from enforcer_daemon.telemetry.logs import Logger
from enforcer_daemon.telemetry.metrics import Metrics

MAX_PENDING = 65_536
"""Of each kind that wait to be ended, while the kernel refuses: about a day of pods that come and go."""
_MAX_TURNS = 64
"""Turns in which the entries of addresses are removed: a million."""
MAX_UNANSWERED = 4_096
"""Entries of flows without a reply that ADD removes, about a quarter of a second; there may be any number of them."""
_RETRY_S = 1.0
K = TypeVar("K")


class StaleFlows:
    """What is still to be ended. For the event loop's thread alone."""

    def __init__(
        self, kernel: Kernel, endpoints: Callable[[], Iterable[Endpoint]], log: Logger, metrics: Metrics
    ) -> None:
        self._kernel = kernel
        self._endpoints = endpoints
        self._log = log
        self._metrics = metrics
        self._changes: dict[PeerChange, None] = {}
        self._newcomers: dict[NetnsId, Identity] = {}
        self._fresh: dict[IPAddress, None] = {}
        self._flows: dict[SentTuple, None] = {}
        self._addresses: dict[IPAddress, None] = {}
        self._turn = asyncio.Lock()
        self._woken = asyncio.Event()

    def note_ended(self, endpoint: Endpoint, flows: Sequence[ReleasedFlow]) -> None:
        """Take note of flows that were ended in a pod."""
        if flows:
            own = frozenset(endpoint.identity.ips)
            self._add(self._flows, (flow.sent_by(own) for flow in flows))
            self._add(self._fresh, own)

    def note_start(self, netns: NetnsId, identity: Identity) -> None:
        """Take note of a pod that came; call `start_clean` before it may run."""
        self._newcomers[netns] = identity

    async def start_clean(self, netns: NetnsId) -> None:
        """Leave nothing of an earlier pod under a newcomer's addresses; raise DataplaneError or NetnsError.

        It takes no turn with the others, whose work may be more. Once it succeeded it does nothing. Flows without a
        reply are removed up to a number that costs little; if there are more, the guard lets the newcomer send and get
        nothing in what is left.
        """
        newcomer = self._newcomers.get(netns)
        if newcomer is None:
            return
        for endpoint in self._endpoints():
            if endpoint.is_open and endpoint.identity.pod != newcomer.pod:
                self._report(endpoint, await endpoint.end_strangers(newcomer))
        await self._remove_of(newcomer.ips, is_answered=True)
        if await self._remove_once(newcomer.ips, MAX_UNANSWERED) == MAX_UNANSWERED:
            self._log.warning("flows without a reply are left at a new pod's address", pod=str(newcomer.pod))
            await self._kernel.freshen(newcomer.ips, is_clean=False)
        _take(self._addresses, newcomer.ips)  # What is in the table now may be the newcomer's.
        self._newcomers.pop(netns, None)

    def note_stop(self, netns: NetnsId) -> None:
        """Take note that a namespace is enforced no longer."""
        self._newcomers.pop(netns, None)

    def note_change(self, old: Identity, new: Identity) -> None:
        """Take note of a pod whose identity changed; the guard makes its addresses fresh by itself."""
        self._add(self._changes, ((old, new),))

    def note_gone(self, identity: Identity) -> None:
        """Take note of a pod that went."""
        self._add(self._changes, ((identity, None),))
        self._add(self._addresses, identity.ips)

    @property
    def is_pending(self) -> bool:
        """Whether anything is still to be ended."""
        return bool(self._changes or self._fresh or self._flows or self._addresses)

    def _add(self, pending: dict[K, None], found: Iterable[K]) -> None:
        pending.update(dict.fromkeys(found))
        while len(pending) > MAX_PENDING:
            del pending[next(iter(pending))]
        self._woken.set()

    async def run(self) -> None:
        """End what is noted, and try again what the kernel refused."""
        while True:
            await self._woken.wait()
            if not await self.settle_or_leave():
                await asyncio.sleep(_RETRY_S)

    async def settle_or_leave(self) -> bool:
        """End what is noted, and tell whether all could be; what the kernel refuses is left for `run`."""
        try:
            await self.settle()
        except (DataplaneError, NetnsError) as err:
            self._log.error("flows not ended on the node, will try again", error=str(err))
            self._woken.set()
            return False
        return True

    async def settle(self) -> None:
        """End what is noted; raise DataplaneError or NetnsError, with what is left still noted."""
        async with self._turn:
            self._woken.clear()
            await self._tell_peers()
            await self._freshen()
            await self._remove()

    async def _tell_peers(self) -> None:
        changes = dict(self._changes)
        for endpoint in self._endpoints():
            if changes and endpoint.is_open:
                others = [change for change in changes if change[0].pod != endpoint.identity.pod]
                self._report(endpoint, await endpoint.reevaluate_peers(others))
        _take(self._changes, changes)

    def _report(self, endpoint: Endpoint, ended: Sequence[ReleasedFlow]) -> None:
        if ended:
            self._metrics.ended_flows.inc(len(ended))
            self._log.info("established flows ended", pod=str(endpoint.identity.pod), flows=len(ended))

    async def _freshen(self) -> None:
        if fresh := dict(self._fresh):
            await self._kernel.freshen(fresh)
            _take(self._fresh, fresh)

    async def _remove(self) -> None:
        flows, addresses = dict(self._flows), dict(self._addresses)
        if flows:
            await asyncio.to_thread(nodeflows.remove_flows, flows)
            _take(self._flows, flows)
        if addresses:
            await self._remove_of(addresses)
            _take(self._addresses, addresses)

    async def _remove_of(self, addresses: Iterable[IPAddress], *, is_answered: bool = False) -> None:
        for _ in range(_MAX_TURNS):
            removed = await self._remove_once(addresses, nodeflows.MAX_REMOVED_AT_ONCE, is_answered=is_answered)
            if removed < nodeflows.MAX_REMOVED_AT_ONCE:
                return
        raise DataplaneError(f"conntrack: entries appear as fast as they are removed: {_MAX_TURNS * removed} so far")

    async def _remove_once(self, addresses: Iterable[IPAddress], limit: int, *, is_answered: bool = False) -> int:
        return await asyncio.to_thread(nodeflows.remove_of, tuple(addresses), limit, is_answered)


def _take(pending: dict[K, None], done: Iterable[K]) -> None:
    for each in done:
        pending.pop(each, None)
