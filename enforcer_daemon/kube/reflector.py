# SPDX-License-Identifier: Apache-2.0
"""Keeps one table in step with the API server: lists, then watches from the list's version, for ever.

A watch that ends goes on from the last version that was heard of; only where the server no longer has that version (410
Gone), or says what cannot be read, is everything listed again. Meanwhile the table stays as it is.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, NoReturn

from enforcer_daemon.errors import EnforcerError
from enforcer_daemon.kube.backoff import backoff_s
from enforcer_daemon.kube.client import GONE, NOT_FOUND, UNAUTHORIZED, ApiError, ClusterApi
from enforcer_daemon.kube.intake import Intake
from enforcer_daemon.kube.jsonlists import members
from enforcer_daemon.kube.limits import ClusterLimits
from enforcer_daemon.kube.resources import NAMESPACES, Manifest, Resource, Value
from enforcer_daemon.kube.table import Entry, Key, Table, read_entry, read_key
from enforcer_daemon.sources.manifests import Problem
from enforcer_daemon.telemetry.logs import Logger

_WATCH_S = 300.0
"""How long the server is asked to serve one watch, seconds; the random part spreads the nodes' reconnections."""
_ABSENT_S = 300.0
"""How often it is seen whether a kind that the API server does not serve is served now, seconds."""
_DECODED_S = 1.0
"""Processor time for decoding a list; the rest is decoded later, in the turns of its namespaces, or when needed."""
_LARGE_BYTES = 32_768
"""A line of a watch that is parsed in a thread."""
_AT_ONCE_S = 1.0
"""A watch that ends this soon without a word counts as a failure: the next one must not follow at once."""


@dataclass(slots=True)
class WatchHealth:
    """How a watch is, for operators. The times are monotonic."""

    heard_at: float
    """When the server last said something, a bookmark included; before the first time, when the daemon started."""
    down_since: float
    is_synced: bool = False
    """Whether everything was listed since the start."""
    is_up: bool = False
    problem: str = "not asked yet"
    """Why the watch is down."""

    def up(self) -> bool:
        """Return whether what happens is heard of."""
        return self.is_up

    def silence_s(self) -> float:
        """Return the time since the server last said something, seconds."""
        return time.monotonic() - self.heard_at


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all reflectors share."""

    api: ClusterApi
    limits: ClusterLimits
    log: Logger
    on_change: Callable[[], None]
    """Called after a table has changed, and when a kind is complete."""
    roll: Callable[[], float]
    """Random, from 0 to 1."""
    intake: Intake | None = None
    """Where objects wait to be decoded; None: they are decoded as they come."""


class Reflector(Generic[Value]):
    """One kind's list and watch. Run it as a task."""

    def __init__(self, table: Table[Value], shared: Surroundings, field_selector: str = "") -> None:
        self.table = table
        self.health = WatchHealth(time.monotonic(), time.monotonic())
        self._shared = shared
        self._selector = {"fieldSelector": field_selector} if field_selector else {}
        self._version: str | None = None
        self._failures = 0

    @property
    def version(self) -> str:
        """The newest version of the cluster that was heard of, a bookmark's included; empty before the first list."""
        return self._version or ""

    @property
    def resource(self) -> Resource[Value]:
        """What is watched."""
        return self.table.resource

    async def run(self) -> NoReturn:
        """Go on until cancelled, whatever the API server does."""
        while True:
            try:
                await self._round()
            except ApiError as err:
                await self._handle_error(err)

    async def _round(self) -> None:
        if self._version is None:
            self._version = await self._list()
            self._heard()
        elif await self._is_restored(self._version):
            raise ApiError("versions have gone back: the cluster was restored from a backup", GONE)
        started = time.monotonic()
        await self._watch(self._version)
        if self.health.heard_at <= started or time.monotonic() - started < _AT_ONCE_S:
            raise ApiError("the API server ended the watch at once")
        self._failures = 0

    async def _handle_error(self, err: ApiError) -> None:
        """Take note of a failure, and wait."""
        shared, health = self._shared, self.health
        if err.status == GONE:
            shared.log.info("watch begins anew", resource=self.resource.plural, reason=str(err))
            self._version = None
        elif err.status == NOT_FOUND and self.resource.is_optional:
            self._take(self.table.replace(()))
            health.is_synced, health.is_up, health.heard_at, health.problem = True, True, time.monotonic(), str(err)
            shared.on_change()
            await asyncio.sleep(_ABSENT_S)
            return
        else:
            self._lose(err)
        if err.status == UNAUTHORIZED:
            try:
                await shared.api.refresh()
            except EnforcerError as unusable:
                shared.log.error("credentials cannot be read anew", error=str(unusable))
        self._failures += 1
        await asyncio.sleep(
            max(err.retry_after_s, backoff_s(self._failures, shared.roll(), shared.limits.max_backoff_s))
        )

    def _lose(self, err: ApiError) -> None:
        if self.health.is_up or self.health.problem != str(err):
            self._shared.log.warning("watch lost", resource=self.resource.plural, error=str(err))
        if self.health.is_up:
            self.health.is_up, self.health.down_since = False, time.monotonic()
        self.health.problem = str(err)

    def _heard(self) -> None:
        self.health.heard_at = time.monotonic()
        if not self.health.is_up:
            self.health.is_up, self.health.problem = True, ""
            self._shared.log.info("watch in place", resource=self.resource.plural, objects=len(self.table.entries))

    async def _is_restored(self, version: str) -> bool:
        """Ask whether the cluster is older than what was heard of it.

        A watch from a version that is still to come says nothing until that comes, and never what happened before.
        """
        shared = self._shared
        # One object of a kind whose list is always cheap: the version is that of the whole cluster.
        body = await shared.api.get(NAMESPACES.path, {"limit": "1"}, shared.limits.request_timeout_s)
        return is_older(_read_page(NAMESPACES, body, {}, math.inf).version, version)

    async def _list(self) -> str:
        """Take the complete list over; give its version."""
        limits = self._shared.limits
        query = {"limit": str(limits.page_size), **self._selector}
        entries: list[Entry[Value] | Problem] = []
        unseen: list[Key] = []
        intake = self._shared.intake
        left_s = math.inf if intake is None else _DECODED_S
        while True:
            body = await self._shared.api.get(self.resource.path, query, limits.request_timeout_s)
            # In a thread: the loop also serves the pods' queues.
            page = await asyncio.to_thread(_read_page, self.resource, body, self.table.entries, left_s)
            entries += page.entries
            left_s -= page.taken_s
            unseen += page.unseen
            del body
            if not page.rest:
                break
            query["continue"] = page.rest
        is_first, self.health.is_synced = not self.health.is_synced, True
        if intake is not None:
            intake.drop(self.table)
        if self.table.replace(entries) or is_first:
            self._shared.on_change()
        if intake is not None:
            for key in unseen:
                intake.check(self.table, key)
        return page.version

    async def _watch(self, version: str) -> None:
        shared = self._shared
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(int(_WATCH_S * (1 + shared.roll()))),
            **self._selector,
        }
        lines = shared.api.lines(self.resource.path, query, shared.limits.watch_silence_s)
        async with aclosing(lines):  # type: ignore[type-var]
            async for line in lines:
                self._heard()
                if line:
                    large = len(line) > _LARGE_BYTES
                    event = await asyncio.to_thread(_read_event, line) if large else _read_event(line)
                    self._take(self._apply(event, line))
                    self._failures = 0
                    await asyncio.sleep(0)  # Many lines may have come at once; packets come in between.

    def _apply(self, event: tuple[str, Mapping[str, Any]], line: bytes) -> bool:
        """Take one event over; tell whether it changed anything already. Raise ApiError if it does not go on."""
        kind, thing = event
        if kind == "ERROR":
            code = thing.get("code")
            raise ApiError(str(thing.get("message", "")), code if isinstance(code, int) else 0)
        metadata = thing.get("metadata")
        version = metadata.get("resourceVersion") if isinstance(metadata, Mapping) else None
        if kind == "BOOKMARK":
            is_changed = False
        elif (key := read_key(thing)) is not None and (intake := self._shared.intake) is not None:
            intake.put(self.table, key, None if kind == "DELETED" else line)
            is_changed = False
        elif kind == "DELETED":
            is_changed = key is not None and self.table.remove(key)
        else:
            is_changed = self.table.put(read_entry(self.resource, thing, self.table.entries))
        if isinstance(version, str) and version:
            self._version = version
        return is_changed

    def _take(self, is_changed: bool) -> None:
        if is_changed:
            self._shared.on_change()

    def take_namespace(self, namespace: str, entries: Iterable[Entry[Value] | Problem]) -> None:
        """Take over all objects of a namespace, which were asked for."""
        self._take(self.table.replace_namespace(namespace, entries))

    def add(self, manifest: Manifest) -> Entry[Value] | Problem:
        """Take over an object that was asked for by name, where the watch has not brought it yet."""
        entry = read_entry(self.resource, manifest, self.table.entries)
        self.take(entry)
        return entry

    def take(self, entry: Entry[Value] | Problem) -> None:
        """Take over one object that was asked for."""
        self._take(self.table.put(entry))


