# SPDX-License-Identifier: Apache-2.0
"""UDP datagrams inside IP packets (RFC 768), and their surplus area (RFC 9868).

What lies between the end that the UDP header states and the end that the IP header states is the surplus area. A stack
that does not know it passes the user data alone to the application. It begins, at an even offset, with the option
checksum (OCS), which is made so that a checksum over the whole IP payload comes out right as well: that is what
conntrack and NAT on the way compute, and what they would otherwise call invalid. One option stands in it here, an
experimental one with an extended length:

    [0] | OCS 2 | kind 127 | 255 | length 2 | ExID 2 | content
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from enforcer_daemon.errors import PacketError
from enforcer_daemon.packet.checksum import complement, ones_sum
from enforcer_daemon.packet.ip import IPHeader, decode_ip, with_length

UDP = 17
UDP_HEADER = 8
OPTION_EXPERIMENT = 127
_EXTENDED = 255
_HEADER = Struct("!HHHH")
_OPTION = Struct("!HBBHH")
_OCS_BYTES = 2
_DONT_FRAGMENT = b"\x40\x00"
_FLOW_LABEL = 0xF_FFFF
SURPLUS_OVERHEAD = _OPTION.size
"""Bytes of the surplus area before the option's content, without the one that makes its offset even."""


class UDPDatagram(NamedTuple):
    """One UDP datagram and the packet it lies in; addresses as packed bytes."""

    packet: bytes
    src: bytes
    dst: bytes
    offset: int
    """Where the UDP header begins."""
    tail: int
    """Where the user data ends and the surplus area begins."""
    end: int
    """Where the packet ends by its IP header; beyond the bytes at hand where only the beginning was copied."""
    sport: int
    dport: int
    is_checksum_partial: bool = False
    """Whether the checksum is left to be made on the way out; a rewritten packet must have one."""
    is_gso: bool = False
    """Whether it is a send that will be cut into datagrams (UDP_SEGMENT) on the way out; it cannot be rewritten."""

    @property
    def has_surplus(self) -> bool:
        """Whether there is anything between the two ends."""
        return self.tail < self.end

    @property
    def payload(self) -> bytes:
        """Return the user data, as far as it is at hand."""
        return self.packet[self.offset + UDP_HEADER : self.tail]


class SurplusOption(NamedTuple):
    """The experimental option that a surplus area begins with."""

    exid: int
    content: bytes


def decode_udp(packet: bytes) -> UDPDatagram:
    """Read a packet that carries UDP; raise PacketError if lengths contradict each other or it is not UDP."""
    header = decode_ip(packet)
    if header.protocol != UDP:
        raise PacketError("not UDP")
    return decode_udp_datagram(packet, header)


def decode_udp_datagram(packet: bytes, header: IPHeader) -> UDPDatagram:
    """Read the UDP header of a packet whose IP header is known to announce one; raise PacketError."""
    src, dst, _, offset, end = header
    if offset + UDP_HEADER > min(end, len(packet)):
        raise PacketError("UDP header is truncated")
    sport, dport, length, _ = _HEADER.unpack_from(packet, offset)
    if length < UDP_HEADER or offset + length > end:
        raise PacketError(f"UDP length {length} contradicts the packet's")
    return UDPDatagram(packet, src, dst, offset, offset + length, end, sport, dport)


def find_option(datagram: UDPDatagram) -> SurplusOption | None:
    """Return the experimental option at the beginning of the surplus area; None if there is none that holds.

    The option checksum must be right, and the whole surplus area at hand.
    """
    packet, offset, tail, end = datagram.packet, datagram.offset, datagram.tail, datagram.end
    at = tail + ((tail - offset) & 1)
    if end > len(packet) or at + SURPLUS_OVERHEAD > end:
        return None
    _, kind, marker, length, exid = _OPTION.unpack_from(packet, at)
    if (kind, marker) != (OPTION_EXPERIMENT, _EXTENDED) or length != end - at - _OCS_BYTES:
        return None
    if at > tail and packet[tail]:
        return None
    if (ones_sum(packet[at:end]) + end - tail) % 0xFFFF:
        return None
    return SurplusOption(exid, packet[at + SURPLUS_OVERHEAD : end])


