# SPDX-License-Identifier: Apache-2.0
"""Interfaces and their addresses, read from the kernel: a pod's own, and all that are local to the node.

The node's addresses are read from the interfaces because kubelet reaches a pod from the bridge's or the veth's address,
which no Kubernetes object states. Source: rtnetlink(7).
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import struct
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

from enforcer_daemon.dataplane.netlink import NETLINK_ROUTE, ask, decode_attributes, dump, open_netlink
from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.errors import NetnsError
from enforcer_daemon.model import IPAddress

_RTM_GETLINK, _RTM_GETADDR = 18, 22
_RTMGRP_IPV4_IFADDR, _RTMGRP_IPV6_IFADDR = 0x10, 0x100
_IFADDRMSG = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_IFINFOMSG = struct.Struct("=BxHiII")  # family, type, index, flags, change
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER, _IFLA_LINKINFO = 1, 3, 4, 5, 10, 18
_IFLA_INFO_KIND = 1
_SETTLE_S = 0.05  # changes come in bursts, as when an interface goes up

NOT_THE_NODES = ("kube-ipvs0", "nodelocaldns")
"""Interfaces whose addresses are Services': kube-proxy's IPVS mode and the DNS cache put them there. No process of the
node speaks to a pod from them."""


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface inside a network namespace."""

    name: str
    index: int
    mtu: int
    """Largest IP packet, bytes."""
    addresses: tuple[IPAddress, ...]
    mac: bytes = b""
    kind: str = ""
    """The driver's name, as veth; empty for physical ones."""
    peer: int = 0
    """Index of the other end in its own namespace (or of what this one stands on); 0: it stands alone."""
    master: int = 0
    """Index of the bridge that this is a port of; 0: none."""


def interfaces(netns_fd: int) -> tuple[Interface, ...]:
    """Return all interfaces of a namespace."""
    return open_in(netns_fd, _read_interfaces)


def own_interfaces() -> tuple[Interface, ...]:
    """Return all interfaces of the current namespace."""
    return _read_interfaces()


def interface(netns_fd: int, name: str) -> Interface:
    """Return the interface of that name; raise NetnsError if there is none."""
    for candidate in interfaces(netns_fd):
        if candidate.name == name:
            return candidate
    raise NetnsError(f"interface {name}: not in the pod's network namespace")


def node_addresses() -> frozenset[IPAddress]:
    """Return the addresses that are local in the current namespace and that a pod can see as a source.

    Not among them are 127.0.0.0/8 and ::1, those of Services (NOT_THE_NODES), and the link-local ones of veths: the
    port of a bridge speaks for nobody, the link of an uplink ends at the node, and towards a pod's own veth the node
    takes an address of wider scope (RFC 6724, rule 2). They come and go with each pod, and every change is told to the
    rules of all pods.
    """
    return frozenset(
        address
        for interface in _read_interfaces()
        if interface.name not in NOT_THE_NODES
        for address in interface.addresses
        if not (address.is_loopback or (address.is_link_local and interface.kind == "veth"))
    )


async def watch_addresses() -> AsyncIterator[frozenset[IPAddress]]:
    """Yield the node's addresses at once, and again whenever they have changed.

    Runs on the event loop; reading them takes less than a millisecond.
    """
    loop = asyncio.get_running_loop()
    with open_netlink(NETLINK_ROUTE, _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR) as sock:
        sock.setblocking(False)
        known = node_addresses()  # after the subscription, so that no change falls between
        yield known
        while True:
            await _wait_for_change(loop, sock)
            current = node_addresses()
            if current != known:
                known = current
                yield known


async def _wait_for_change(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    """Return soon after a message; what it says does not matter, so lost ones (ENOBUFS) count as one."""
    try:
        await loop.sock_recv(sock, 65_536)
    except OSError as err:
        if err.errno != errno.ENOBUFS:
            raise
    await asyncio.sleep(_SETTLE_S)
    while True:
        try:
            sock.recv(65_536)
        except BlockingIOError:
            return
        except OSError as err:
            if err.errno != errno.ENOBUFS:
                raise


def _read_interfaces() -> tuple[Interface, ...]:
    addresses: dict[int, list[IPAddress]] = {}
    for body in dump(NETLINK_ROUTE, _RTM_GETADDR, bytes(8)):
        family, _, _, _, index = _IFADDRMSG.unpack_from(body)
        attributes = decode_attributes(body[_IFADDRMSG.size :])
        # IFA_ADDRESS of a point-to-point interface is its peer's.
        value = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS))
        if value is not None and family in (socket.AF_INET, socket.AF_INET6):
            addresses.setdefault(index, []).append(ipaddress.ip_address(value))
    return tuple(_interface(body, addresses) for body in dump(NETLINK_ROUTE, _RTM_GETLINK, bytes(16)))


def own_interface(index: int) -> Interface | None:
    """Return the interface of the current namespace with that index, without its addresses; None: there is none."""
    try:
        socket.if_indextoname(index)
    except OSError:
        return None
    with open_netlink(NETLINK_ROUTE) as sock:
        body = ask(sock, _RTM_GETLINK, _IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, 0, 0), sequence=1)
    return None if body is None else _interface(body, {})


def _interface(body: bytes, addresses: dict[int, list[IPAddress]]) -> Interface:
    _, _, index, _, _ = _IFINFOMSG.unpack_from(body)
    attributes = decode_attributes(body[_IFINFOMSG.size :])
    return Interface(
        name=attributes[_IFLA_IFNAME].rstrip(b"\0").decode(),
        index=index,
        mtu=struct.unpack("=I", attributes[_IFLA_MTU])[0],
        addresses=tuple(addresses.get(index, ())),
        mac=attributes.get(_IFLA_ADDRESS, b""),
        kind=_kind(attributes.get(_IFLA_LINKINFO, b"")),
        peer=int.from_bytes(attributes.get(_IFLA_LINK, b""), sys.byteorder),
        master=int.from_bytes(attributes.get(_IFLA_MASTER, b""), sys.byteorder),
    )


def _kind(link_info: bytes) -> str:
    return decode_attributes(link_info).get(_IFLA_INFO_KIND, b"").rstrip(b"\0").decode()
