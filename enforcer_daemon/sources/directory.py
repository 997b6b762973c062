# SPDX-License-Identifier: Apache-2.0
"""Policies, namespaces and pods from a directory of manifests, watched for change.

An object that Kubernetes would refuse is refused as a whole, and its last good version stays in force; so do all
objects of a file that cannot be read or parsed. Removing an object, or its file, removes it. What is in force is kept
on disk too where a place for it is given, so that a restart does not open what a bad object closed before.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

from enforcer_daemon.sources.inotify import DirectoryWatch
from enforcer_daemon.sources.lastgood import LastGood
from enforcer_daemon.sources.manifests import (
    ClusterState,
    KubernetesObject,
    ManifestFile,
    ObjectKey,
    Problem,
    assemble,
    decode_file,
    load_bytes,
    manifest_entries,
    unique_objects,
    unreadable,
)

RECHECK_S = 1.0
"""How often it is seen to that the directory is the same one, and that no link leads to a changed file, seconds. Also
how often all files are compared where the kernel reports no changes (no inotify left)."""
COMPARE_EVERY = 10
"""At how many of these times all files are compared none the less: a network file system reports only own changes."""

KEEP_AFTER_S = 0.1
"""How long no change may follow before what is in force is kept on disk, seconds: to write it takes the interpreter for
some milliseconds, which the next change or a new connection would wait for."""
MAX_UNKEPT_S = 1.0
"""How long it is not kept if changes follow one another without end, seconds."""
SETTLED_NS = 1_000_000_000
"""A file whose times are this much older than its last reading cannot have changed since within the clock's grain."""

