# SPDX-License-Identifier: Apache-2.0
"""Vouches on the node for connections that a pod still has, after the node's conntrack lost them (guard_live).

The guard tells of segments in the middle of no flow. The pod's namespace says whether its enforcer released the
connection and a socket still has it. A look costs about ten milliseconds of a thread, so a pod whose segments belong to
no connection is looked at less and less often.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from enforcer_daemon.daemon.endpoint import Endpoint
from enforcer_daemon.daemon.kernel import Kernel
from enforcer_daemon.dataplane.nodeflows import SentTuple
from enforcer_daemon.errors import DataplaneError, NetnsError
from enforcer_daemon.model import Direction
from enforcer_daemon.telemetry.logs import Logger

MAX_AT_ONCE = 1_024
"""Connections of a pod that one look vouches for: those that were asked about, and others. All are lost at once."""
MIN_PACE_S, MAX_PACE_S = 0.25, 30.0
"""Between two looks at one pod, seconds. The time doubles with each look that finds nothing."""


@dataclass(slots=True)
class _Pace:
    """When a pod may be looked at again."""

    wait_s: float = MIN_PACE_S
    next_at: float = 0.0

    def note(self, now: float, *, is_found: bool) -> None:
        is_quiet = now >= self.next_at + MAX_PACE_S
        self.wait_s = MIN_PACE_S if is_found or is_quiet else min(2 * self.wait_s, MAX_PACE_S)
        self.next_at = now + self.wait_s


class Vouching:
    """Looks at the pods that the guard tells of. For the event loop's thread alone."""

    def __init__(self, kernel: Kernel, log: Logger) -> None:
        self._kernel = kernel
        self._log = log
        self._paces: WeakKeyDictionary[Endpoint, _Pace] = WeakKeyDictionary()

    async def look(self, endpoint: Endpoint, asked: Mapping[SentTuple, Direction]) -> None:
        """Vouch for what the pod has, and have refused what peers send in what it does not have.

        `asked`: flows by what the pod sends in them, and which way the dropped segment went.
        """
        pace, pod = self._paces.setdefault(endpoint, _Pace()), str(endpoint.identity.pod)
        if time.monotonic() < pace.next_at or not endpoint.is_open:
            return
        try:
            endings = endpoint.endings
            live = await endpoint.live_flows()
            found = [flow for flow in asked if flow in live]
            others = list(live)[:MAX_AT_ONCE] if found else []
            refused = [flow for flow, way in asked.items() if way is Direction.INGRESS and flow not in live]
            if found or refused:
                await self._kernel.vouch((*found, *others), refused)
            if endpoint.endings != endings:
                await self._kernel.freshen(endpoint.identity.ips)  # Vouched for some that ended meanwhile, perhaps.
        except (DataplaneError, NetnsError) as err:
            self._log.error("connections that the node lost not vouched for, will try again", pod=pod, error=str(err))
            return
        pace.note(time.monotonic(), is_found=bool(found))
        if found:
            self._log.info("the node lost connections that the pod has; vouched for them", pod=pod, asked=len(found))
