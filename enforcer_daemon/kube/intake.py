# SPDX-License-Identifier: Apache-2.0
"""Objects that a watch brought and that wait to be decoded: each namespace by itself, the last version of each object.

They wait as the bytes that came, one version each, so what waits is no larger than what the API server stores.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from enforcer_daemon.kube.resources import Manifest
from enforcer_daemon.kube.table import Entry, Key, Table, read_entry
from enforcer_daemon.sources.manifests import Problem
from enforcer_daemon.sources.turns import Turns

_Name = tuple[str, Key]
_Version = tuple[Table[Any], bytes | None]
_Waiting = dict[_Name, _Version]
_Item = tuple[_Name, _Version]
_BATCH_BYTES = 32_768
"""What is decoded in one go, some 30 ms at worst; each go ends in a change that endpoints follow."""


class Intake:
    """Brings objects into their tables. For the event loop's thread alone."""

    def __init__(self, turns: Turns, on_change: Callable[[], None]) -> None:
        self._turns = turns
        self._on_change = on_change
        self._waiting: dict[str, _Waiting] = {}
        self._serving: dict[str, asyncio.Task[None]] = {}
        self._reading: dict[str, frozenset[tuple[str, Key]]] = {}
        """What is being decoded, by namespace."""
        self._taken = asyncio.Event()
        """Set for a moment after each batch."""
        self._failure: BaseException | None = None
        self._has_failed = asyncio.Event()
        self._lists: dict[str, int] = {}
        """How often each kind was listed: what a watch brought before counts for nothing after."""

    def put(self, table: Table[Any], key: Key, line: bytes | None) -> None:
        """Take an event's object, in place of an earlier one that waits; None: it was deleted."""
        namespace = key[0]
        waiting = self._waiting.setdefault(namespace, {})
        waiting[table.resource.plural, key] = table, line
        if namespace not in self._serving:
            task = asyncio.get_running_loop().create_task(self._serve(namespace), name=f"objects of {namespace}")
            self._serving[namespace] = task
            task.add_done_callback(self._end)

    def check(self, table: Table[Any], key: Key) -> None:
        """Decode an object that is in its table as bytes alone, to tell what is wrong with it."""
        if (table.resource.plural, key) not in self._waiting.get(key[0], ()):
            self.put(table, key, b"")

    def drop(self, table: Table[Any]) -> None:
        """Forget what waits of a kind: all of it was listed."""
        plural = table.resource.plural
        self._lists[plural] = self._lists.get(plural, 0) + 1
        for waiting in self._waiting.values():
            for name in [name for name in waiting if name[0] == plural]:
                del waiting[name]

    async def until_taken(self, table: Table[Any], namespace: str, name: str | None = None) -> None:
        """Wait until an object of a kind that has come is in its table; None: all of the namespace."""
        while self._is_pending(table.resource.plural, namespace, name):
            await self._taken.wait()

    def _is_pending(self, plural: str, namespace: str, name: str | None) -> bool:
        known = (*self._waiting.get(namespace, ()), *self._reading.get(namespace, ()))
        return any(found == plural and name in (None, key[1]) for found, key in known)

    async def _serve(self, namespace: str) -> None:
        waiting = self._waiting[namespace]
        while waiting:
            batch = self._take(waiting)
            listed = dict(self._lists)
            self._reading[namespace] = frozenset(name for name, _ in batch)
            found = await self._turns.run(namespace, partial(_read_all, batch))
            is_changed = False
            for ((plural, key), (table, _)), entry in zip(batch, found, strict=True):
                if listed.get(plural) != self._lists.get(plural):
                    continue  # A list came meanwhile: what was read is older.
                is_changed |= table.remove(key) if entry is None else table.put(entry)
            if is_changed:
                self._on_change()
            self._reading[namespace] = frozenset()
            self._taken.set()
            self._taken.clear()
        # In one step with the last look, so that what comes next finds no server that has ended.
        del self._waiting[namespace], self._serving[namespace], self._reading[namespace]

    @staticmethod
    def _take(waiting: _Waiting) -> list[_Item]:
        """Take as many of what waits as are read in one go."""
        batch: list[_Item] = []
        left = _BATCH_BYTES
        while waiting and left > 0:
            name = next(iter(waiting))
            table, line = waiting.pop(name)
            batch.append((name, (table, line)))
            checked = table.entries.get(name[1]) if line == b"" else None
            left -= len(line or b"") if checked is None else len(checked.document)
        return batch

    def _end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._failure = failure
            self._has_failed.set()

    async def run(self) -> None:
        """Wait until cancelled, or raise what went wrong with an object."""
        await self._has_failed.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Stop; what waits is listed by the next daemon."""
        for task in self._serving.values():
            task.cancel()


def _read_all(batch: list[_Item]) -> list[Entry[Any] | Problem | None]:
    return [None if line is None else _read(table, key, line) for (_, key), (table, line) in batch]


def _read(table: Table[Any], key: Key, line: bytes) -> Entry[Any] | Problem | None:
    if line:
        manifest: Manifest = json.loads(line)["object"]
        return read_entry(table.resource, manifest, table.entries)
    entry = table.entries.get(key)  # To be checked; it may be gone.
    return None if entry is None else table.checked(entry)
