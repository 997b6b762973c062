# SPDX-License-Identifier: Apache-2.0
"""Policies, namespaces and pods from a directory of manifests, watched for change.

An object that Kubernetes would refuse is refused as a whole, and its last good version stays in force; so do all
objects of a file that cannot be read or parsed. Removing an object, or its file, removes it. What is kept is kept in
memory only: after a restart a bad object has no good version.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from watchfiles import awatch
from watchfiles._rust_notify import WatchfilesRustInternalError

from enforcer_daemon.sources.manifests import (
    KubernetesObject,
    ManifestFile,
    ObjectKey,
    Problem,
    World,
    assemble,
    decode_file,
    load_bytes,
    manifest_entries,
    unique_objects,
    unreadable,
)

DEBOUNCE_MS = 20
"""How long changes are gathered after the first, milliseconds."""
STEP_MS = 5
"""After how long without a further change the gathered ones count, milliseconds."""
RECHECK_MS = 1_000
"""How often the files' times are compared although nothing was reported: a link's target may lie elsewhere."""
POLL_MS = 200
"""How often files are compared where the kernel reports no changes (no inotify left, or a foreign file system)."""

SETTLED_NS = 1_000_000_000
"""A file whose times are this much older than its last reading cannot have changed since within the clock's grain."""

_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A file as it was last read."""

    stamp: _Stamp | None
    read_at_ns: int
    content: bytes
    file: ManifestFile

    def is_current(self, stamp: _Stamp | None) -> bool:
        return stamp is not None and stamp == self.stamp and max(stamp[2:]) < self.read_at_ns - SETTLED_NS


class DirectorySource:
    """A directory of *.yaml, *.yml and *.json, not below it; ConfigMap volumes too."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._decoded: dict[str, _Decoded] = {}
        self._good: dict[ObjectKey, tuple[str, KubernetesObject]] = {}
        self._seen: dict[str, _Stamp | None] | None = None

    def read(self) -> World:
        """Read all files; those that did not change are not decoded again. Not for two threads at once."""
        try:
            stamps = self._seen = self._stamps()
        except OSError as err:
            self._seen = None
            problem = Problem(str(self._directory), 0, "", "", f"cannot be read: {err.strerror or err}")
            return self._world([problem])
        files = [self._read_file(name, stamp) for name, stamp in stamps.items()]
        self._decoded = {file.name: self._decoded[file.name] for file in files if file.name in self._decoded}
        found, problems = unique_objects(files)
        for key, (file_name, kept) in self._good.items():
            if key not in found and _is_kept(key, file_name, files):
                found[key] = (file_name, kept)
        self._good = dict(sorted(found.items(), key=lambda pair: pair[0]))
        return self._world(problems)

    def _world(self, problems: list[Problem]) -> World:
        return assemble((found for _, found in self._good.values()), problems)

    def _read_file(self, name: str, stamp: _Stamp | None) -> ManifestFile:
        before = self._decoded.get(name)
        if before is not None and before.is_current(stamp):
            return before.file
        read_at_ns = time.time_ns()
        try:
            content = load_bytes(Path(name))
        except OSError as err:
            return unreadable(name, err)
        is_same = before is not None and content == before.content
        file = before.file if before is not None and is_same else decode_file(name, content)
        self._decoded[name] = _Decoded(stamp, read_at_ns, content, file)
        return file

    async def watch(self) -> AsyncIterator[World]:
        """Give the world at once, and again after each change of it."""
        world = await asyncio.to_thread(self.read)
        yield world
        async with aclosing(self._changes()) as changes:
            async for _ in changes:
                newer = await asyncio.to_thread(self.read)
                if newer != world:
                    world = newer
                    yield world

    async def _changes(self) -> AsyncGenerator[None, None]:
        is_polled = False
        while True:
            place = self._place()
            try:
                async with aclosing(self._events(is_polled=is_polled)) as events:
                    async for changes in events:
                        if changes or self._is_stale():
                            yield
                        if self._place() != place:
                            break  # the directory was replaced: what is watched is the old one
            except FileNotFoundError:
                await asyncio.sleep(RECHECK_MS / 1_000)
                yield
            except (OSError, WatchfilesRustInternalError):
                # No more inotify instances or watches, or a file system without them.
                if is_polled:
                    await asyncio.sleep(RECHECK_MS / 1_000)
                is_polled = True
                yield

    def _events(self, *, is_polled: bool) -> AsyncGenerator[set[object], None]:
        return awatch(  # type: ignore[return-value]
            self._directory,
            watch_filter=None,
            debounce=DEBOUNCE_MS,
            step=STEP_MS,
            rust_timeout=RECHECK_MS,
            yield_on_timeout=True,
            recursive=False,
            force_polling=is_polled,
            poll_delay_ms=POLL_MS,
        )

    def _place(self) -> tuple[int, int] | None:
        try:
            status = self._directory.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _is_stale(self) -> bool:
        try:
            return self._stamps() != self._seen
        except OSError:
            return self._seen is not None

    def _stamps(self) -> dict[str, _Stamp | None]:
        return {entry.path: _stamp(entry) for entry in manifest_entries(self._directory)}


def _stamp(entry: os.DirEntry[str]) -> _Stamp | None:
    try:
        status = entry.stat()
    except OSError:
        return None  # a dangling link, or a file that went away this moment; reading it tells
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_kept(key: ObjectKey, file_name: str, files: list[ManifestFile]) -> bool:
    """Tell whether an object that is not found now may still be meant to be there."""
    for file in files:
        if file.name == file_name and file.problem is not None:
            return True
        for entry in file.entries:
            if entry.object is None and (entry.key == key or (entry.key is None and file.name == file_name)):
                return True
    return False
