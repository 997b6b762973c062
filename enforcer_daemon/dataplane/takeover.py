# SPDX-License-Identifier: Apache-2.0
"""Interfaces of a pod whose packets never meet the hooks of the pod's IP stack, and how they are closed.

The rules match packets that the pod's IP stack receives by the pod's interface. A bridge, a bond or Open vSwitch that
takes the interface as its port, and a macvlan or ipvlan on top of it, take frames off before that stack sees them
(net/core/dev.c, rx_handler), and a virtual machine or a nested pod behind them would be reached past every policy. A
table in nft's bridge family drops what passes a bridge by the pod's interface, before there is any bridge. For the
others nft has no hook behind the interface; the daemon notices them, and closes the interface at both of its ends
until they are gone.
"""

from __future__ import annotations

import errno
import hashlib
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress

from enforcer_daemon.dataplane.netlink import decode_attributes, decode_messages
from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.dataplane.rtnetlink import Interface
from enforcer_daemon.dataplane.tools import run, run_in
from enforcer_daemon.errors import DataplaneError

BRIDGE_TABLE = "bridge trireme"
CLOSED_TABLE = "netdev trireme_closed"
_ON_TOP = frozenset({"macvlan", "macvtap", "ipvlan", "ipvtap"})
_BRIDGE_HOOKS = {
    "arriving": ("prerouting", "iifname"),
    "leaving": ("postrouting", "oifname"),
}
_PRIORITY = -300
_RTMGRP_LINK, _RTM_DELLINK, _IFINFOMSG_BYTES = 1, 17, 16  # linux/rtnetlink.h
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_NEW_NETNSID, _IFLA_INFO_KIND = 3, 18, 45, 1  # linux/if_link.h
_RECEIVE_BYTES = 65_536


def find_takeover(interfaces: Iterable[Interface], ifnames: Iterable[str]) -> str:
    """Return what takes one of the pod's interfaces from its IP stack, for operators; empty if nothing does."""
    found = list(interfaces)
    by_name, by_index = {each.name: each for each in found}, {each.index: each for each in found}
    for name in ifnames:
        own = by_name.get(name)
        if own is None:
            return f"{name} was moved out of the pod's network namespace, or renamed"
        master = by_index.get(own.master)
        # A VRF takes packets over behind the first hook of the IP stack (net/ipv4/ip_input.c, l3mdev_ip_rcv).
        if own.master and (master is None or master.kind != "vrf"):
            what = "another interface" if master is None else f"{master.kind} {master.name}"
            return f"{name} is a port of {what}"
        for each in found:
            if each.kind in _ON_TOP and each.peer == own.index:
                return f"{each.kind} {each.name} is on top of {name}"
    return ""


def render_bridge_table(ifnames: Iterable[str]) -> str:
    """Return the nft script that drops what a bridge in the pod passes by the pod's own interfaces."""
    names = ", ".join(f'"{name}"' for name in ifnames)
    lines = [f"table {BRIDGE_TABLE}", f"delete table {BRIDGE_TABLE}", f"table {BRIDGE_TABLE} {{"]
    for chain, (hook, match) in _BRIDGE_HOOKS.items():
        lines += [
            f"  chain {chain} {{",
            f"    type filter hook {hook} priority {_PRIORITY}; policy accept;",
            f"    {match} {{ {names} }} counter drop",
            "  }",
        ]
    return "\n".join([*lines, "}", ""])


def shut_bridges(netns_fd: int, ifnames: Sequence[str]) -> None:
    """Put the bridge table in place; raise DataplaneError if the kernel has no such family."""
    run_in(netns_fd, ("nft", "-f", "-"), render_bridge_table(ifnames))


def are_bridges_shut(netns_fd: int, ifnames: Sequence[str]) -> bool:
    """Return whether the bridge table is in place for these interfaces."""
    try:
        listing = run_in(netns_fd, ("nft", "list", "table", *BRIDGE_TABLE.split()))
    except DataplaneError:
        return False  # nft fails where there is no such table
    rules = [line for line in listing.splitlines() if line.strip().endswith("drop")]
    return len(rules) == len(_BRIDGE_HOOKS) and all(f'"{name}"' in rule for rule in rules for name in ifnames)


