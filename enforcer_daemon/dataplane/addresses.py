# SPDX-License-Identifier: Apache-2.0
"""Interfaces and their addresses, read from the kernel: a pod's own, and all that are local to the node.

The node's addresses are read from the interfaces because kubelet reaches a pod from the bridge's or the veth's address,
which no Kubernetes object states. Source: rtnetlink(7).
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Iterator

from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.dataplane.rtnetlink import Interface, RouteReader, address_changes, read_routes
from enforcer_daemon.errors import NetnsError
from enforcer_daemon.model import IPAddress

_RECEIVE_BYTES = 65_536
_SETTLE_S = 0.05  # changes come in bursts, as when an interface goes up

NOT_THE_NODES = ("kube-ipvs0", "nodelocaldns")
"""Interfaces whose addresses are Services': kube-proxy's IPVS mode and the DNS cache put them there. No process of the
node speaks to a pod from them."""


def interfaces(netns_fd: int) -> tuple[Interface, ...]:
    """Return all interfaces of a namespace."""
    return open_in(netns_fd, lambda: read_routes(RouteReader.interfaces))


def interface(netns_fd: int, name: str) -> Interface:
    """Return the interface of that name; raise NetnsError if there is none."""
    found = open_in(netns_fd, lambda: read_routes(lambda reader: reader.interface(name)))
    if found is None:
        raise NetnsError(f"interface {name}: not in the pod's network namespace")
    return found


def node_addresses() -> frozenset[IPAddress]:
    """Return the addresses that are local in the current namespace and that a pod can see as a source.

    Not among them are 127.0.0.0/8 and ::1, those of Services (NOT_THE_NODES), and the link-local ones of veths: the
    port of a bridge speaks for nobody, the link of an uplink ends at the node, and towards a pod's own veth the node
    takes an address of wider scope (RFC 6724, rule 2). They come and go with each pod, and every change is told to the
    rules of all pods.
    """
    return frozenset(read_routes(lambda reader: list(_node_addresses(reader))))


def _node_addresses(reader: RouteReader) -> Iterator[IPAddress]:
    """Yield the addresses. Most interfaces are pods' veths, so of these only the few with wider addresses are read."""
    others = {interface.index: interface for interface in reader.links_but("veth")}
    for index, addresses in reader.addresses().items():
        found = [
            address
            for address in addresses
            if not (address.is_loopback or (address.is_link_local and index not in others))
        ]
        interface = (others.get(index) or reader.link(index)) if found else None
        if interface is not None and interface.name not in NOT_THE_NODES:
            yield from found


async def watch_addresses() -> AsyncIterator[frozenset[IPAddress]]:
    """Yield the node's addresses at once, and again whenever they have changed.

    A thread reads them, which takes some ten milliseconds with hundreds of interfaces.
    """
    loop = asyncio.get_running_loop()
    with address_changes() as changes:
        known = await asyncio.to_thread(node_addresses)  # After the subscription, so that no change falls between.
        yield known
        while True:
            await _wait_for_change(loop, changes)
            current = await asyncio.to_thread(node_addresses)
            if current != known:
                known = current
                yield known


async def _wait_for_change(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    """Return soon after a message; what it says does not matter, so lost ones (ENOBUFS) count as one."""
    try:
        await loop.sock_recv(sock, _RECEIVE_BYTES)
    except OSError as err:
        if err.errno != errno.ENOBUFS:
            raise
    await asyncio.sleep(_SETTLE_S)
    while True:
        try:
            sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as err:
            if err.errno != errno.ENOBUFS:
                raise
