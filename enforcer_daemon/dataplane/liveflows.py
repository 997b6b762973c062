# SPDX-License-Identifier: Apache-2.0
"""A pod's TCP connections that its enforcer released and a socket still has: what the daemon vouches for on the node.

Both are asked for: a mark in the pod's conntrack alone may outlive its socket, and a socket alone proves nothing, since
a pod with CAP_NET_RAW can forge a peer's SYN-ACK to itself. Sources: linux/inet_diag.h, linux/sock_diag.h,
net/tcp_states.h.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address

from enforcer_daemon.dataplane.established import ReleasedFlow, list_released
from enforcer_daemon.dataplane.netlink import DIAG_ENDS, DIAG_REQUEST, NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, End, dump
from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import Protocol

_LIVE_STATES = sum(1 << state for state in (1, 4, 5, 8, 9, 11))
"""ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING: both ends have agreed to the connection."""


def list_live(netns_fd: int) -> list[ReleasedFlow]:
    """Return the released TCP connections of a namespace that have a socket in it.

    Blocks for some milliseconds, more for thousands of connections. Raises DataplaneError.
    """
    return open_in(netns_fd, _list_live)


def _list_live() -> list[ReleasedFlow]:
    flows = [flow for flow in list_released() if flow.protocol == Protocol.TCP]
    sockets = frozenset(_connections()) if flows else frozenset()
    return [flow for flow in flows if not sockets.isdisjoint(_places(flow))]


def _places(flow: ReleasedFlow) -> tuple[tuple[End, End], ...]:
    """Return local and remote end of the sockets that may have a flow: of its opener, its target, or a sidecar."""
    one, other = (flow.source, flow.source_port), (flow.destination, flow.destination_port)
    return (one, other), (other, one), (flow.answering, one)


def _connections() -> Iterator[tuple[End, End]]:
    for family in (socket.AF_INET, socket.AF_INET6):
        request = DIAG_REQUEST.pack(family, Protocol.TCP, 0, 0, _LIVE_STATES, bytes(48))
        try:
            bodies = dump(NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, request)
        except OSError as err:
            raise DataplaneError(f"sockets of a pod: {err}") from err
        for body in bodies:
            found, _, _, _, local_port, remote_port, local, remote = DIAG_ENDS.unpack_from(body)
            yield _end(found, local, local_port), _end(found, remote, remote_port)


def _end(family: int, address: bytes, port: bytes) -> End:
    found = ip_address(address[:4] if family == socket.AF_INET else address)
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped  # A socket of both families.
    return found, int.from_bytes(port, "big")
