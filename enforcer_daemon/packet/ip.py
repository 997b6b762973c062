# SPDX-License-Identifier: Apache-2.0
"""Where the transport header of an IP packet begins: IPv4 (RFC 791) and IPv6 with its extension headers (RFC 8200).

What counts as an extension header is what the kernel counts (ipv6_ext_hdr in net/ipv6/exthdrs_core.c), which conntrack,
iptables and nft follow: a header that only this module walked past would let a rule for TCP release another protocol.
The mobility header (135), HIP (139), Shim6 (140) and the experimental numbers (253, 254) are protocols to it, as are
ESP (50) and "no next header" (59). The authentication header is walked past, except by nft, which compares it as
protocol 51 and so lets less pass.
"""

from __future__ import annotations

from typing import NamedTuple

from enforcer_daemon.errors import PacketError

IPV4_MIN_HEADER = 20
IPV6_HEADER = 40
_MAX_EXTENSION_HEADERS = 8
"""More than any sane sender uses; a chain beyond it is refused, so that one packet cannot cost much."""

DONT_FRAGMENT = b"\x00\x00\x40\x00"
"""Identification, flags and offset of an IPv4 packet that routers must not cut; it needs no number (RFC 6864)."""
_HOP_BY_HOP = 0
_ROUTING = 43
_FRAGMENT = 44
_AUTHENTICATION = 51
_DESTINATION = 60
_EXTENSION_HEADERS = (_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION)


class IPHeader(NamedTuple):
    """The part of an IP header that the enforcer reads; addresses as packed bytes."""

    src: bytes
    dst: bytes
    protocol: int
    offset: int
    """Where the transport header begins."""
    end: int
    """Where the packet ends by its own header; what follows is link padding. Beyond the bytes at hand where the queue
    copied only the beginning of a packet."""


def decode_ip(packet: bytes) -> IPHeader:
    """Read the header; raise PacketError for anything truncated, inconsistent, or a fragment that is not the first."""
    length = len(packet)
    if length >= IPV4_MIN_HEADER and packet[0] >> 4 == 4:
        offset = (packet[0] & 0x0F) * 4
        end = packet[2] << 8 | packet[3]
        if offset < IPV4_MIN_HEADER or end < offset or offset > length:
            raise PacketError("IPv4 lengths contradict each other")
        if packet[6] & 0x3F or packet[7]:
            raise PacketError("IPv4 fragment")
        return IPHeader(packet[12:16], packet[16:20], packet[9], offset, end)
    if length >= IPV6_HEADER and packet[0] >> 4 == 6:
        return _decode_ipv6(packet)
    raise PacketError("neither IPv4 nor IPv6, or shorter than a header")


def _decode_ipv6(packet: bytes) -> IPHeader:
    end = IPV6_HEADER + (packet[4] << 8 | packet[5])
    protocol, offset = packet[6], IPV6_HEADER
    for _ in range(_MAX_EXTENSION_HEADERS):
        if protocol not in _EXTENSION_HEADERS:
            return IPHeader(packet[8:24], packet[24:40], protocol, offset, end)
        if offset + 8 > min(end, len(packet)):
            raise PacketError("IPv6 extension header is truncated")
        protocol, offset = packet[offset], offset + _extension_length(packet, protocol, offset)
        if offset > end:
            raise PacketError("IPv6 extension header is longer than the packet")
    raise PacketError("too many IPv6 extension headers")


def _extension_length(packet: bytes, kind: int, offset: int) -> int:
    if kind == _FRAGMENT:
        # The atomic fragment (offset 0, no more to come) is whole; any other part has no transport header to evaluate.
        if (packet[offset + 2] << 8 | packet[offset + 3]) & 0xFFF9:
            raise PacketError("IPv6 fragment")
        return 8
    if kind == _AUTHENTICATION:
        return (packet[offset + 1] + 2) * 4
    return (packet[offset + 1] + 1) * 8


def with_length(packet: bytes, offset: int, length: int, fragmentation: bytes = b"") -> bytes:
    """Copy the IP header (and extension headers) for a transport part of another length.

    `fragmentation`: an IPv4 packet's identification, flags and offset; empty: as the sender has them.
    """
    if packet[0] >> 4 == 6:
        return packet[:4] + (offset - IPV6_HEADER + length).to_bytes(2, "big") + packet[6:offset]
    head = packet[:2] + (offset + length).to_bytes(2, "big") + (fragmentation or packet[4:8]) + packet[8:10]
    tail = packet[12:offset]
    checksum = 0xFFFF - int.from_bytes(head + tail, "big") % 0xFFFF  # As `ones_sum` does; a header has no odd end.
    return head + checksum.to_bytes(2, "big") + tail
