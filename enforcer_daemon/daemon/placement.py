# SPDX-License-Identifier: Apache-2.0
"""What follows when a node claims pods that are not its own: flows with them end, and operators hear of it."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

from enforcer_daemon.daemon.announcements import Announcements
from enforcer_daemon.daemon.endpoints import Endpoints
from enforcer_daemon.kube.placement import PlacementCheck

_ENDING_EVERY_S = 1.0
"""The shortest time between two looks at the flows of all endpoints: other nodes' tokens cause them."""


class PlacementGuard:
    """The look-ups of placement, and the endpoints that they concern. Run `run` as a task."""

    def __init__(self, check: PlacementCheck, endpoints: Endpoints, announcements: Announcements | None) -> None:
        self._check = check
        self._endpoints = endpoints
        self._announcements = announcements
        self._misplaced = asyncio.Event()
        check.on_denied = self._deny
        check.on_misplaced = self._misplaced.set

    async def run(self) -> None:
        """Look claims up until cancelled, and end flows with pods that are denied."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._check.run(), name="placement, look-ups")
            tasks.create_task(self._end_flows(), name="placement, flows")

    async def _end_flows(self) -> None:
        while True:
            await self._misplaced.wait()
            self._misplaced.clear()
            await self._endpoints.reevaluate()
            await asyncio.sleep(_ENDING_EVERY_S)

    async def _deny(self, node: str, why: str) -> None:
        if self._announcements is not None:
            self._announcements.note_denied_node(node, why)

    def trust(self, node: str) -> bool:
        """Trust a node again; return whether it was denied."""
        was_denied = self._check.placement.release(node)
        if was_denied:
            self._check.log.info("node trusted again", node=node)
        return was_denied

    def measure(self) -> None:
        """Bring the metric up to date; a denial ends by itself."""
        self._check.metrics.denied_nodes.set(len(self.denied()))

    def denied(self) -> list[dict[str, str]]:
        """Describe the nodes that are denied now, for operators."""
        now = time.monotonic()
        offset = time.time() - now
        return [
            {"node": node, "why": denial.why, "until": datetime.fromtimestamp(denial.until + offset, UTC).isoformat()}
            for node, denial in self._check.placement.denied.items()
            if now < denial.until
        ]
