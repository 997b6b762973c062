# SPDX-License-Identifier: Apache-2.0
"""TCP segments inside IP packets (RFC 9293): reading, and writing the same packet with another payload or options.

Nothing here shifts a sequence number; what is added on one side is taken off on the other before a kernel sees it.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from enforcer_daemon.errors import PacketError
from enforcer_daemon.packet.checksum import complement, ones_sum
from enforcer_daemon.packet.ip import IPV4_MIN_HEADER, IPV6_HEADER, IPHeader, decode_ip, with_length

TCP = 6
TCP_MIN_HEADER = 20
TCP_MAX_HEADER = 60

FIN = 0x01
SYN = 0x02
RST = 0x04
PSH = 0x08
ACK = 0x10
SYN_ACK = SYN | ACK

OPTION_END = 0
OPTION_NOP = 1
OPTION_MSS = 2
OPTION_FAST_OPEN = 34
OPTION_EXPERIMENT_1 = 253
OPTION_EXPERIMENT_2 = 254
FAST_OPEN_EXID = b"\xf9\x89"
"""The experimental Fast Open option of RFC 7413, section 4.1.1."""

_HEADER = Struct("!HHIIBBHHH")
_PLAIN = Struct("!BxHxxHxBxx4s4sHHIIBBH")
"""Version and IHL, length, fragment, protocol, addresses; ports, numbers, data offset, flags, window."""
_PLAIN_VERSION, _FRAGMENT = 0x45, 0x3FFF
_REWRITTEN = Struct("!2sH4s2sH4s4s12sB3sH")
"""IPv4 and TCP header as far as the checksum: version and TOS, length, fragmentation, TTL and protocol, checksum,
addresses; ports and numbers, data offset, flags and window, checksum."""


class Segment(NamedTuple):
    """One TCP segment and the packet it lies in; addresses as packed bytes."""

    packet: bytes
    src: bytes
    dst: bytes
    offset: int
    """Where the TCP header begins."""
    data: int
    """Where the payload begins."""
    end: int
    """Where the payload ends."""
    sport: int
    dport: int
    seq: int
    ack: int
    flags: int
    """FIN, SYN, RST, PSH, ACK, URG, ECE, CWR as on the wire."""
    window: int

    @property
    def options(self) -> bytes:
        """Return the bytes between the fixed header and the payload."""
        return self.packet[self.offset + TCP_MIN_HEADER : self.data]

    @property
    def payload(self) -> bytes:
        """Return the segment's data."""
        return self.packet[self.data : self.end]


def decode_tcp(packet: bytes) -> Segment:
    """Read a packet that carries TCP; raise PacketError if lengths contradict each other or it is not TCP."""
    header = decode_ip(packet)
    if header.protocol != TCP:
        raise PacketError("not TCP")
    return decode_segment(packet, header)


def decode_segment(packet: bytes, header: IPHeader) -> Segment:
    """Read the TCP header of a packet whose IP header is known to announce one; raise PacketError."""
    src, dst, _, offset, end = header
    at_hand = len(packet)
    at_hand = end if end < at_hand else at_hand
    if offset + TCP_MIN_HEADER > at_hand:
        raise PacketError("TCP header is truncated")
    sport, dport, seq, ack, data_offset, flags, window, _, _ = _HEADER.unpack_from(packet, offset)
    data = offset + (data_offset >> 4) * 4
    if data < offset + TCP_MIN_HEADER or data > at_hand:
        raise PacketError("TCP data offset points outside the segment")
    return Segment(packet, src, dst, offset, data, end, sport, dport, seq, ack, flags, window)


def decode_plain_segment(packet: bytes) -> Segment | None:
    """Read a segment in IPv4 without options; None for all else, which `decode_ip` and `decode_segment` read."""
    at_hand = len(packet)
    if at_hand < IPV4_MIN_HEADER + TCP_MIN_HEADER:
        return None
    first, end, fragment, protocol, src, dst, sport, dport, seq, ack, data_offset, flags, window = _PLAIN.unpack_from(
        packet
    )
    data = IPV4_MIN_HEADER + (data_offset >> 4) * 4
    is_whole = IPV4_MIN_HEADER + TCP_MIN_HEADER <= data <= end and data <= at_hand and not fragment & _FRAGMENT
    if first != _PLAIN_VERSION or protocol != TCP or not is_whole:
        return None
    return Segment(packet, src, dst, IPV4_MIN_HEADER, data, end, sport, dport, seq, ack, flags, window)