def is_older(version: str, than: str) -> bool:
    """Compare versions of one cluster (resourceVersion, since Kubernetes 1.35 comparable as numbers).

    What is no number is never older.
    """
    return version.isdecimal() and than.isdecimal() and int(version) < int(than)


def read_list(
    resource: Resource[Value], body: bytes, known: Mapping[Key, Entry[Value]]
) -> list[Entry[Value] | Problem]:
    """Read a list that is complete in one answer; raise ApiError if it is not."""
    page = _read_page(resource, body, known, math.inf)
    if page.rest:
        raise ApiError("a list is not complete")
    return page.entries


@dataclass(frozen=True, slots=True)
class _Page(Generic[Value]):
    entries: list[Entry[Value] | Problem]
    version: str
    rest: str
    """Token of the next page; empty after the last."""
    unseen: list[Key]
    """What was taken for good without being decoded."""
    taken_s: float


def _read_page(
    resource: Resource[Value], body: bytes, known: Mapping[Key, Entry[Value]], left_s: float
) -> _Page[Value]:
    """Read a page; after `left_s` seconds, what is kept as bytes is not decoded any more."""
    started = time.thread_time()
    entries: list[Entry[Value] | Problem] = []
    unseen: list[Key] = []
    try:
        for name, value in members(body.decode(), "items"):
            if name == "metadata":
                version, rest = str(value["resourceVersion"]), str(value.get("continue") or "")
            if name != "items":
                continue
            is_decoded = resource.store is None or time.thread_time() - started < left_s
            entry = read_entry(resource, value, known, is_decoded=is_decoded)
            entries.append(entry)
            if not is_decoded and isinstance(entry, Entry) and known.get(entry.key) is not entry:
                unseen.append(entry.key)
        return _Page(entries, version, rest, unseen, time.thread_time() - started)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UnboundLocalError) as err:
        raise ApiError(f"a list cannot be read: {err!r}") from err


def _read_event(line: bytes) -> tuple[str, Mapping[str, Any]]:
    try:
        event = json.loads(line)
        kind, thing = event["type"], event["object"]
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise ApiError(f"an event cannot be read: {err!r}", GONE) from err
    if not isinstance(kind, str) or not isinstance(thing, Mapping):
        raise ApiError("an event cannot be read: it has no object", GONE)
    return kind, thing
