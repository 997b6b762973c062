# SPDX-License-Identifier: Apache-2.0
"""Build packets of every form, right and wrong, from bytes: quick enough for a hundred thousand of them. Pure."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise

from enforcer_daemon.packet.checksum import complement, ones_sum

TCP, UDP = 6, 17
HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, NO_NEXT_HEADER, DESTINATION = 0, 43, 44, 51, 59, 60
MOBILITY, HIP, SHIM6 = 135, 139, 140
FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32
DONT_FRAGMENT, MORE_FRAGMENTS = 0x4000, 0x2000
ETHERTYPES = {4: b"\x08\x00", 6: b"\x86\xdd"}
IPV6_HEADER_BYTES = 40


def ipv4(
    addresses: tuple[bytes, bytes],
    protocol: int,
    payload: bytes,
    *,
    identification: int = 0,
    fragment: int = DONT_FRAGMENT,
    ttl: int = 64,
    options: bytes = b"",
    total_delta: int = 0,
    checksum_delta: int = 0,
) -> bytes:
    """Return an IPv4 packet; `addresses` are source and destination, the deltas make its own statements wrong."""
    options += bytes(-len(options) % 4)
    words = 5 + len(options) // 4
    total = words * 4 + len(payload) + total_delta
    head = struct.pack("!BBHHHBB", 0x40 | words, 0, total & 0xFFFF, identification, fragment, ttl, protocol)
    tail = addresses[0] + addresses[1] + options
    checksum = complement(ones_sum(head + tail)) + checksum_delta & 0xFFFF
    return head + checksum.to_bytes(2, "big") + tail + payload


def ipv6(
    addresses: tuple[bytes, bytes],
    next_header: int,
    payload: bytes,
    *,
    flow_label: int = 0,
    hop_limit: int = 64,
    length_delta: int = 0,
) -> bytes:
    """Return an IPv6 packet; `addresses` are source and destination, the delta makes its length wrong."""
    length = len(payload) + length_delta & 0xFFFF
    return struct.pack("!IHBB", 6 << 28 | flow_label, length, next_header, hop_limit) + b"".join(addresses) + payload


def transport_checksum(addresses: tuple[bytes, bytes], protocol: int, segment: bytes) -> int:
    """Return the checksum of TCP or UDP, whose own field is zero in `segment`."""
    return complement(ones_sum(addresses[0] + addresses[1]) + protocol + len(segment) + ones_sum(segment))


def tcp(
    addresses: tuple[bytes, bytes],
    ports: tuple[int, int],
    numbers: tuple[int, int],
    flags: int,
    payload: bytes = b"",
    options: bytes = b"",
    *,
    header_words: int | None = None,
    checksum_delta: int = 0,
) -> bytes:
    """Return a TCP segment; `numbers` are sequence and acknowledgement, `header_words` overrides the data offset."""
    options += bytes(-len(options) % 4)
    words = 5 + len(options) // 4 if header_words is None else header_words
    urgent = 7 if flags & URG else 0
    head = struct.pack("!HHIIHHHH", *ports, *numbers, words << 12 | flags, 64_240, 0, urgent)
    segment = head + options + payload
    checksum = transport_checksum(addresses, TCP, segment) + checksum_delta & 0xFFFF
    return segment[:16] + checksum.to_bytes(2, "big") + segment[18:]


def udp(
    addresses: tuple[bytes, bytes],
    ports: tuple[int, int],
    payload: bytes,
    surplus: bytes = b"",
    *,
    length_delta: int = 0,
    checksum: int | None = None,
    protocol: int = UDP,
) -> bytes:
    """Return a UDP datagram with what follows it inside the packet; `checksum` overrides the right one."""
    length = 8 + len(payload)
    head = struct.pack("!HHHH", *ports, length + length_delta & 0xFFFF, 0)
    if checksum is None:
        checksum = transport_checksum(addresses, protocol, head + payload) or 0xFFFF
    return head[:6] + checksum.to_bytes(2, "big") + payload + surplus


def ethernet(macs: tuple[bytes, bytes], ethertype: bytes, payload: bytes) -> bytes:
    """Return a frame; `macs` are destination and source."""
    return b"".join((*macs, ethertype, payload))


def extension(kind: int, next_header: int, content: bytes = b"") -> bytes:
    """Return an extension header of IPv6 of any kind, with its content padded to what its length can say."""
    if kind == FRAGMENT:
        return bytes((next_header, 0)) + (content or b"\0\0\0\0\0\7")[:6].ljust(6, b"\0")
    if kind == AUTHENTICATION:
        body = content + bytes(-(len(content) + 2) % 8 + 16)
        return bytes((next_header, (len(body) + 2) // 4 - 2)) + body
    if kind in (HOP_BY_HOP, DESTINATION) and not content:
        content = b"\x01\x04\0\0\0\0"  # PadN
    body = content + bytes(-(len(content) + 2) % 8)
    return bytes((next_header, (len(body) + 2) // 8 - 1)) + body


def chain(kinds: Sequence[int], last: int, contents: Sequence[bytes] = ()) -> tuple[int, bytes]:
    """Return the first next-header value and the bytes of a row of extension headers that ends with `last`."""
    if not kinds:
        return last, b""
    following = [*kinds[1:], last]
    given = [*contents, *[b""] * (len(kinds) - len(contents))]
    headers = b"".join(
        extension(kind, after, content) for kind, after, content in zip(kinds, following, given, strict=True)
    )
    return kinds[0], headers


def fragments(packet: bytes, cuts: Sequence[int], identification: int) -> list[bytes]:
    """Cut a packet without extension headers before the payload's bytes `cuts`, multiples of 8."""
    is_four = packet[0] >> 4 == 4
    header = (packet[0] & 15) * 4 if is_four else IPV6_HEADER_BYTES
    body, protocol = packet[header:], packet[9] if is_four else packet[6]
    addresses = (packet[12:16], packet[16:20]) if is_four else (packet[8:24], packet[24:40])
    edges, pieces = [0, *cuts, len(body)], []
    for start, end in pairwise(edges):
        more = end < len(body)
        if is_four:
            field = start // 8 | (MORE_FRAGMENTS if more else 0)
            piece = ipv4(
                addresses, protocol, body[start:end], identification=identification & 0xFFFF, fragment=field, ttl=64
            )
        else:
            content = struct.pack("!HI", start & ~7 | more, identification)
            piece = ipv6(addresses, FRAGMENT, extension(FRAGMENT, protocol, content) + body[start:end])
        pieces.append(piece)
    return pieces


def arp(operation: int, sender: tuple[bytes, bytes], target: tuple[bytes, bytes]) -> bytes:
    """Return an ARP message; sender and target are MAC and address."""
    return struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + b"".join((*sender, *target))


def icmpv6(addresses: tuple[bytes, bytes], kind: int, body: bytes) -> bytes:
    """Return an ICMPv6 message; `body` follows type, code and checksum."""
    message = bytes((kind, 0, 0, 0)) + body
    checksum = transport_checksum(addresses, 58, message)
    return message[:2] + checksum.to_bytes(2, "big") + message[4:]
