# SPDX-License-Identifier: Apache-2.0
"""Closes the endpoints whose interface something takes from the pod's IP stack, and opens them when it is gone.

A closed endpoint lets nothing in or out: its rules would see nothing of what passes. It is closed at both ends of its
links, since a pod that makes such interfaces can also undo what stands in its own namespace.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable

from enforcer_daemon.daemon.endpoint import Endpoint
from enforcer_daemon.dataplane.addresses import interfaces
from enforcer_daemon.dataplane.takeover import (
    are_closed,
    close_links,
    find_takeover,
    link_changes,
    open_links,
    read_departures,
)
from enforcer_daemon.errors import DataplaneError, NetnsError
from enforcer_daemon.model import NetnsId
from enforcer_daemon.telemetry.logs import Logger
from enforcer_daemon.telemetry.metrics import Metrics

_EVERY_S = 0.5
"""How often to look at endpoints that went or failed, seconds; a change of links is noticed at once."""


class Takeovers:
    """Watches the links in the namespaces of all endpoints. For the event loop's thread alone."""

    def __init__(self, endpoints: Callable[[], Iterable[Endpoint]], log: Logger, metrics: Metrics) -> None:
        self._endpoints = endpoints
        self._log = log
        self._metrics = metrics
        self._watched: dict[NetnsId, socket.socket] = {}
        self._changed: set[NetnsId] = set()
        self._left: dict[NetnsId, str] = {}
        """What is on top of an interface still, but cannot be seen any longer."""
        self._woken = asyncio.Event()
        self._looking = asyncio.Lock()

    async def run(self) -> None:
        """Follow the links for good."""
        try:
            while True:
                await self.look()
                try:
                    await asyncio.wait_for(self._woken.wait(), _EVERY_S)
                except TimeoutError:
                    continue
        finally:
            for netns in list(self._watched):
                self._leave(netns)

    async def look(self) -> None:
        """Look at the endpoints that are new, or whose links changed. Call it before a new pod may run."""
        async with self._looking:
            await self._look()

    async def _look(self) -> None:
        self._woken.clear()
        present = {endpoint.sandbox.netns: endpoint for endpoint in self._endpoints() if endpoint.is_open}
        for netns in self._watched.keys() - present.keys():
            self._leave(netns)
            self._left.pop(netns, None)
        for netns, endpoint in present.items():
            if netns in self._watched and netns not in self._changed:
                continue
            self._changed.discard(netns)
            try:
                await self._watch(netns, endpoint)
                await self._decide(endpoint)
            except (DataplaneError, NetnsError, OSError) as err:
                self._changed.add(netns)
                self._log.error("links not followed, will try again", pod=str(endpoint.identity.pod), error=str(err))
        self._metrics.closed_endpoints.set(sum(bool(endpoint.closed) for endpoint in present.values()))

    async def _watch(self, netns: NetnsId, endpoint: Endpoint) -> None:
        if netns in self._watched:
            return
        if not endpoint.closed and await asyncio.to_thread(_is_closed, endpoint):
            self._left[netns] = "closed by an earlier daemon, and what it saw may be in another namespace now"
        # Before the first look, so that no change falls between.
        changes = self._watched[netns] = link_changes(endpoint.sandbox.netns_fd)
        asyncio.get_running_loop().add_reader(changes.fileno(), self._note, netns)

    def _note(self, netns: NetnsId) -> None:
        try:
            for left in read_departures(self._watched[netns]):
                self._left.setdefault(netns, f"{left} was on top of an interface, and is in another namespace now")
        except (DataplaneError, OSError) as err:
            self._log.error("links not followed, will try again", error=str(err))
            self._leave(netns)
        self._changed.add(netns)
        self._woken.set()

    def _leave(self, netns: NetnsId) -> None:
        changes = self._watched.pop(netns)
        asyncio.get_running_loop().remove_reader(changes.fileno())
        changes.close()
        self._changed.discard(netns)

    async def _decide(self, endpoint: Endpoint) -> None:
        """Close or open an endpoint.

        One that an earlier daemon closed stays closed: whether what it saw is still there, nobody can tell.
        """
        sandbox = endpoint.sandbox
        found = find_takeover(await asyncio.to_thread(interfaces, sandbox.netns_fd), sandbox.ifnames)
        found = found or self._left.get(sandbox.netns, "")
        if found == endpoint.closed:
            return
        await asyncio.to_thread(_close if found else _open, endpoint)
        endpoint.closed = found
        pod = str(endpoint.identity.pod)
        if found:
            self._log.error("endpoint closed: its rules do not see its packets", pod=pod, why=found)
        else:
            self._log.info("endpoint open again", pod=pod)


def _is_closed(endpoint: Endpoint) -> bool:
    sandbox = endpoint.sandbox
    return are_closed(sandbox.netns_fd, sandbox.ifnames) or are_closed(None, sandbox.links.names)


def _close(endpoint: Endpoint) -> None:
    """Close both ends of each link that is there; one end is enough."""
    sandbox = endpoint.sandbox
    present = {each.name for each in interfaces(sandbox.netns_fd)}
    problems: list[DataplaneError] = []
    inside = [name for name in sandbox.ifnames if name in present]
    ends = ((sandbox.netns_fd, inside), (None, list(sandbox.links.names)))
    for netns_fd, names in ends:
        try:
            if names:
                close_links(netns_fd, names)
        except DataplaneError as err:
            problems.append(err)
    if len(problems) == len(ends):
        raise problems[0]


def _open(endpoint: Endpoint) -> None:
    sandbox = endpoint.sandbox
    open_links(sandbox.netns_fd, sandbox.ifnames)
    open_links(None, sandbox.links.names)
