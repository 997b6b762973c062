# SPDX-License-Identifier: Apache-2.0
"""Finds pods that were started without our plugin, and has them enforced.

Pods run before the plugin is installed, and start past it while a primary plugin has just rewritten its list. The
runtime's result cache names them and says where their namespaces are. What is there is compared with the pod's own
addresses, for a path can lead to another pod by now; and no other place is searched, for what has a pod's addresses
need not be of this node's network (a node of another cluster can run inside this one). Only additions are made: a cache
that lacks a pod says nothing about it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from cni_plugin.messages import MessageError
from cni_plugin.result import pair_ends
from enforcer_daemon.dataplane.addresses import interfaces
from enforcer_daemon.errors import EnforcerError
from enforcer_daemon.model import AttachmentId
from enforcer_daemon.nsfs import netns_id
from enforcer_daemon.registration.request import AddRequest
from enforcer_daemon.registration.results import CachedResult, decode_cached
from enforcer_daemon.telemetry.logs import Logger

MAX_RESULT_BYTES = 1024 * 1024
"""Of one file of the cache; real ones have a few kilobytes."""
MAX_RESULTS = 4096
"""Files that are looked at; as many as attachments that a node can have."""


class Discovering(Protocol):
    """Has an attachment enforced."""

    async def add(self, request: AddRequest, netns_fd: int) -> None:
        """Return once the pod is enforced. Owns the descriptor from the call on."""
        ...


@dataclass(frozen=True, slots=True)
class _Found:
    """A pod's namespace, and the path that led there."""

    path: str
    netns_fd: int


class Discovery:
    """Looks through the runtime's cache, at the start and again from time to time."""

    def __init__(
        self, directory: Path, registrar: Discovering, is_known: Callable[[AttachmentId], bool], log: Logger
    ) -> None:
        self._directory = directory
        self._registrar = registrar
        self._is_known = is_known
        self._log = log
        self._seen: frozenset[AttachmentId] = frozenset()
        self._registered: frozenset[AttachmentId] = frozenset()
        """Of the cache's: those that were known once. What is no longer known of these is being deleted."""
        self._unread: frozenset[str] = frozenset()
        self._reported: dict[str, str] = {}

    async def look(self, *, is_start: bool = False) -> int:
        """Enrol what is not enforced; return how many pods.

        Apart from the start a pod must have been there the time before as well: one that is just being deleted is in
        the cache for a moment longer.
        """
        missing = await asyncio.to_thread(self._missing)
        settled = missing if is_start else {key: found for key, found in missing.items() if key in self._seen}
        self._seen = frozenset(missing)
        if not settled:
            return 0
        located = await asyncio.to_thread(_locate, settled)
        discovered = 0
        for attachment, found in located.items():
            discovered += await self._discover(settled[attachment].request, found)
        return discovered

    async def _discover(self, request: AddRequest, found: _Found) -> int:
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
        self._log.warning("pod discovered that had started without the plugin", pod=str(request.pod))
        return 1

    def _missing(self) -> dict[AttachmentId, CachedResult]:
        missing, registered, unread = {}, set(), set()
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
            if cached is None:
                continue
            attachment = cached.request.attachment
            if attachment in self._registered or self._is_known(attachment):
                registered.add(attachment)
            elif cached.paths:
                missing[attachment] = cached
            else:
                self._report(path.name, f"{path}: does not say where the namespace of {cached.request.pod} is")
        self._unread, self._registered = frozenset(unread), frozenset(registered)
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
            self._log.error("pod not discovered", problem=problem)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_RESULT_BYTES + 1)
    if len(data) > MAX_RESULT_BYTES:
        raise MessageError(f"has more than {MAX_RESULT_BYTES} bytes")
    return data


def _locate(missing: Mapping[AttachmentId, CachedResult]) -> dict[AttachmentId, _Found]:
    """Find the namespaces by the paths that the cache has. One that leads nowhere is of a pod that is gone."""
    located = {}
    for attachment, cached in missing.items():
        found = next(filter(None, (_open(path, cached.request) for path in cached.paths)), None)
        if found is not None:
            located[attachment] = found
    return located


def _open(path: str, request: AddRequest) -> _Found | None:
    """Open a namespace if it is the pod's: its interface has the pod's addresses. None if it is not."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        netns_id(descriptor)
        addresses = {interface.name: interface.addresses for interface in interfaces(descriptor)}
    except EnforcerError:  # no network namespace, or gone while it was looked at
        addresses = {}
    except BaseException:
        os.close(descriptor)
        raise
    if set(request.ips) <= set(addresses.get(request.attachment.ifname, ())):
        return _Found(path, descriptor)
    os.close(descriptor)
    return None