def with_options_and_payload(
    segment: Segment, options: bytes, payload: bytes, fragmentation: bytes = b"", payload_sum: int | None = None
) -> bytes:
    """Write the segment again with these options (a multiple of 4 bytes, at most 40) and this payload.

    `fragmentation` is that of `with_length`, `payload_sum` the payload's `ones_sum` if it is known. Raise PacketError
    if only the beginning of the packet is at hand.
    """
    packet, offset = segment.packet, segment.offset
    if segment.end > len(packet):
        raise PacketError("only the beginning of the packet is at hand")
    header_length = TCP_MIN_HEADER + len(options)
    length = header_length + len(payload)
    data_offset = header_length << 2 & 0xF0 | packet[offset + 12] & 0x0F
    first, second = packet[offset : offset + 12], packet[offset + 13 : offset + 16]
    urgent = packet[offset + 18 : offset + 20]
    rest = urgent + options + payload
    addresses = int.from_bytes(segment.src + segment.dst, "big") % 0xFFFF
    summed, payload_sum = (rest, 0) if payload_sum is None else (urgent + options, payload_sum)
    # All before the payload is even.
    total = addresses + ones_sum(first + bytes((data_offset,)) + second + summed) + payload_sum + TCP + length
    checksum = 0xFFFF - total % 0xFFFF
    if offset != IPV4_MIN_HEADER:  # IPv6, or IPv4 with options.
        fixed = first + bytes((data_offset,)) + second
        return with_length(packet, offset, length, fragmentation) + fixed + checksum.to_bytes(2, "big") + rest
    fragmentation = fragmentation or packet[4:8]
    total = addresses + (packet[0] << 8 | packet[1]) + offset + length + (packet[8] << 8 | packet[9])
    header_checksum = 0xFFFF - (total + int.from_bytes(fragmentation, "big")) % 0xFFFF
    return (
        _REWRITTEN.pack(
            packet[:2], offset + length, fragmentation, packet[8:10], header_checksum, segment.src, segment.dst,
            first, data_offset, second, checksum,
        ) + rest
    )  # fmt: skip


def with_payload(segment: Segment, payload: bytes) -> bytes:
    """Write the segment again with another payload."""
    return with_options_and_payload(segment, segment.options, payload)


def build(
    src: bytes,
    dst: bytes,
    ports: tuple[int, int],
    numbers: tuple[int, int],
    flags: int,
    window: int,
    options: bytes = b"",
) -> bytes:
    """Write a packet with a segment without payload: `ports` are source and destination, `numbers` seq and ack."""
    length = TCP_MIN_HEADER + len(options)
    if len(src) == 4:
        header = b"\x45\x00\x00\x00\x00\x00\x40\x00\x40\x06\x00\x00" + src + dst
    else:
        header = b"\x60\x00\x00\x00\x00\x00\x06\x40" + src + dst
    tcp = _HEADER.pack(*ports, *numbers, length << 2 & 0xF0, flags, window, 0, 0) + options
    checksum = complement(ones_sum(src + dst + tcp) + TCP + length)
    return with_length(header, len(header), length) + tcp[:16] + checksum.to_bytes(2, "big") + tcp[18:]


def walk_options(options: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (kind, start, length) of each option but NOP; stop at the end marker or at the first malformed one."""
    at = 0
    while at < len(options):
        kind = options[at]
        if kind == OPTION_END:
            return
        if kind == OPTION_NOP:
            at += 1
            continue
        if at + 2 > len(options):
            return
        length = options[at + 1]
        if length < 2 or at + length > len(options):
            return
        yield kind, at, length
        at += length


def without_fast_open(options: bytes) -> bytes:
    """Overwrite Fast Open cookies with NOPs: data before the proof must not reach an application."""
    if OPTION_FAST_OPEN not in options and OPTION_EXPERIMENT_2 not in options:
        return options
    cleaned = options
    for kind, at, length in walk_options(options):
        is_experimental = kind == OPTION_EXPERIMENT_2 and options[at + 2 : at + 4] == FAST_OPEN_EXID
        if kind == OPTION_FAST_OPEN or is_experimental:
            cleaned = cleaned[:at] + bytes((OPTION_NOP,)) * length + cleaned[at + length :]
    return cleaned


def announced_mss(options: bytes) -> int | None:
    """Return the MSS option's value in bytes."""
    if options[:2] == b"\x02\x04":  # Where every kernel puts it.
        return options[2] << 8 | options[3] if len(options) >= 4 else None
    for kind, at, length in walk_options(options):
        if kind == OPTION_MSS and length == 4:
            return options[at + 2] << 8 | options[at + 3]
    return None


def overhead(address: bytes) -> int:
    """Return the most bytes of IP and TCP headers before a payload, without IP options or extension headers."""
    return (IPV4_MIN_HEADER if len(address) == 4 else IPV6_HEADER) + TCP_MAX_HEADER
