# SPDX-License-Identifier: Apache-2.0
"""Witnesses of what arrives: behind every rule of a place, or on its link.

A packet arrived if an application or a raw socket of the place could read it, or its kernel would answer it: that is what
passes the last hook of INPUT. A packet socket sees a packet before the place's own rules may drop it, so it is a witness
only where nothing is enforced, and for what no rule of INPUT ever sees (ARP, frames of other protocols).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from enforcer_daemon.dataplane.netlink import NETLINK_NETFILTER, acknowledged, encode_attribute, open_netlink
from triremectl.lab.netns import exec_prefix, in_netns, run

ETH_P_ALL = 3
SO_RCVBUFFORCE = 33
_BUFFER_BYTES = 32 << 20
_GROUP = 47_001
"""Of nfnetlink_log, in the place's own namespace; the product uses none of this range."""
_LAST_PRIORITY = 2_000
_CONFIGURE = 4 << 8 | 1  # linux/netfilter/nfnetlink.h: NFNL_SUBSYS_ULOG; nfnetlink_log.h: NFULNL_MSG_CONFIG
_CFG_CMD, _CFG_MODE, _CFG_NLBUFSIZ, _CFG_TIMEOUT, _CFG_QTHRESH = 1, 2, 3, 4, 5
_BIND, _COPY_PACKET, _COPIED_BYTES = 1, 2, 0xFFFF
_OUTGOING = 4  # linux/if_packet.h: PACKET_OUTGOING
TAG_BYTES = 4
_KEPT_SAMPLES = 64

Counted = Callable[[bytes], bool]


class Witness:
    """What has arrived at one place, by the number behind the run's tag."""

    def __init__(self, place: str, tag: bytes) -> None:
        self.place = place
        self._tag = tag
        self._sockets: list[tuple[socket.socket, Counted | None]] = []
        self.arrived: dict[int, int] = {}
        """How often each numbered attempt arrived."""
        self.samples: dict[int, bytes] = {}
        """One message with each of the first attempts that arrived, for a report."""

    def hear(self, sock: socket.socket, counts: Counted | None = None) -> None:
        """Listen to one more socket; of a packet socket, to the frames that `counts` takes."""
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _BUFFER_BYTES)
        self._sockets.append((sock, counts))

    def drain(self) -> None:
        """Read all that is there now."""
        for sock, counts in self._sockets:
            while True:
                try:
                    data, address = sock.recvfrom(1 << 17)
                except BlockingIOError:
                    break
                if counts is None or (address[2] != _OUTGOING and counts(data)):
                    self._find(data)

    def _find(self, data: bytes) -> None:
        at = data.find(self._tag)
        seen: set[int] = set()
        while at >= 0:
            number = data[at + TAG_BYTES : at + TAG_BYTES + 4]
            seen.add(int.from_bytes(number, "big") if len(number) == 4 else -1)
            at = data.find(self._tag, at + TAG_BYTES)
        for number_seen in seen:
            self.arrived[number_seen] = self.arrived.get(number_seen, 0) + 1
            if len(self.samples) < _KEPT_SAMPLES:
                self.samples.setdefault(number_seen, data)


def is_any(_: bytes) -> bool:
    """Count every frame: the place has no rules."""
    return True


def is_link_level(frame: bytes) -> bool:
    """Count what no rule of INPUT sees: other protocols than IP, and what speaks for a neighbor in ICMPv6."""
    ethertype = frame[12:14]
    if ethertype == b"\x86\xdd":
        return frame[20] == 58 and frame[54] in (134, 135, 136, 137)
    return ethertype != b"\x08\x00"


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
        witness.hear(sock)
        run([*exec_prefix(netns), "nft", rules])
        stack.callback(run, [*exec_prefix(netns), "nft", f"delete table {table}"])
        tap = stack.enter_context(
            in_netns(netns, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)))
        )
        tap.bind((link, ETH_P_ALL))
        witness.hear(tap, counts)
        yield witness
