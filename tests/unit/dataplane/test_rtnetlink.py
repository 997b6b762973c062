# SPDX-License-Identifier: Apache-2.0
"""What pyroute2 leaves to its caller: interrupted dumps, and links that are no Ethernet."""

from __future__ import annotations

import errno
import struct

import pytest
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

from enforcer_daemon.dataplane.netlink import encode_attribute
from enforcer_daemon.dataplane.rtnetlink import Interface, RouteMarshal, RouteReader, decode_interface, read_routes
from enforcer_daemon.errors import DataplaneError

NLM_F_MULTI, NLM_F_DUMP_INTR = 0x02, 0x10
RTM_NEWLINK, NLMSG_DONE = 16, 3
ETHERNET, TUNNEL = 1, 768
MAC = bytes.fromhex("0a1b2c3d4e5f")


def link(name: str, kind: str, mac: bytes = MAC, hardware: int = ETHERNET, flags: int = NLM_F_MULTI) -> bytes:
    attributes = ((3, name.encode() + b"\0"), (1, mac), (4, struct.pack("=I", 1400)), (5, struct.pack("=I", 7)))
    body = struct.pack("=BxHiII", 0, hardware, 5, 0, 0) + b"".join(encode_attribute(*each) for each in attributes)
    body += encode_attribute(18, encode_attribute(1, kind.encode() + b"\0"))
    return struct.pack("=IHHII", 16 + len(body), RTM_NEWLINK, flags, 0, 0) + body


def decode(data: bytes, marshal: RouteMarshal | None = None) -> list[Interface]:
    return [decode_interface(message, {}) for message in (marshal or RouteMarshal()).parse(data)]


def test_a_link_is_decoded() -> None:
    assert decode(link("eth0", "veth")) == [Interface("eth0", 5, 1400, (), MAC, "veth", 7, 0)]


def test_a_tunnels_address_is_no_mac() -> None:
    (found,) = decode(link("tunl0", "ipip", bytes((10, 0, 0, 1)), TUNNEL))
    assert (found.name, found.mac, found.kind) == ("tunl0", b"", "ipip")


def test_unwanted_links_are_skipped() -> None:
    marshal = RouteMarshal()
    marshal.is_wanted = lambda message: b"vlan\0" in message
    assert [found.name for found in decode(link("v0", "veth") + link("v1", "vlan") + link("v2", "veth"), marshal)] == [
        "v1"
    ]


@pytest.mark.parametrize(
    "data",
    [
        link("eth0", "veth", flags=NLM_F_MULTI | NLM_F_DUMP_INTR),
        struct.pack("=IHHIIi", 20, NLMSG_DONE, NLM_F_MULTI | NLM_F_DUMP_INTR, 0, 0, 0),
    ],
    ids=["in an object", "at the end"],
)
def test_an_interrupted_dump_is_noticed(data: bytes) -> None:
    with pytest.raises(NetlinkDumpInterrupted):
        list(RouteMarshal().parse(data))


def test_an_interrupted_read_runs_again_but_not_without_end() -> None:
    attempts: list[RouteReader] = []

    def read(reader: RouteReader, interruptions: int) -> str:
        attempts.append(reader)
        if len(attempts) <= interruptions:
            raise NetlinkDumpInterrupted
        return "whole"

    assert read_routes(lambda reader: read(reader, 4)) == "whole"
    assert len(attempts) == 5
    with pytest.raises(DataplaneError, match="interrupted 5 times"):
        read_routes(lambda reader: read(reader, 100))
    assert len(attempts) == 10


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NetlinkError(errno.EPERM), "route netlink: Operation not permitted"),
        (OSError(errno.ENOBUFS, "full"), "route netlink: .*full"),
    ],
)
def test_an_error_is_the_dataplanes(error: Exception, message: str) -> None:
    def read(reader: RouteReader) -> None:
        raise error

    with pytest.raises(DataplaneError, match=message):
        read_routes(read)
