# SPDX-License-Identifier: Apache-2.0
"""What follows when a node claims pods that are not its own: its flows end, and operators hear of it."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from enforcer_daemon.daemon.announcements import Announcements
from enforcer_daemon.daemon.endpoints import Endpoints
from enforcer_daemon.kube.placement import PlacementCheck


class PlacementGuard:
    """The look-ups of placement, and the endpoints that they concern. Run `run` as a task."""

    def __init__(self, check: PlacementCheck, endpoints: Endpoints, announcements: Announcements | None) -> None:
        self._check = check
        self._endpoints = endpoints
        self._announcements = announcements
        check.on_denied = self._deny

    async def run(self) -> None:
        """Look claims up until cancelled."""
        await self._check.run()

    async def _deny(self, node: str, why: str) -> None:
        if self._announcements is not None:
            self._announcements.note_denied_node(node, why)
        await self._endpoints.judge_again()

    def release(self, node: str) -> bool:
        """Believe a node again; tell whether it was denied."""
        was_denied = self._check.placement.release(node)
        if was_denied:
            self._check.log.info("node believed again", node=node)
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
