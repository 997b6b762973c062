# SPDX-License-Identifier: Apache-2.0
"""Forms that end on the attacker's own link: tags, other link protocols, and what speaks for a neighbor. Pure."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.attacks import packets
from tests.attacks.packets import UDP, ethernet

_BROADCAST = b"\xff" * 6
_ALL_NODES_MAC = b"\x33\x33\0\0\0\1"
_ALL_NODES = b"\xff\x02" + bytes(13) + b"\1"
ROUTER = b"\xfe\x80" + bytes(13) + b"\1"
"""The router that an attacker claims to be; no node has this address on a pod's link."""
ARP_TYPE, IP_TYPE = b"\x08\x06", packets.ETHERTYPES[4]


@dataclass(frozen=True, slots=True)
class LinkAim:
    """One attempt on the link: addresses by IP version."""

    marker: bytes
    rng: random.Random
    own_mac: bytes
    to: bytes
    """MAC of the pod that the attacker speaks to."""
    own: Mapping[int, bytes]
    target: Mapping[int, bytes]
    neighbor: Mapping[int, bytes]
    """Whose addresses the attacker claims."""

    def datagram(self, version: int) -> bytes:
        addresses = self.own[version], self.target[version]
        payload = packets.udp(addresses, (2_345, 5_353), self.marker * 3)
        return packets.ipv4(addresses, UDP, payload) if version == 4 else packets.ipv6(addresses, UDP, payload)

    @property
    def macs(self) -> tuple[bytes, bytes]:
        return self.to, self.own_mac


LinkForm = Callable[[LinkAim], tuple[bytes, ...]]


def _tagged(ethertype: bytes, vlan: int) -> LinkForm:
    def build(aim: LinkAim) -> tuple[bytes, ...]:
        tag = struct.pack("!H", vlan)
        versions = (4, 6)
        return tuple(
            ethernet(aim.macs, ethertype, tag + packets.ETHERTYPES[version] + aim.datagram(version))
            for version in versions
        )

    return build


def _typed(ethertype: bytes) -> LinkForm:
    return lambda aim: (ethernet(aim.macs, ethertype, aim.marker * 6),)


def _pppoe(aim: LinkAim) -> tuple[bytes, ...]:
    """A PPPoE session frame with IPv4 in it, which a bridge may be told to filter as IP."""
    inner = aim.datagram(4)
    session = struct.pack("!BBHHH", 0x11, 0, 1, len(inner) + 2, 0x0021)
    return (ethernet(aim.macs, b"\x88\x64", session + inner),)


def _wrong_version(aim: LinkAim) -> tuple[bytes, ...]:
    return (
        ethernet(aim.macs, packets.ETHERTYPES[4], aim.datagram(6)),
        ethernet(aim.macs, packets.ETHERTYPES[6], aim.datagram(4)),
    )


def _llc(aim: LinkAim) -> tuple[bytes, ...]:
    """An IEEE 802.3 frame with a length and a SNAP header in place of a type."""
    body = b"\xaa\xaa\x03\0\0\0" + packets.ETHERTYPES[4] + aim.datagram(4)
    return (ethernet(aim.macs, len(body).to_bytes(2, "big"), body),)


def _arp(operation: int, to: str) -> LinkForm:
    """State that the neighbor's address is at a MAC of the attacker's choice."""

    def build(aim: LinkAim) -> tuple[bytes, ...]:
        asked = aim.neighbor[4] if to == "gratuitous" else aim.target[4]
        message = packets.arp(operation, (_made_up_mac(aim), aim.neighbor[4]), (aim.to, asked))
        destination = _BROADCAST if to != "direct" else aim.to
        return (ethernet((destination, aim.own_mac), ARP_TYPE, message + aim.marker),)

    return build


def _made_up_mac(aim: LinkAim) -> bytes:
    return b"\x02" + aim.rng.randbytes(5)


def _advertisement(aim: LinkAim) -> tuple[bytes, ...]:
    body = b"\x20\0\0\0" + aim.neighbor[6] + b"\x02\x01" + _made_up_mac(aim)
    return _neighbor_discovery(aim, aim.own[6], aim.target[6], 136, body)


def _advertisement_to_all(aim: LinkAim) -> tuple[bytes, ...]:
    body = b"\x20\0\0\0" + aim.neighbor[6] + b"\x02\x01" + _made_up_mac(aim)
    return _neighbor_discovery(aim, aim.own[6], _ALL_NODES, 136, body)


def _duplicate_detection(aim: LinkAim) -> tuple[bytes, ...]:
    return _neighbor_discovery(aim, bytes(16), _ALL_NODES, 135, bytes(4) + aim.neighbor[6])


def _router_advertisement(aim: LinkAim) -> tuple[bytes, ...]:
    prefix = b"\x03\x04\x40\xc0" + b"\0\0\xff\xff" * 2 + bytes(4) + b"\x20\x01\x0d\xb8" + bytes(12)
    return _neighbor_discovery(aim, ROUTER, _ALL_NODES, 134, struct.pack("!BBHII", 64, 0, 1800, 0, 0) + prefix)


def _redirect(aim: LinkAim) -> tuple[bytes, ...]:
    return _neighbor_discovery(aim, ROUTER, aim.target[6], 137, bytes(4) + aim.neighbor[6] + aim.neighbor[6])


def _neighbor_discovery(aim: LinkAim, source: bytes, to: bytes, kind: int, body: bytes) -> tuple[bytes, ...]:
    # A nonce option (RFC 3971) that a receiver skips carries the marker.
    body += b"\x0e\x02" + aim.marker + bytes(6)
    addresses = source, to
    packet = packets.ipv6(addresses, 58, packets.icmpv6(addresses, kind, body), hop_limit=255)
    mac = aim.to if to == aim.target[6] else _ALL_NODES_MAC
    return (ethernet((mac, aim.own_mac), packets.ETHERTYPES[6], packet),)


LINK_FORMS: Mapping[str, LinkForm] = {
    "link-vlan": _tagged(b"\x81\x00", 7),
    "link-vlan-priority": _tagged(b"\x81\x00", 0xE000),
    "link-vlan-provider": _tagged(b"\x88\xa8", 7),
    "link-other-protocol": _typed(b"\x88\xb5"),
    "link-lldp": _typed(b"\x88\xcc"),
    "link-pppoe": _pppoe,
    "link-llc": _llc,
    "link-wrong-version": _wrong_version,
    "arp-reply": _arp(2, "direct"),
    "arp-request": _arp(1, "all"),
    "arp-gratuitous": _arp(1, "gratuitous"),
    "nd-advertisement": _advertisement,
    "nd-advertisement-to-all": _advertisement_to_all,
    "nd-duplicate-detection": _duplicate_detection,
    "nd-router-advertisement": _router_advertisement,
    "nd-redirect": _redirect,
}
"""None of these may leave a registered pod, isolated or not: they claim what is not the pod's, or are not IP."""
