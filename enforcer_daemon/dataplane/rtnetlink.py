# SPDX-License-Identifier: Apache-2.0
"""Interfaces, addresses and queueing disciplines of the current network namespace, read by pyroute2.

IPRSocket is pyroute2's socket without an event loop: it works in any thread, also in one whose loop runs (uvloop
refuses netlink sockets), and owns a single descriptor. It neither raises the kernel's errors nor notices that a dump
was interrupted, so both are done here. Most interfaces of a node are pods', and to decode one takes a fifth of a
millisecond; so a dump can skip messages by the bytes in them. Source: rtnetlink(7).
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, TypeVar

from pyroute2 import IPRSocket
from pyroute2.netlink import NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE
from pyroute2.netlink.exceptions import NetlinkDecodeError, NetlinkDumpInterrupted, NetlinkError
from pyroute2.netlink.rtnl import (
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETQDISC,
    RTM_NEWLINK,
    RTMGRP_IPV4_IFADDR,
    RTMGRP_IPV6_IFADDR,
)
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.marshal import MarshalRtnl
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from enforcer_daemon.dataplane.netlink import encode_attribute
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import IPAddress

T = TypeVar("T")

_KIND = 1  # linux/if_link.h: IFLA_INFO_KIND; linux/rtnetlink.h: TCA_KIND
_ARPHRD_ETHER = 1  # linux/if_arp.h
_MAX_ATTEMPTS = 5  # A dump that the kernel interrupts is requested again.


def _is_any(_message: bytes) -> bool:
    return True


def _has_kind(kinds: tuple[str, ...]) -> Callable[[bytes], bool]:
    """Return a test that all messages of some drivers or disciplines pass; few others can pass it, too."""
    patterns = [encode_attribute(_KIND, kind.encode() + b"\0") for kind in kinds]
    return lambda message: any(pattern in message for pattern in patterns)


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


class RouteReader:
    """A route netlink socket for one `read_routes`."""

    def __init__(self, route: IPRSocket) -> None:
        self._route = route
        self._marshal = RouteMarshal()
        route.set_marshal(self._marshal)

    def interfaces(self) -> tuple[Interface, ...]:
        """Return all interfaces with their addresses."""
        addresses = self.addresses()
        return tuple(decode_interface(found, addresses) for found in self._dump(ifinfmsg(), RTM_GETLINK))

    def links(self, kinds: tuple[str, ...]) -> tuple[Interface, ...]:
        """Return the interfaces of some drivers, without their addresses."""
        return self._links(_has_kind(kinds))

    def links_but(self, kind: str) -> tuple[Interface, ...]:
        """Return the interfaces of all drivers but one, without their addresses."""
        is_unwanted = _has_kind((kind,))
        return self._links(lambda message: not is_unwanted(message))

    def link(self, index: int) -> Interface | None:
        """Return the interface of that index, without its addresses, or None."""
        request = ifinfmsg()
        request["index"] = index
        return self._one_link(request)

    def interface(self, name: str) -> Interface | None:
        """Return the interface of that name with its addresses, or None."""
        request = ifinfmsg()
        request["attrs"].append(("IFLA_IFNAME", name))
        found = self._one_link(request)
        return None if found is None else replace(found, addresses=tuple(self.addresses().get(found.index, ())))

    def addresses(self) -> dict[int, list[IPAddress]]:
        """Return the addresses by index of their interface."""
        addresses: dict[int, list[IPAddress]] = {}
        for found in self._dump(ifaddrmsg(), RTM_GETADDR):
            # IFA_ADDRESS of a point-to-point interface is its peer's.
            text = found.get_attr("IFA_LOCAL") or found.get_attr("IFA_ADDRESS")
            if text is not None:
                addresses.setdefault(found["index"], []).append(ip_address(text))
        return addresses

    def interfaces_with(self, disciplines: tuple[str, ...]) -> frozenset[int]:
        """Return the indexes of the interfaces that have a queueing discipline of some kinds."""
        dump = self._dump(tcmsg(), RTM_GETQDISC, _has_kind(disciplines))
        return frozenset(found["index"] for found in dump if found.get_attr("TCA_KIND") in disciplines)

    def _links(self, is_wanted: Callable[[bytes], bool]) -> tuple[Interface, ...]:
        return tuple(decode_interface(found, {}) for found in self._dump(ifinfmsg(), RTM_GETLINK, is_wanted))

    def _one_link(self, request: ifinfmsg) -> Interface | None:
        self._marshal.is_wanted = _is_any
        self._route.put(request, msg_type=RTM_GETLINK, msg_flags=NLM_F_REQUEST)
        try:
            found = [decode_interface(_checked(message), {}) for message in self._route.get()]
        except NetlinkError as err:
            if err.code == errno.ENODEV:
                return None
            raise
        return found[0] if found else None

    def _dump(self, request: Any, kind: int, is_wanted: Callable[[bytes], bool] = _is_any) -> Iterator[Any]:
        self._marshal.is_wanted = is_wanted
        self._route.put(request, msg_type=kind, msg_flags=NLM_F_REQUEST | NLM_F_DUMP)
        while True:
            for found in map(_checked, self._route.get()):
                if found["header"]["type"] == NLMSG_DONE:
                    return
                yield found


class RouteMarshal(MarshalRtnl):  # type: ignore[misc]  # pyroute2 has no types.
    """Decodes wanted messages, and raises NetlinkDumpInterrupted for a dump that may have holes."""

    def __init__(self) -> None:
        super().__init__()
        self.is_wanted: Callable[[bytes], bool] = _is_any

    def parse_one_message(
        self, key: int, flags: int, sequence_number: int, data: bytes, offset: int, length: int
    ) -> Any:
        """Return the message; None: it is not wanted."""
        if flags & NLM_F_DUMP_INTR:
            raise NetlinkDumpInterrupted
        if key >= RTM_NEWLINK and not self.is_wanted(data[offset : offset + length]):
            return None
        return super().parse_one_message(key, flags, sequence_number, data, offset, length)


def read_routes(read: Callable[[RouteReader], T]) -> T:
    """Return what `read` returns; raise DataplaneError if the kernel refuses a request or keeps interrupting dumps.

    It runs again from its beginning if a dump is interrupted. Works on the network namespace of the calling thread.
    """
    for _ in range(_MAX_ATTEMPTS):
        try:
            with IPRSocket() as route:
                return read(RouteReader(route))
        except NetlinkDumpInterrupted:
            continue
        except NetlinkError as err:
            raise DataplaneError(f"route netlink: {os.strerror(err.code)}") from err
        except (OSError, NetlinkDecodeError) as err:
            raise DataplaneError(f"route netlink: {err}") from err
    raise DataplaneError(f"route netlink: dumps were interrupted {_MAX_ATTEMPTS} times")


@contextmanager
def address_changes() -> Iterator[socket.socket]:
    """Yield a socket, which does not block, that has a message for each change of the current namespace's addresses."""
    with IPRSocket() as route:
        route.bind(RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR)
        route.socket.setblocking(False)
        yield route.socket


def _checked(message: Any) -> Any:
    error = message["header"]["error"]
    if error is not None:
        raise error
    return message


def decode_interface(found: Any, addresses: dict[int, list[IPAddress]]) -> Interface:
    """Return the interface of a decoded message."""
    index = found["index"]
    return Interface(
        name=found.get_attr("IFLA_IFNAME"),
        index=index,
        mtu=found.get_attr("IFLA_MTU"),
        addresses=tuple(addresses.get(index, ())),
        mac=_mac(found),
        kind=found.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or "",
        peer=found.get_attr("IFLA_LINK") or 0,
        master=found.get_attr("IFLA_MASTER") or 0,
    )


def _mac(found: Any) -> bytes:
    """Return the Ethernet address, empty for other links: pyroute2 reads six bytes, whatever the address' length."""
    text = found.get_attr("IFLA_ADDRESS") if found["ifi_type"] == _ARPHRD_ETHER else None
    return b"" if text is None else bytes.fromhex(text.replace(":", ""))
