# SPDX-License-Identifier: Apache-2.0
"""Links, addresses and routes of a namespace: steps as values, and making them by pyroute2."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import assert_never

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import rt_proto, rt_scope
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD

from enforcer_daemon.model import IPAddress, IPNetwork
from trireme_lab.errors import LabError

_FAMILIES = {4: AF_INET, 6: AF_INET6}
_RTNH_F_ONLINK = 4  # linux/rtnetlink.h


@dataclass(frozen=True, slots=True)
class AddVeth:
    """A pair of links, of which the other is in another namespace."""

    link: str
    peer: str
    netns: Path
    """Where the other namespace is mounted."""


@dataclass(frozen=True, slots=True)
class AddBridge:
    """A bridge without ports."""

    link: str


@dataclass(frozen=True, slots=True)
class AddAddress:
    """An address with the length of its network; one of IPv6 is usable at once, without looking for duplicates."""

    address: IPv4Interface | IPv6Interface
    link: str


@dataclass(frozen=True, slots=True)
class SetUp:
    """A link that carries packets from now on."""

    link: str


@dataclass(frozen=True, slots=True)
class AddRoute:
    """A route by a link."""

    destination: IPNetwork
    link: str
    via: IPAddress | None = None
    source: IPAddress | None = None
    is_onlink: bool = False
    """Whether the gateway is taken to be on the link, whatever the other routes say."""


Step = AddVeth | AddBridge | AddAddress | SetUp | AddRoute


def carry_out(steps: Iterable[Step]) -> None:
    """Carry steps out in the calling thread's namespace; raise LabError that names the step."""
    with IPRoute() as route:
        for step in steps:
            try:
                _carry_out(route, step)
            except (NetlinkError, OSError) as err:
                raise LabError(f"{step}: {err}") from err


def _carry_out(route: IPRoute, step: Step) -> None:
    match step:
        case AddVeth():
            netns = os.open(step.netns, os.O_RDONLY | os.O_CLOEXEC)
            try:
                peer = {"ifname": step.peer, "net_ns_fd": netns}
                route.link("add", ifname=step.link, kind="veth", peer=peer)
            finally:
                os.close(netns)
        case AddBridge():
            route.link("add", ifname=step.link, kind="bridge")
        case AddAddress():
            address, length = str(step.address.ip), step.address.network.prefixlen
            flags = IFA_F_NODAD if step.address.version == 6 else 0
            route.addr("add", index=_index(route, step.link), address=address, prefixlen=length, flags=flags)
        case SetUp():
            route.link("set", index=_index(route, step.link), state="up")
        case AddRoute():
            _add_route(route, step)
        case _:
            assert_never(step)


def _add_route(route: IPRoute, step: AddRoute) -> None:
    """Add a route as ip(8) does: that of IPv4 without a gateway ends at the link."""
    version = step.destination.version
    is_local = version == 4 and step.via is None
    route.route(
        "add",
        family=_FAMILIES[version],
        dst=str(step.destination),
        oif=_index(route, step.link),
        proto=rt_proto["boot"],
        scope=rt_scope["link" if is_local else "universe"],
        flags=_RTNH_F_ONLINK if step.is_onlink else 0,
        **({} if step.via is None else {"gateway": str(step.via)}),
        **({} if step.source is None else {"prefsrc": str(step.source)}),
    )


def _index(route: IPRoute, link: str) -> int:
    (found,) = route.link("get", ifname=link)
    index: int = found["index"]
    return index