def remove_tables(netns_fd: int) -> None:
    """Take both tables out of a pod's namespace, if the kernel knows their families. Without them it does nothing."""
    for table in (BRIDGE_TABLE, CLOSED_TABLE):
        with suppress(DataplaneError):
            run_in(netns_fd, ("nft", "-f", "-"), _removal(table))


def remove_closed_on_node() -> None:
    """Open all links on the node."""
    with suppress(DataplaneError):
        run(("nft", "-f", "-"), _removal(CLOSED_TABLE))


def close_links(netns_fd: int | None, names: Sequence[str]) -> None:
    """Let nothing in or out by links, in a pod's namespace or (None) on the node; raise DataplaneError.

    Kernels before 5.16 have no egress hook; there nothing comes in by a link of the pod, or leaves it towards the node.
    """
    try:
        _run(netns_fd, _closing(names, ("ingress", "egress")))
    except DataplaneError:
        _run(netns_fd, _closing(names, ("ingress",)))


def open_links(netns_fd: int | None, names: Sequence[str]) -> None:
    """Undo `close_links`; for links that are not closed, or gone, it does nothing. Raises DataplaneError."""
    chains = [_chain(name, hook) for name in names for hook in ("ingress", "egress")]
    lines = [f"add table {CLOSED_TABLE}"]
    lines += [f"{verb} chain {CLOSED_TABLE} {chain}" for chain in chains for verb in ("add", "flush", "delete")]
    _run(netns_fd, "\n".join([*lines, ""]))


def link_changes(netns_fd: int) -> socket.socket:
    """Return a socket, which does not block, that has a message for each change of a namespace's links."""

    def subscribe() -> socket.socket:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        sock.setblocking(False)
        sock.bind((0, _RTMGRP_LINK))
        return sock

    return open_in(netns_fd, subscribe)


def read_departures(changes: socket.socket) -> list[str]:
    """Read what a socket of `link_changes` has; return what left for another namespace and may be on top of a link.

    From there it goes on taking packets, and no list of the pod's links shows it any longer.
    """
    found: list[str] = []
    while True:
        try:
            data = changes.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return found
        except OSError as err:
            if err.errno != errno.ENOBUFS:  # Else messages were lost; those that follow are there.
                raise
            continue
        found += decode_departures(data)


def decode_departures(data: bytes) -> list[str]:
    """Decode messages of links; return those that left, by kind and name. Raises DataplaneError."""
    found: list[str] = []
    for message in decode_messages(data):
        if message.kind != _RTM_DELLINK:
            continue
        attributes = decode_attributes(message.body[_IFINFOMSG_BYTES:])
        kind = decode_attributes(attributes.get(_IFLA_LINKINFO, b"")).get(_IFLA_INFO_KIND, b"").rstrip(b"\0").decode()
        if kind in _ON_TOP and _IFLA_NEW_NETNSID in attributes:
            found.append(f"{kind} {attributes.get(_IFLA_IFNAME, b'').rstrip(bytes(1)).decode(errors='replace')}")
    return found


def are_closed(netns_fd: int | None, names: Iterable[str]) -> bool:
    """Return whether `close_links` has closed any of these links."""
    command = ("nft", "list", "table", *CLOSED_TABLE.split())
    try:
        listing = run(command) if netns_fd is None else run_in(netns_fd, command)
    except DataplaneError:
        return False  # nft fails where there is no such table
    return any(_chain(name, "ingress") in listing for name in names)


def _closing(names: Iterable[str], hooks: Iterable[str]) -> str:
    lines = [f"add table {CLOSED_TABLE}"]
    for name in names:
        for hook in hooks:
            chain = _chain(name, hook)
            spec = f'{{ type filter hook {hook} device "{name}" priority {_PRIORITY}; policy accept; }}'
            lines += [f"add chain {CLOSED_TABLE} {chain} {spec}", f"flush chain {CLOSED_TABLE} {chain}"]
            lines.append(f"add rule {CLOSED_TABLE} {chain} counter drop")
    return "\n".join([*lines, ""])


def _chain(name: str, hook: str) -> str:
    return f"{hook}_{hashlib.sha256(name.encode()).hexdigest()[:20]}"


def _removal(table: str) -> str:
    return f"add table {table}\ndelete table {table}\n"


def _run(netns_fd: int | None, text: str) -> None:
    command = ("nft", "-f", "-")
    if netns_fd is None:
        run(command, text)
    else:
        run_in(netns_fd, command, text)
