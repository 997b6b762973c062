# SPDX-License-Identifier: Apache-2.0
"""What the enforcer reads of packets other than TCP: addresses, protocol, and ports where the protocol has them."""

from __future__ import annotations

from typing import NamedTuple

from enforcer_daemon.errors import PacketError
from enforcer_daemon.model import Protocol
from enforcer_daemon.packet.ip import IPHeader

SCTP = int(Protocol.SCTP)
_SCTP_HEADER, _CHUNK_HEADER, _INIT = 12, 4, 1  # RFC 9260, sections 3.1 to 3.2


class Datagram(NamedTuple):
    """One packet that is evaluated by its addresses; ports are None if the protocol has none."""

    src: bytes
    dst: bytes
    protocol: int
    sport: int | None
    dport: int | None


def decode_datagram(packet: bytes, header: IPHeader) -> Datagram:
    """Read what follows a known IP header; raise PacketError if UDP or SCTP is too short for its ports."""
    src, dst, protocol, offset, end = header
    if protocol not in (Protocol.UDP, Protocol.SCTP):
        return Datagram(src, dst, protocol, None, None)
    if offset + 8 > min(end, len(packet)):
        raise PacketError("transport header is truncated")
    sport = packet[offset] << 8 | packet[offset + 1]
    dport = packet[offset + 2] << 8 | packet[offset + 3]
    return Datagram(src, dst, protocol, sport, dport)


def is_init(packet: bytes, header: IPHeader) -> bool:
    """Return whether a packet is an SCTP INIT, which is bundled with no other chunk (RFC 9260, section 6.10)."""
    chunk = header.offset + _SCTP_HEADER
    if header.protocol != Protocol.SCTP or chunk + _CHUNK_HEADER > min(header.end, len(packet)):
        return False
    length = packet[chunk + 2] << 8 | packet[chunk + 3]
    return packet[chunk] == _INIT and chunk + length + -length % 4 >= header.end
