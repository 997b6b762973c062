# SPDX-License-Identifier: Apache-2.0
"""Witnesses of what arrives: behind every rule of a place, or on its link.

A packet arrived if an application or a raw socket of the place could read it, or its kernel would answer it: that is
what passes the last hook of INPUT. A packet socket sees a packet before the place's own rules may drop it, so it is a
witness only where nothing is enforced, and for what no rule of INPUT ever sees (ARP, frames of other protocols).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from enforcer_daemon.dataplane.netlink import (
    NETLINK_NETFILTER,
    acknowledged,
    decode_attributes,
    decode_messages,
    encode_attribute,
    open_netlink,
)
from tests.attacks.links import ROUTER
from tests.attacks.packets import ETHERTYPES, IPV6_HEADER_BYTES
from trireme_lab.netns import exec_prefix, in_netns, run

ETH_P_ALL = 3
SO_RCVBUFFORCE = 33
_BUFFER_BYTES = 32 << 20
_GROUP = 47_001
"""Of nfnetlink_log, in the place's own namespace; the product uses none of this range."""
_LAST_PRIORITY = 2_000
_CONFIGURE = 4 << 8 | 1  # linux/netfilter/nfnetlink.h: NFNL_SUBSYS_ULOG; nfnetlink_log.h: NFULNL_MSG_CONFIG
_CFG_CMD, _CFG_MODE, _CFG_NLBUFSIZ, _CFG_TIMEOUT, _CFG_QTHRESH = 1, 2, 3, 4, 5
_BIND, _COPY_PACKET, _COPIED_BYTES = 1, 2, 0xFFFF
_PACKET = 4 << 8  # NFULNL_MSG_PACKET
_PAYLOAD = 9  # NFULA_PAYLOAD
SOL_PACKET, PACKET_AUXDATA = 263, 8
_VLAN_VALID = 0x10  # linux/if_packet.h: TP_STATUS_VLAN_VALID
_OUTGOING = 4  # linux/if_packet.h: PACKET_OUTGOING
TAG_BYTES = 4
ETHERNET_BYTES = 14
UNNUMBERED = -1
_KEPT_PACKETS = 8
"""Of one attempt, at one place."""

Counted = Callable[[bytes], bool]


class Witness:
    """What has arrived at one place, by the number behind the run's tag."""

    def __init__(self, place: str, tag: bytes) -> None:
        self.place = place
        self._tag = tag
        self._log: list[socket.socket] = []
        self._taps: list[tuple[socket.socket, Counted]] = []
        self.arrived: dict[int, list[bytes]] = {}
        """The distinct packets with which each numbered attempt arrived; UNNUMBERED: cut off behind the tag."""

    def hear_log(self, sock: socket.socket) -> None:
        """Listen to what the rules log."""
        self._prepare(sock)
        self._log.append(sock)

    def hear_link(self, sock: socket.socket, counts: Counted) -> None:
        """Listen to a packet socket, for the frames that `counts` takes."""
        self._prepare(sock)
        sock.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        self._taps.append((sock, counts))

    def _prepare(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _BUFFER_BYTES)

    def drain(self) -> None:
        """Read all that is there now."""
        for sock in self._log:
            while (found := _next(sock)) is not None:
                for message in decode_messages(found[0]):
                    attributes = decode_attributes(message.body[4:]) if message.kind == _PACKET else {}
                    packet = attributes.get(_PAYLOAD, b"")
                    if not is_redirect(packet):
                        self._find(packet)
        for sock, counts in self._taps:
            while (found := _next(sock)) is not None:
                frame, is_tagged, kind = found
                if kind != _OUTGOING and (is_tagged or counts(frame)):
                    self._find(frame[ETHERNET_BYTES:])

    def _find(self, packet: bytes) -> None:
        if is_icmp_error(packet):
            return
        at = packet.find(self._tag)
        while at >= 0:
            number = packet[at + TAG_BYTES : at + TAG_BYTES + 4]
            key = int.from_bytes(number, "big") if len(number) == 4 else UNNUMBERED
            known = self.arrived.setdefault(key, [])
            if packet not in known and len(known) < _KEPT_PACKETS:
                known.append(packet)
            at = packet.find(self._tag, at + TAG_BYTES)