def encode_option(udp_length: int, exid: int, content: bytes) -> bytes:
    """Write the surplus area that follows a datagram of this UDP length."""
    padding = bytes(udp_length & 1)
    head = (OPTION_EXPERIMENT, _EXTENDED, SURPLUS_OVERHEAD - _OCS_BYTES + len(content), exid)
    length = len(padding) + SURPLUS_OVERHEAD + len(content)
    ocs = complement(ones_sum(_OPTION.pack(0, *head)) + ones_sum(content) + length)
    return padding + _OPTION.pack(ocs, *head) + content


def with_option(datagram: UDPDatagram, exid: int, content: bytes, marker: int | None = None) -> bytes:
    """Write the packet again with an option behind the user data, in place of any surplus area.

    `marker`: see `with_marker`. Raise PacketError if only the beginning of the packet is at hand, or it will be cut.
    """
    surplus = encode_option(datagram.tail - datagram.offset, exid, content)
    return _rewritten(datagram if marker is None else _marked(datagram, marker), surplus)


def with_marker(datagram: UDPDatagram, marker: int) -> bytes:
    """Write the packet again with a number of 16 bits at a fixed offset.

    It is the IPv4 identification, with DONT_FRAGMENT set, so that no fragments are taken for those of another packet
    (RFC 6864), or the IPv6 flow label. Raise PacketError as `with_option` does.
    """
    return _rewritten(_marked(datagram, marker), datagram.packet[datagram.tail : datagram.end])


def is_marked(packet: bytes, marker: int) -> bool:
    """Return whether a packet bears the number of `with_marker`."""
    if packet[0] >> 4 == 4:
        return packet[4:6] == marker.to_bytes(2, "big")
    return int.from_bytes(packet[1:4], "big") & _FLOW_LABEL == marker


def _marked(datagram: UDPDatagram, marker: int) -> UDPDatagram:
    packet = datagram.packet
    if packet[0] >> 4 == 4:
        head = packet[:4] + marker.to_bytes(2, "big") + _DONT_FRAGMENT + packet[8:]
    else:
        head = packet[:1] + (packet[1] & 0xF0).to_bytes(1, "big") + marker.to_bytes(2, "big") + packet[4:]
    return datagram._replace(packet=head)


def without_surplus(datagram: UDPDatagram) -> bytes:
    """Write the packet again as a stack that knows no surplus area reads it."""
    return _rewritten(datagram, b"")


def _rewritten(datagram: UDPDatagram, surplus: bytes) -> bytes:
    packet, offset, tail = datagram.packet, datagram.offset, datagram.tail
    if tail > len(packet):
        raise PacketError("only the beginning of the packet is at hand")
    if datagram.is_gso:
        raise PacketError("it will be cut into several datagrams")
    udp = packet[offset:tail]
    if datagram.is_checksum_partial:
        # Else it stays, since it covers the user data alone: to make it anew would repair what was damaged on the way.
        total = ones_sum(datagram.src + datagram.dst + udp[:6]) + ones_sum(udp[UDP_HEADER:]) + UDP + len(udp)
        udp = udp[:6] + complement(total).to_bytes(2, "big") + udp[UDP_HEADER:]
    return with_length(packet, offset, len(udp) + len(surplus)) + udp + surplus


def build_udp(src: bytes, dst: bytes, ports: tuple[int, int], payload: bytes = b"", surplus: bytes = b"") -> bytes:
    """Write a packet with a datagram: `ports` are source and destination."""
    length = UDP_HEADER + len(payload)
    if len(src) == 4:
        header = b"\x45\x00\x00\x00\x00\x00\x40\x00\x40\x11\x00\x00" + src + dst
    else:
        header = b"\x60\x00\x00\x00\x00\x00\x11\x40" + src + dst
    udp = _HEADER.pack(*ports, length, 0)
    checksum = complement(ones_sum(src + dst + udp) + ones_sum(payload) + UDP + length)
    ip_header = with_length(header, len(header), length + len(surplus))
    return ip_header + udp[:6] + checksum.to_bytes(2, "big") + payload + surplus