_NAMED = 3
"""Objects that are named in a problem of their file."""

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

    def __init__(self, directory: Path, last_good: Path | None = None) -> None:
        """Keep the last good versions in `last_good`, a directory of the source's own, where it is given."""
        self._directory = directory
        self._last_good = None if last_good is None else LastGood(last_good, directory)
        self._decoded: dict[str, _Decoded] = {}
        self._seen: dict[str, _Stamp | None] | None = None
        self._links: list[Path] = []
        self._unsaved: list[Problem] = []
        """What is wrong with the last good versions on disk."""
        self._good: dict[ObjectKey, tuple[str, KubernetesObject]] = {}
        if self._last_good is not None:
            self._good, self._unsaved = self._last_good.load()
        self._restored = self._good
        """What is in force because an earlier daemon kept it."""

    def read(self) -> ClusterState:
        """Read all files; those that did not change are not decoded again. Not for two threads at once."""
        try:
            stamps = self._seen = self._stamps()
        except OSError as err:
            self._seen = None
            problem = Problem(str(self._directory), 0, "", "", f"cannot be read: {err.strerror or err}")
            return self._state([problem])
        files = [self._read_file(name, stamp) for name, stamp in stamps.items()]
        self._decoded = {file.name: self._decoded[file.name] for file in files if file.name in self._decoded}
        found, problems = unique_objects(files)
        for key, kept in self._good.items():
            if key not in found and _is_kept(key, kept[0], files):
                found[key] = kept
        self._good = dict(sorted(found.items(), key=lambda pair: pair[0]))
        self._restored = {key: kept for key, kept in self._restored.items() if self._good.get(key) is kept}
        return self._state(problems)

    def keep(self) -> bool:
        """Keep on disk what is in force; tell whether the state's problems are other ones now."""
        if self._last_good is None:
            return False
        contents = {name: decoded.content for name, decoded in self._decoded.items()}
        before, self._unsaved = self._unsaved, self._last_good.keep(self._good, contents)
        return self._unsaved != before

    def _state(self, problems: list[Problem]) -> ClusterState:
        told = [*(self._reported(problem) for problem in problems), *self._unsaved]
        return assemble((found for _, found in self._good.values()), told)

    def _reported(self, problem: Problem) -> Problem:
        """Return whether something is in force instead of what is wrong, and what only because a daemon kept it."""
        problem = replace(problem, has_earlier=self._has_earlier(problem))
        names = [
            str(key)
            for key, (file_name, _) in self._restored.items()
            if problem.object == str(key) or (not problem.object and problem.file in (file_name, str(self._directory)))
        ]
        if not names:
            return problem
        rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        message = f"{problem.message}; in force as before the restart: {', '.join(names[:_NAMED])}{rest}"
        return replace(problem, message=message)

    def _has_earlier(self, problem: Problem) -> bool:
        if problem.object:
            return any(problem.object == str(key) for key in self._good)
        return any(problem.file in (name, str(self._directory)) for name, _ in self._good.values())

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

    async def watch(self) -> AsyncIterator[ClusterState]:
        """Yield the state at once, and again after each change of it."""
        state = await asyncio.to_thread(self.read)
        yield state
        async with aclosing(self._changes()) as changes:
            is_changed = await asyncio.to_thread(self.keep)
            kept_at, is_due = time.monotonic(), False
            while True:
                following = asyncio.ensure_future(anext(changes))
                try:
                    # What is in force is kept when no change follows: neither policy nor the next change waits for it.
                    if is_due and not await _is_done(following, kept_at + MAX_UNKEPT_S - time.monotonic()):
                        is_changed |= await asyncio.to_thread(self.keep)
                        kept_at, is_due = time.monotonic(), False
                    await following
                finally:
                    await _cancelled(following)
                newer = await asyncio.to_thread(self.read)
                if newer != state or is_changed:
                    state, is_changed = newer, False
                    kept_at, is_due = (kept_at if is_due else time.monotonic()), True
                    yield state

    async def _changes(self) -> AsyncGenerator[None, None]:
        """Stop at each moment at which the files may have changed, and once at the beginning."""
        while True:
            place = self._place()
            try:
                watch = DirectoryWatch(self._directory)
            except OSError:
                # Not there, or not to be watched: no inotify instance or watch is left.
                if await asyncio.to_thread(self._is_stale):
                    yield
                await asyncio.sleep(RECHECK_S)
                continue
            with watch:
                yield  # What changed before the watch was in place.
                async with aclosing(self._rounds(watch, place)) as rounds:
                    async for _ in rounds:
                        yield

    async def _rounds(self, watch: DirectoryWatch, place: tuple[int, int] | None) -> AsyncGenerator[None, None]:
        """Stop at each change until the directory is replaced: what is watched is then the old one."""
        count = 0
        while self._place() == place:
            count += 1
            is_changed = await watch.wait(RECHECK_S) or self._is_link_stale()
            if not is_changed and count % COMPARE_EVERY == 0:
                is_changed = await asyncio.to_thread(self._is_stale)
            if is_changed:
                yield

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

    def _is_link_stale(self) -> bool:
        """Return whether a link leads to something else: its target may lie where nothing is watched."""
        return any(self._seen is not None and _stamp(path) != self._seen.get(str(path)) for path in self._links)

    def _stamps(self) -> dict[str, _Stamp | None]:
        entries = manifest_entries(self._directory)
        self._links = [Path(entry.path) for entry in entries if entry.is_symlink()]
        return {entry.path: _stamp(entry) for entry in entries}


async def _is_done(following: asyncio.Future[None], left_s: float) -> bool:
    """Return whether a change follows soon; not once what is in force has waited for too long."""
    done, _ = await asyncio.wait({following}, timeout=max(0.0, min(KEEP_AFTER_S, left_s)))
    return bool(done) and left_s > 0


async def _cancelled(following: asyncio.Future[None]) -> None:
    if not following.done():
        following.cancel()
        await asyncio.wait({following})


def _stamp(entry: os.DirEntry[str] | Path) -> _Stamp | None:
    try:
        status = entry.stat()
    except OSError:
        return None  # a dangling link, or a file that went away this moment; reading it tells
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_kept(key: ObjectKey, file_name: str, files: list[ManifestFile]) -> bool:
    """Return whether an object that is not found now may still be meant to be there."""
    for file in files:
        if file.name == file_name and file.problem is not None:
            return True
        for entry in file.entries:
            if entry.object is None and (entry.key == key or (entry.key is None and file.name == file_name)):
                return True
    return False
