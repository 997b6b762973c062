# SPDX-License-Identifier: Apache-2.0
"""Packets in fragments, as scapy cuts them."""

from __future__ import annotations

from typing import cast

from scapy.layers.inet import IP, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, fragment6
from scapy.packet import Packet


def fragment_v4(packet: Packet, size: int) -> list[Packet]:
    """Return the fragments of an IPv4 packet, each with at most `size` bytes of payload."""
    return cast(list[Packet], fragment(packet, fragsize=size))  # type: ignore[no-untyped-call]


def fragment_segment(ends: tuple[str, str], segment: Packet, identification: int) -> list[Packet]:
    """Return a TCP segment of about 1,400 to 2,000 bytes, from one address to another, as fragments."""
    source, destination = ends
    if ":" not in source:
        return fragment_v4(IP(src=source, dst=destination) / segment, 720)
    whole = IPv6(src=source, dst=destination) / IPv6ExtHdrFragment(id=identification) / segment
    return cast(list[Packet], fragment6(whole, 1280))  # type: ignore[no-untyped-call]