def _next(sock: socket.socket) -> tuple[bytes, bool, int] | None:
    """Read a message; of a frame also whether the kernel took a VLAN tag off it, and its kind (packet(7))."""
    try:
        data, ancillary, _, address = sock.recvmsg(1 << 17, 64)
    except BlockingIOError:
        return None
    is_tagged = any(
        (level, kind) == (SOL_PACKET, PACKET_AUXDATA) and bool(int.from_bytes(content[:4], "little") & _VLAN_VALID)
        for level, kind, content in ancillary
    )
    return data, is_tagged, address[2] if len(address) > 2 else 0


def is_icmp_error(packet: bytes) -> bool:
    """Tell an ICMP error, which quotes the packet that it answers; ICMP is open by design."""
    if packet[:1] and packet[0] >> 4 == 4:
        return packet[9] == 1 and packet[(packet[0] & 15) * 4] in (3, 4, 5, 11, 12)
    return len(packet) > IPV6_HEADER_BYTES and packet[6] == 58 and packet[IPV6_HEADER_BYTES] < 128


def is_redirect(packet: bytes) -> bool:
    """Tell an ICMPv6 redirect: a router quotes in it the packet that had a shorter way."""
    return len(packet) > IPV6_HEADER_BYTES and packet[0] >> 4 == 6 and packet[6] == 58 and packet[40] == 137


def is_any(_: bytes) -> bool:
    """Count every frame: the place has no rules."""
    return True


def is_link_level(frame: bytes) -> bool:
    """Count what no rule of INPUT sees: other protocols than IP, and what speaks for a neighbor in ICMPv6."""
    ethertype, packet = frame[12:14], frame[ETHERNET_BYTES:]
    version = next((version for version, known in ETHERTYPES.items() if known == ethertype), 0)
    if version == 0 or version != packet[0] >> 4:
        return True
    if version == 4:
        return False
    if is_redirect(packet) and packet[8:24] != ROUTER:
        return False
    return packet[6] == 58 and packet[IPV6_HEADER_BYTES] in (134, 135, 136, 137)


@contextmanager
def listening(netns: str, place: str, tag: bytes, *, link: str, counts: Counted) -> Iterator[Witness]:
    """Run a witness behind the rules of a namespace, and on its link for the frames that `counts` takes."""
    witness = Witness(place, tag)
    table = f"inet witness_{os.urandom(4).hex()}"
    rules = (
        f"add table {table}; add chain {table} input {{ type filter hook input priority {_LAST_PRIORITY}; }}; "
        f"add rule {table} input log group {_GROUP} snaplen {_COPIED_BYTES}"
    )
    with ExitStack() as stack:
        sock = stack.enter_context(in_netns(netns, lambda: open_netlink(NETLINK_NETFILTER)))
        for attribute in (
            encode_attribute(_CFG_CMD, bytes((_BIND,))),
            encode_attribute(_CFG_MODE, struct.pack("!IBB", _COPIED_BYTES, _COPY_PACKET, 0)),
            encode_attribute(_CFG_NLBUFSIZ, struct.pack("!I", 65_536)),
            encode_attribute(_CFG_QTHRESH, struct.pack("!I", 1)),
            encode_attribute(_CFG_TIMEOUT, struct.pack("!I", 1)),
        ):
            acknowledged(sock, _CONFIGURE, struct.pack("!BBH", socket.AF_UNSPEC, 0, _GROUP) + attribute)
        witness.hear_log(sock)
        run([*exec_prefix(netns), "nft", rules])
        stack.callback(run, [*exec_prefix(netns), "nft", f"delete table {table}"])
        tap = stack.enter_context(
            in_netns(netns, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)))
        )
        tap.bind((link, ETH_P_ALL))
        witness.hear_link(tap, counts)
        yield witness
