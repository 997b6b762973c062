# SPDX-License-Identifier: Apache-2.0
"""Established flows after a change: evaluated again, a few endpoints at a time, and again where the kernel refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from weakref import WeakValueDictionary

from enforcer_daemon.daemon.clusterstate import CompiledState
from enforcer_daemon.daemon.endpoint import Change, Endpoint
from enforcer_daemon.errors import DataplaneError, NetnsError
from enforcer_daemon.model import NetnsId
from enforcer_daemon.telemetry.logs import Logger
from enforcer_daemon.telemetry.metrics import Metrics

_EVALUATED_AT_ONCE = 2
"""Endpoints of a namespace whose established flows are evaluated at one moment; the kernel's part of it does not wait
for Python's."""
_EVALUATED_IN_ALL = 4
"""Endpoints of all namespaces: one namespace with many of them leaves others their turn."""


class Reevaluation:
    """Ends the flows that a change no longer allows. For the event loop's thread alone."""

    def __init__(self, log: Logger, metrics: Metrics) -> None:
        self._log = log
        self._metrics = metrics
        self._left: dict[NetnsId, Change] = {}
        """Endpoints whose established flows the kernel did not show or end; tried again until it does."""
        self._turns = asyncio.Semaphore(_EVALUATED_IN_ALL)
        self._own_turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        """Of the namespaces that are evaluated again at present."""

    def __len__(self) -> int:
        """Count the endpoints that are still to be evaluated again."""
        return len(self._left)

    async def evaluate(self, endpoint: Endpoint, state: CompiledState, change: Change) -> None:
        """End what the state no longer allows; what the kernel refuses is left for `retry`."""
        own_turns = self._own_turns.setdefault(endpoint.identity.pod.namespace, asyncio.Semaphore(_EVALUATED_AT_ONCE))
        async with own_turns, self._turns:
            if not endpoint.is_open:
                return
            netns, pod = endpoint.sandbox.netns, str(endpoint.identity.pod)
            change = change.also(self._left.pop(netns, change))
            try:
                ended = await endpoint.reconsider(state, change)
            except (DataplaneError, NetnsError) as err:
                self._left[netns] = change.also(self._left.get(netns, change))
                self._log.error("established flows not evaluated again, will try again", pod=pod, error=str(err))
                return
        self._note(pod, len(ended))

    async def reevaluate_masqueraded(self, endpoints: Iterable[Endpoint]) -> None:
        """End flows of masqueraded clients that are no longer allowed; call it when the guard lets in no more."""
        for endpoint in endpoints:
            if endpoint.is_open:
                pod = str(endpoint.identity.pod)
                try:
                    self._note(pod, len(await endpoint.end_masqueraded()))
                except (DataplaneError, NetnsError) as err:
                    self._left[endpoint.sandbox.netns] = Change(False, True, True)
                    self._log.error("masqueraded flows not evaluated again, will try again", pod=pod, error=str(err))

    def _note(self, pod: str, ended: int) -> None:
        if ended:
            self._metrics.ended_flows.inc(ended)
            self._log.info("established flows ended", pod=pod, flows=ended)

    async def retry(self, endpoints: Mapping[NetnsId, Endpoint], state: CompiledState) -> None:
        """Evaluate again where the kernel refused before."""
        for netns, change in list(self._left.items()):
            endpoint = endpoints.get(netns)
            if endpoint is None:
                del self._left[netns]
            else:
                await self.evaluate(endpoint, state, change)
                await self.reevaluate_masqueraded([endpoint])

    async def reevaluate_all(self, endpoint: Endpoint, state: CompiledState) -> None:
        """Evaluate whatever an earlier daemon left of an endpoint."""
        await self.evaluate(endpoint, state, Change(True, True, True))
        await self.reevaluate_masqueraded([endpoint])
