# SPDX-License-Identifier: Apache-2.0
"""Looks up where the cluster has the pods that other nodes' tokens name: one after the other, and not too many.

A pod that is not found is looked up once more before that counts. An API server that is away changes nothing: the claim
is looked up at its next contact.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from enforcer_daemon.handshake.placement import Answer, Claim, Placement
from enforcer_daemon.kube.client import NOT_FOUND, ApiError, ClusterApi
from enforcer_daemon.kube.resources import PODS
from enforcer_daemon.kube.table import Entry, read_entry
from enforcer_daemon.settings import PlacementSettings, Settings
from enforcer_daemon.telemetry.logs import Logger
from enforcer_daemon.telemetry.metrics import Metrics

_MAX_WAITING = 1_024
"""Claims that wait to be looked up; more are looked up at a later contact."""
_SILENCE_S = 5.0
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", re.ASCII)
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", re.ASCII)
"""What Kubernetes accepts. A token's names are another node's words, and become part of a path."""

OnDenied = Callable[[str, str], Awaitable[None]]
"""Called with a node that is denied from now on, and why."""


@dataclass(slots=True)
class PlacementCheck:
    """The look-ups of one node. Run `run` as a task."""

    settings: PlacementSettings
    api: ClusterApi
    log: Logger
    metrics: Metrics
    placement: Placement = field(init=False)
    on_denied: OnDenied | None = None
    _first: asyncio.Queue[Claim] = field(default_factory=lambda: asyncio.Queue(_MAX_WAITING))
    _again: asyncio.Queue[tuple[float, Claim]] = field(default_factory=lambda: asyncio.Queue(_MAX_WAITING))

    def open(self, settings: Settings) -> Placement:
        """Give what the datapath asks."""
        denial_s = self.settings.denial_s
        self.placement = Placement(settings.node, settings.trust_domain, denial_s, self._ask)
        return self.placement

    def _ask(self, claim: Claim) -> bool:
        try:
            self._first.put_nowait(claim)
        except asyncio.QueueFull:
            self._count("skipped")
            return False
        return True

    async def run(self) -> None:
        """Look claims up as they come, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._look(), name="placement")
            tasks.create_task(self._look_again(), name="placement, second look")

    async def _look(self) -> None:
        while True:
            claim = await self._first.get()
            answer, where = await self._find(claim)
            if answer is Answer.ABSENT:
                await self._again.put((time.monotonic() + self.settings.retry_s, claim))
            else:
                await self._settle(claim, answer, where)
            await asyncio.sleep(1.0 / self.settings.max_per_s)

    async def _look_again(self) -> None:
        while True:
            due_at, claim = await self._again.get()
            await asyncio.sleep(max(0.0, due_at - time.monotonic()))
            await self._settle(claim, *await self._find(claim))
            await asyncio.sleep(1.0 / self.settings.max_per_s)

    async def _settle(self, claim: Claim, answer: Answer, where: str) -> None:
        self._count(answer.value)
        if answer in (Answer.ABSENT, Answer.ELSEWHERE):
            self.log.error("false claim of a pod", node=claim.node, pod=str(claim.pod), uid=claim.uid, found=where)
        if not self.placement.settle(claim, answer, where, time.monotonic()):
            return
        why = self.placement.denied[claim.node].why
        self.log.error("node denied", node=claim.node, why=why, for_s=self.settings.denial_s)
        if self.on_denied is not None:
            await self.on_denied(claim.node, why)

    async def _find(self, claim: Claim) -> tuple[Answer, str]:
        """Ask the API server; say what was found."""
        if not _NAMESPACE.fullmatch(claim.pod.namespace) or not _NAME.fullmatch(claim.pod.name):
            return Answer.ABSENT, "a name that no pod can have"
        path = f"/api/v1/namespaces/{claim.pod.namespace}/pods/{claim.pod.name}"
        try:
            manifest = json.loads(await self.api.get(path, {}, _SILENCE_S))
        except ApiError as err:
            return (Answer.ABSENT, "not in the cluster") if err.status == NOT_FOUND else (Answer.UNKNOWN, str(err))
        except ValueError as err:
            return Answer.UNKNOWN, str(err)
        entry = read_entry(PODS, manifest, {}) if isinstance(manifest, Mapping) else None
        if not isinstance(entry, Entry) or entry.value is None:
            return Answer.UNKNOWN, "an object that cannot be read"
        pod = entry.value
        if pod.node == claim.node and claim.uid in ("", pod.uid):
            return Answer.HERE, ""
        if claim.uid == pod.uid:
            return Answer.ELSEWHERE, f"on node {pod.node}" if pod.node else "on no node"
        return Answer.ABSENT, f"another pod of that name (UID {pod.uid}, node {pod.node or 'none'})"

    def _count(self, result: str) -> None:
        self.metrics.placement.labels(result).inc()
