# SPDX-License-Identifier: Apache-2.0
"""Where a pod's interfaces end in the node's namespace: found by what the kernel says, not by name alone.

A name that the primary plugin reported is only taken where the kernel agrees that this interface is the other end of
the pod's: a guard on the wrong one would cut off somebody else.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from ipaddress import IPv6Address
from pathlib import Path

from enforcer_daemon.dataplane.addresses import interfaces
from enforcer_daemon.dataplane.guard_rules import Links
from enforcer_daemon.dataplane.rtnetlink import Interface, RouteReader, read_routes

_BRIDGE_HOOKS = ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables")
_PAIRS = ("veth", "netkit")
_MASTERS = ("bridge", "vrf")
_UPPER = ("vlan", "macvlan")
"""Devices that take packets from a bridge; what stands on them does the same from them, which no CNI plugin makes."""
_MAX_MASTERS = 3
"""A bridge in a VRF, and one to spare."""
_BEFORE_US = ("ingress", "clsact")
"""Queueing disciplines whose filters see a packet before nft does, and can send it on elsewhere."""


def find_links(netns_fd: int, ends: Mapping[str, tuple[str, ...]]) -> Links:
    """Find the ends of a pod's interfaces; call it in the node's namespace.

    `ends` gives, by interface of the pod, what the primary plugin named; nothing: the kernel alone is asked.
    """
    pods = {interface.name: interface for interface in interfaces(netns_fd)}
    return read_routes(lambda node: _find_links(node, pods, ends))


def _find_links(node: RouteReader, pods: Mapping[str, Interface], ends: Mapping[str, tuple[str, ...]]) -> Links:
    names, problems, link_locals, ways = [], [], [], []
    for ifname, named in ends.items():
        inner = pods.get(ifname)
        outer = None if inner is None else _other_end(node, inner, named)
        if inner is None or outer is None:
            problems.append(f"{ifname} has no end of its own on the node: raw packets from it are not checked")
            continue
        names.append(outer.name)
        link_locals += _link_locals(inner)
        ways.append(_devices(node, outer))
        problems += _bridge_problems(outer)
        if ways[-1] is None:
            problems.append(
                f"{outer.name} is a port of what is no bridge: packets under the pod's address are not traced"
            )
    is_traced = len(names) == len(ends) and None not in ways
    return Links(
        tuple(names),
        tuple(dict.fromkeys(link_locals)),
        "; ".join(dict.fromkeys(problems)),
        tuple(dict.fromkeys(name for way in ways for name in way or ())),
        is_traced,
    )


def _devices(node: RouteReader, outer: Interface) -> tuple[str, ...] | None:
    """Return what the IP stack shows as the input interface of packets from a port; None if that cannot be told."""
    found: list[str] = []
    if not outer.master:
        return ()
    upper, above = [each for each in node.links(_UPPER) if each.kind in _UPPER], outer.master
    for _ in range(_MAX_MASTERS):
        master = node.link(above)
        if master is None or master.kind not in _MASTERS:
            return None
        found += [master.name, *(each.name for each in upper if each.peer == master.index)]
        if not (above := master.master):
            return tuple(found)
    return None


def _other_end(node: RouteReader, inner: Interface, named: tuple[str, ...]) -> Interface | None:
    outer = node.link(inner.peer) if inner.peer else None
    if outer is None or outer.peer != inner.index or inner.kind not in _PAIRS or outer.kind != inner.kind:
        return None
    return outer if not named or outer.name in named else None


def _link_locals(inner: Interface) -> list[IPv6Address]:
    """Return the interface's link-local addresses, and the one that it forms from its MAC (RFC 4291, appendix A)."""
    found = [a for a in inner.addresses if isinstance(a, IPv6Address) and a.is_link_local]
    if len(inner.mac) == 6:
        mac = inner.mac
        found.append(IPv6Address(b"\xfe\x80" + bytes(6) + bytes((mac[0] ^ 2, *mac[1:3], 0xFF, 0xFE, *mac[3:]))))
    return found


def _bridge_problems(outer: Interface) -> list[str]:
    if not outer.master:
        return []
    found = []
    for name in _BRIDGE_HOOKS:
        try:
            is_on = Path("/proc/sys/net/bridge", name).read_text(encoding="ascii").strip() == "1"
        except OSError:
            is_on = False
        if not is_on:
            found.append(f"net.bridge.{name} is not 1: raw datagrams to pods on the same bridge are not checked")
    return found


def passed_by_tc() -> frozenset[str]:
    """Name the interfaces of the current namespace where tc sees packets first."""
    names = dict(socket.if_nameindex())
    found = read_routes(lambda reader: reader.interfaces_with(_BEFORE_US))
    return frozenset(names[index] for index in found if index in names)
