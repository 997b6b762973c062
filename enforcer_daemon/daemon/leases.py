# SPDX-License-Identifier: Apache-2.0
"""The shell of the leases: which flows the kernel has, and what becomes of those that lapse or have a new identity.

The kernel's marks say which flows are released. They are read once in a lease's time for each endpoint that has any,
one endpoint after another, in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping

from enforcer_daemon.daemon.endpoint import Endpoint
from enforcer_daemon.errors import DataplaneError, NetnsError
from enforcer_daemon.handshake.leasepairs import Lapse, LeaseEvent, LeaseTimes, Replaced
from enforcer_daemon.model import NetnsId
from enforcer_daemon.telemetry.logs import Logger
from enforcer_daemon.telemetry.metrics import Metrics

_TICK_S = 0.1
"""How often events are looked for, seconds."""
_LOOK_S = 1.0
"""How often it is asked whose flows are to be read, seconds, at most."""
_SAVE_S = 5.0
"""How often the silence of peers is written, seconds: so much of it a crash may lose."""


class LeaseKeeper:
    """Keeps the leases of all endpoints. For the event loop's thread alone."""

    def __init__(self, endpoints: Iterable[Endpoint], times: LeaseTimes, log: Logger, metrics: Metrics) -> None:
        self._endpoints = endpoints
        self._times = times
        self._log = log
        self._metrics = metrics
        self._look_at: Mapping[NetnsId, float] = {}
        """When the kernel's flows of an endpoint are read next, monotonic seconds."""
        self._retry: dict[NetnsId, list[LeaseEvent]] = {}
        """What the kernel refused to end."""

    async def run(self) -> None:
        """Keep the leases until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._look_at_all())
            tasks.create_task(self._save_all())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            for endpoint in self._endpoints:
                if endpoint.leases.events or self._retry:
                    retry = self._retry.pop(endpoint.sandbox.netns, [])
                    await self._carry_out(endpoint, [*retry, *endpoint.leases.take_events()])

    async def _look_at_all(self) -> None:
        """Read the kernel's flows of the endpoints whose time has come, one after another."""
        every_s = min(_LOOK_S, self._times.lease_s / 2)
        while True:
            look_at: dict[NetnsId, float] = {}
            for endpoint in self._endpoints:
                netns, now = endpoint.sandbox.netns, time.monotonic()
                due = self._look_at.get(netns, 0.0 if endpoint.has_flows else now + self._times.lease_s)
                if due <= now:
                    due = now + self._times.lease_s
                    if endpoint.has_flows and endpoint.is_open:
                        await self._look(endpoint)
                look_at[netns] = due
            self._look_at = look_at
            self._metrics.unanswered_leases.set(sum(endpoint.leases.unanswered() for endpoint in self._endpoints))
            await asyncio.sleep(every_s)

    async def _save_all(self) -> None:
        while True:
            await asyncio.sleep(min(_SAVE_S, self._times.lease_s))
            for endpoint in self._endpoints:
                endpoint.save_leases()

    async def _look(self, endpoint: Endpoint) -> None:
        try:
            await endpoint.look_for_flows()
        except (DataplaneError, NetnsError) as err:
            self._log.error("released flows not read, will try again", pod=str(endpoint.identity.pod), error=str(err))

    async def _carry_out(self, endpoint: Endpoint, events: list[LeaseEvent]) -> None:
        if not events or not endpoint.is_open:
            return
        pod = str(endpoint.identity.pod)
        lapses = [event for event in events if isinstance(event, Lapse)]
        try:
            changes = [(event.old, event.new) for event in events if isinstance(event, Replaced)]
            if changes:
                ended = await endpoint.reevaluate_peers(changes)
                self._metrics.ended_flows.inc(len(ended))
                peers = sorted({str(new.pod) for _, new in changes})
                self._log.info("peers have new identities", pod=pod, peers=peers, ended_flows=len(ended))
            if lapses and endpoint.is_open:
                ended = await endpoint.end_lapsed(lapses)
                endpoint.leases.note_ended(lapses)
                self._metrics.lapsed_flows.inc(len(ended))
                for lapse in lapses:
                    self._log.warning("lease lapsed: nothing heard of the peer", pod=pod, peer=str(lapse.peer.pod))
        except (DataplaneError, NetnsError) as err:
            self._retry[endpoint.sandbox.netns] = events
            self._log.error("flows not ended, will try again", pod=pod, error=str(err))
