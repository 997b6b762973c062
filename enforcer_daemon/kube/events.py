# SPDX-License-Identifier: Apache-2.0
"""Events of the cluster (events.k8s.io/v1): what the daemon has to say about pods and policies, beside these.

What cannot be told is dropped and counted: nothing waits for an API server that is away. A series whose Event is gone
there begins with a new one.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256

from enforcer_daemon.kube.client import NOT_FOUND, ApiError, ClusterApi
from enforcer_daemon.telemetry.events import EventBook, Series
from enforcer_daemon.telemetry.logs import Logger
from enforcer_daemon.telemetry.metrics import Metrics

CONTROLLER = "trireme.io/enforcer"
MAX_NOTE_BYTES = 1_024
"""Of an Event, by the API."""
_MAX_INSTANCE = 128
"""Characters of an Event's reporting instance, by the API."""
_MAX_NAME = 200
"""Of an object's name in its Event's, which has at most 253 characters."""
_CLUSTER_NAMESPACE = "default"
"""Where Events about objects without a namespace are."""
_LOOK_S = 1.0
_SILENCE_S = 5.0
_CONFLICT = 409
_MERGE_PATCH = "application/merge-patch+json"


class EventSender:
    """Tells the API server what is due. Run it as a task."""

    def __init__(self, api: ClusterApi, book: EventBook, node: str, log: Logger, metrics: Metrics) -> None:
        self._api = api
        self._book = book
        self._node = node
        self._log = log
        self._metrics = metrics
        self._problem = ""

    async def run(self) -> None:
        """Look every second, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await self.send_due()

    async def send_due(self) -> None:
        """Tell what is due now, one after the other."""
        for series in self._book.take_due():
            try:
                await self._send(series)
            except ApiError as err:
                self._metrics.events.labels("failed").inc()
                self._note(str(err))
            else:
                self._metrics.events.labels("sent").inc()
                self._note("")
        limited, self._book.limited = self._book.limited, 0
        self._metrics.events.labels("limited").inc(limited)

    def _note(self, problem: str) -> None:
        if problem and problem != self._problem:
            self._log.warning("an event could not be told", error=problem)
        self._problem = problem

    async def _send(self, series: Series) -> None:
        namespace = series.notice.subject.namespace or _CLUSTER_NAMESPACE
        path = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
        if series.name:
            patch = json.dumps({"series": _repetition(series, self._wall_clock())}).encode()
            try:
                await self._api.send("PATCH", f"{path}/{series.name}", patch, _SILENCE_S, _MERGE_PATCH)
            except ApiError as err:
                if err.status != NOT_FOUND:  # Events end after an hour, by default.
                    raise
            else:
                return
        manifest = event_manifest(series, self._node, self._wall_clock())
        try:
            await self._api.send("POST", path, json.dumps(manifest).encode(), _SILENCE_S)
        except ApiError as err:
            if not (err.status == _CONFLICT and series.notice.is_shared):  # Another node was first.
                raise
        else:
            series.name = str(manifest["metadata"]["name"])  # type: ignore[index]

    def _wall_clock(self) -> Callable[[float], str]:
        """Return what writes a time of the book's clock as the API does."""
        offset = time.time() - self._book.clock()
        return lambda moment: datetime.fromtimestamp(moment + offset, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def event_manifest(series: Series, node: str, as_text: Callable[[float], str]) -> dict[str, object]:
    """Return the Event of a series; `as_text` writes times."""
    notice = series.notice
    subject = notice.subject
    regarding = {"apiVersion": subject.api_version, "kind": subject.kind, "name": subject.name}
    regarding |= {"namespace": subject.namespace} if subject.namespace else {}
    regarding |= {"uid": subject.uid} if subject.uid else {}
    manifest: dict[str, object] = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": _name(series, node), "namespace": subject.namespace or _CLUSTER_NAMESPACE},
        "eventTime": as_text(series.first_at),
        "reportingController": CONTROLLER,
        "reportingInstance": node[:_MAX_INSTANCE],
        "type": "Warning",
        "reason": notice.kind.reason,
        "action": notice.kind.action,
        "regarding": regarding,
        "note": notice.note.encode()[:MAX_NOTE_BYTES].decode(errors="ignore"),
    }
    if series.count > 1:
        manifest["series"] = _repetition(series, as_text)
    return manifest


def _repetition(series: Series, as_text: Callable[[float], str]) -> dict[str, object]:
    return {"count": series.count, "lastObservedTime": as_text(series.last_at)}


def _name(series: Series, node: str) -> str:
    """Name an Event: after the thing itself where all nodes see it, so that only the first of them makes one."""
    notice = series.notice
    told = [notice.subject.uid, notice.kind.reason, notice.note]
    own = [] if notice.is_shared else [node, repr(series.first_at), str(series.count)]
    digest = sha256("\n".join([*told, *own]).encode()).hexdigest()[:16]
    return f"{notice.subject.name[:_MAX_NAME].rstrip('.-')}.{digest}"
