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
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from enforcer_daemon.errors import TokenError
from enforcer_daemon.handshake.lookups import Admission, LookupQueue
from enforcer_daemon.handshake.placement import Answer, Claim, Placement
from enforcer_daemon.kube.client import NOT_FOUND, ApiError, ClusterApi
from enforcer_daemon.kube.resources import PODS
from enforcer_daemon.kube.table import Entry, read_entry
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings import Settings
from enforcer_daemon.telemetry.logs import Logger
from enforcer_daemon.telemetry.metrics import Metrics

_SILENCE_S = 5.0
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", re.ASCII)
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", re.ASCII)
"""What Kubernetes accepts. A token's names are another node's words, and become part of a path."""

MAX_AGAIN = 1_024
"""Claims that wait for their second look. More are looked up anew at their next contact."""

OnDenied = Callable[[str, str], Awaitable[None]]
"""Called with a node that is denied from now on, and why."""


@dataclass(frozen=True, slots=True)
class PlacementLimits:
    """How many look-ups a node makes, and what a false claim costs. Code and tests construct other values."""

    max_lookups_per_s: float = 10.0
    """Look-ups of the node per second. A node that meets 1,000 new pods has verified them after 100 s."""
    retry_s: float = 5.0
    """After this time a pod that was not found is looked up once more before that counts, seconds. A pod can be
    seen before the API server answers for it."""
    denial_s: float = 3_600.0
    """How long a node that claimed another node's pod, or a claim of a pod that does not exist, is denied, seconds.
    An operator can end it earlier."""


@dataclass(slots=True)
class PlacementCheck:
    """The look-ups of one node. Run `run` as a task."""

    limits: PlacementLimits
    api: ClusterApi
    log: Logger
    metrics: Metrics
    placement: Placement = field(init=False)
    on_denied: OnDenied | None = None
    on_misplaced: Callable[[], None] | None = None
    """Called after a claim was denied, or a node."""
    _first: LookupQueue = field(default_factory=LookupQueue)
    _again: deque[tuple[float, Claim]] = field(default_factory=deque)
    _waiting: asyncio.Event = field(default_factory=asyncio.Event)
    _retries_waiting: asyncio.Event = field(default_factory=asyncio.Event)

    def open(self, settings: Settings) -> Placement:
        """Return what the datapath asks."""
        denial_s = self.limits.denial_s
        self.placement = Placement(settings.node, settings.trust_domain, denial_s, self._ask)
        return self.placement

    def _ask(self, claim: Claim) -> bool:
        admission, evicted = self._first.put(claim)
        if evicted is not None:
            self.placement.forget(evicted)
            self._count("skipped")
        match admission:
            case Admission.TAKEN:
                self._waiting.set()
                return True
            case Admission.QUEUE_IS_FULL:
                self._count("skipped")
                return False
            case Admission.SHARE_IS_FULL:
                self._count("refused")
                raise TokenError(Reason.UNCONFIRMED_POD, f"too many new pods of node {claim.node} wait")

    async def run(self) -> None:
        """Look claims up as they come, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._look(), name="placement")
            tasks.create_task(self._retry_lookups(), name="placement, second look")

    async def _look(self) -> None:
        while True:
            claim = self._first.take()
            if claim is None:
                self._waiting.clear()
                await self._waiting.wait()
                continue
            answer, where = await self._find(claim)
            if answer is not Answer.ABSENT:
                await self._settle(claim, answer, where)
            elif len(self._again) < MAX_AGAIN:
                self._again.append((time.monotonic() + self.limits.retry_s, claim))
                self._retries_waiting.set()
            else:
                self.placement.forget(claim)
                self._count("skipped")
            await asyncio.sleep(1.0 / self.limits.max_lookups_per_s)

    async def _retry_lookups(self) -> None:
        while True:
            if not self._again:
                self._retries_waiting.clear()
                await self._retries_waiting.wait()
            due_at, claim = self._again.popleft()
            await asyncio.sleep(max(0.0, due_at - time.monotonic()))
            await self._settle(claim, *await self._find(claim))
            await asyncio.sleep(1.0 / self.limits.max_lookups_per_s)

    async def _settle(self, claim: Claim, answer: Answer, where: str) -> None:
        self._count(answer.value)
        is_false = answer in (Answer.ABSENT, Answer.ELSEWHERE)
        if is_false:
            self.log.error("false claim of a pod", node=claim.node, pod=str(claim.pod), uid=claim.uid, found=where)
        is_denied = self.placement.settle(claim, answer, where, time.monotonic())
        if is_false and self.on_misplaced is not None:
            self.on_misplaced()
        if not is_denied:
            return
        why = self.placement.denied[claim.node].why
        self.log.error("node denied", node=claim.node, why=why, for_s=self.limits.denial_s)
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
        # By the UID that the API server gave it. The hash of a static pod is an annotation, which anybody may write on
        # a pod of his own that he sends to another node.
        if claim.uid and claim.uid == entry.uid:
            return Answer.ELSEWHERE, f"on node {pod.node}" if pod.node else "on no node"
        return Answer.ABSENT, f"another pod of that name (UID {pod.uid}, node {pod.node or 'none'})"

    def _count(self, result: str) -> None:
        self.metrics.placement.labels(result).inc()
