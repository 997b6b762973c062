# SPDX-License-Identifier: Apache-2.0
"""Finds pods that were started without our plugin, and has them enforced.

Pods run before the plugin is installed, and start past it while a primary plugin has just rewritten its list. The
runtime's result cache names them; where their namespace is, the cache, the runtime's mounts or their processes say.
What is found is compared with the pod's own interface, for a path can lead to another pod by now. Only additions are
made: a cache that lacks a pod says nothing about it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from cni_plugin.messages import MessageError
from cni_plugin.result import pair_ends
from enforcer_daemon.dataplane.addresses import interfaces
from enforcer_daemon.dataplane.netns import netns_id
from enforcer_daemon.errors import EnforcerError
from enforcer_daemon.model import AttachmentId, NetnsId
from enforcer_daemon.registration.request import AddRequest
from enforcer_daemon.registration.results import CachedResult, decode_cached
from enforcer_daemon.telemetry.logs import Logger

MAX_RESULT_BYTES = 1024 * 1024
"""Of one file of the cache; real ones have a few kilobytes."""
MAX_RESULTS = 4096
"""Files that are looked at; as many as attachments that a node can have."""
_MOUNTS = Path("/run/netns")
_PROCESSES = Path("/proc")


class Enrolling(Protocol):
    """Has an attachment enforced."""

    async def add(self, request: AddRequest, netns_fd: int) -> None:
        """Return once the pod is enforced. Owns the descriptor from the call on."""
        ...


@dataclass(frozen=True, slots=True)
class _Found:
    """A pod's namespace, and the path that led there."""

    path: str
    netns_fd: int


class Enrolment:
    """Looks through the runtime's cache, at the start and again from time to time."""

    def __init__(
        self, directory: Path, registrar: Enrolling, is_known: Callable[[AttachmentId], bool], log: Logger
    ) -> None:
        self._directory = directory
        self._registrar = registrar
        self._is_known = is_known
        self._log = log
        self._seen: frozenset[AttachmentId] = frozenset()
        self._unread: frozenset[str] = frozenset()
        self._reported: dict[str, str] = {}

    async def look(self, *, is_start: bool = False) -> int:
        """Enrol what is not enforced; return how many pods.

        Apart from the start a pod must have been there the time before as well: one that is just being deleted is not
        ours any more, and still in the cache for a moment.
        """
        missing = await asyncio.to_thread(self._missing)
        settled = missing if is_start else {key: found for key, found in missing.items() if key in self._seen}
        self._seen = frozenset(missing)
        if not settled:
            return 0
        located = await asyncio.to_thread(_locate, settled)
        enrolled = 0
        for attachment, found in located.items():
            enrolled += await self._enrol(settled[attachment].request, found)
        return enrolled

    async def _enrol(self, request: AddRequest, found: _Found) -> int:
        host_interfaces = pair_ends(request.host_interfaces)
        request = replace(request, netns_path=found.path, host_interfaces=host_interfaces)
        if self._is_known(request.attachment):  # its ADD came in the meantime
            os.close(found.netns_fd)
            return 0
        try:
            await self._registrar.add(request, found.netns_fd)
        except EnforcerError as err:
            self._report(str(request.attachment), f"{request.pod}: {err}")
            return 0
        self._log.warning("pod enrolled that had started without the plugin", pod=str(request.pod))
        return 1

    def _missing(self) -> dict[AttachmentId, CachedResult]:
        missing, unread = {}, set()
        for path in self._files():
            try:
                cached = decode_cached(_read(path))
            except FileNotFoundError:
                continue
            except (OSError, MessageError) as err:
                unread.add(path.name)
                if path.name in self._unread:  # else it may be half written: libcni does not rename
                    self._report(path.name, f"{path}: {err}")
                continue
            if cached is not None and not self._is_known(cached.request.attachment):
                missing[cached.request.attachment] = cached
        self._unread = frozenset(unread)
        return missing

    def _files(self) -> list[Path]:
        try:
            paths = sorted(path for path in self._directory.iterdir() if path.is_file())
        except FileNotFoundError:
            return []  # no pod has been started yet
        except OSError as err:
            self._report(str(self._directory), f"{self._directory}: {err.strerror}")
            return []
        if len(paths) > MAX_RESULTS:
            self._report("", f"{self._directory}: has {len(paths)} files, of which {MAX_RESULTS} are looked at")
        return paths[:MAX_RESULTS]

    def _report(self, subject: str, problem: str) -> None:
        """Log a problem once for as long as it is the same."""
        if self._reported.get(subject) != problem:
            if len(self._reported) >= MAX_RESULTS:
                self._reported.clear()
            self._reported[subject] = problem
            self._log.error("pod not enrolled", problem=problem)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_RESULT_BYTES + 1)
    if len(data) > MAX_RESULT_BYTES:
        raise MessageError(f"has more than {MAX_RESULT_BYTES} bytes")
    return data


def _locate(missing: Mapping[AttachmentId, CachedResult]) -> dict[AttachmentId, _Found]:
    """Find the namespaces: by the paths that the cache has, else by looking into every namespace of the node."""
    located: dict[AttachmentId, _Found] = {}
    for attachment, cached in missing.items():
        found = next(filter(None, (_open(path, [cached]) for path in cached.paths)), None)
        if found is not None:
            located[attachment] = found[1]
    searched = {key: cached for key, cached in missing.items() if key not in located and not cached.paths}
    if not searched:
        return located
    for path in _namespaces():
        if match := _open(path, [cached for key, cached in searched.items() if key not in located]):
            located[match[0].request.attachment] = match[1]
    return located


def _namespaces() -> Iterator[str]:
    """Give a path to each namespace of the node, once: the runtime's mounts first, since processes come and go."""
    seen: set[NetnsId] = set()
    for path in (*sorted(_MOUNTS.glob("*")), *_PROCESSES.glob("[0-9]*/ns/net")):
        try:
            stat = path.stat()
        except OSError:  # gone, or another user's process
            continue
        netns = NetnsId(stat.st_dev, stat.st_ino)
        if netns not in seen:
            seen.add(netns)
            yield str(path)


def _open(path: str, candidates: list[CachedResult]) -> tuple[CachedResult, _Found] | None:
    """Open a namespace if it is that of one of the candidates; None where it is nobody's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        netns_id(descriptor)
        addresses = {interface.name: set(interface.addresses) for interface in interfaces(descriptor)}
    except EnforcerError:  # no network namespace, or gone while it was looked at
        addresses = {}
    except BaseException:
        os.close(descriptor)
        raise
    for cached in candidates:
        request = cached.request
        if set(request.ips) <= addresses.get(request.attachment.ifname, set()):
            return cached, _Found(path, descriptor)
    os.close(descriptor)
    return None
