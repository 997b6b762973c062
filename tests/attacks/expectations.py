# SPDX-License-Identifier: Apache-2.0
"""What the sweep accepts: arrivals that are not claimed to be stopped, and forms that can arrive nowhere. Pure.

Each line names its reason in plain words; docs/threat-model.md has the same under "Not claimed".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tests.attacks import packets
from tests.attacks import world as places
from tests.attacks.packets import RST, SYN, TCP
from tests.attacks.sweep import Arrival
from tests.attacks.world import Variant

Shape = Callable[[bytes], bool]


def is_bare_syn(packet: bytes) -> bool:
    """Return whether a packet is a SYN without data."""
    return _is_bare(packet) and _tcp_flags(packet) & 0x3F == SYN


def is_bare_reset(packet: bytes) -> bool:
    """Return whether a packet is a RST without data."""
    return _is_bare(packet) and bool(_tcp_flags(packet) & RST)


def is_anything(_: bytes) -> bool:
    """Accept every packet."""
    return True


def _transport(packet: bytes) -> tuple[int, int, int]:
    """Return protocol, offset of the transport header, and end, of a packet without extension headers."""
    if packet[0] >> 4 == 4:
        return packet[9], (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
    return packet[6], 40, 40 + int.from_bytes(packet[4:6], "big")


def _is_bare(packet: bytes) -> bool:
    protocol, offset, end = _transport(packet)
    return protocol == TCP and offset + (packet[offset + 12] >> 4) * 4 == end


def _tcp_flags(packet: bytes) -> int:
    return packet[_transport(packet)[1] + 13]


_EXTENSIONS = (packets.HOP_BY_HOP, packets.ROUTING, packets.FRAGMENT, packets.AUTHENTICATION, packets.DESTINATION)
"""What kernels step over to the transport header (ipv6_ext_hdr in net/ipv6/exthdrs_core.c)."""


def _walk(packet: bytes) -> tuple[int, int, bool]:
    """Return protocol and offset behind the extension headers, and whether it is a later fragment."""
    protocol, offset = packet[6], packets.IPV6_HEADER_BYTES
    while protocol in _EXTENSIONS and offset + 8 <= len(packet):
        kind, protocol = protocol, packet[offset]
        if kind == packets.FRAGMENT:
            if int.from_bytes(packet[offset + 2 : offset + 4], "big") & 0xFFF8:
                return protocol, offset, True
            offset += 8
        else:
            unit = 4 if kind == packets.AUTHENTICATION else 8
            offset += packet[offset + 1] * unit + 8
    return protocol, offset, False


def is_udp(packet: bytes) -> bool:
    """Return whether a packet is of UDP, as a kernel reads it."""
    return (packet[9] if packet[0] >> 4 == 4 else _walk(packet)[0]) == packets.UDP


@dataclass(frozen=True, slots=True)
class NotClaimed:
    """Arrivals that are not claimed to be stopped: patterns of forms, destinations and places, and what arrives."""

    why: str
    forms: Sequence[str]
    targets: Sequence[str]
    places: Sequence[str]
    shape: Shape = is_anything
    is_for: Callable[[Variant], bool] = lambda _: True
    has_plain_syns: bool = False
    """Whether a SYN without a frame is among them."""

    def covers(self, arrival: Arrival, variant: Variant) -> bool:
        """Return whether this line accepts the arrival."""
        return (
            self.is_for(variant)
            and (self.has_plain_syns or arrival.attempt.form not in PLAIN_SYNS)
            and _matches(arrival.attempt.form, self.forms)
            and _matches(arrival.attempt.target, self.targets)
            and _matches(arrival.place, self.places)
            and all(map(self.shape, arrival.packets))
        )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_switched_unseen(variant: Variant) -> bool:
    return not variant.is_bridge_filtered


ON_THE_BRIDGE = (
    "near-pod",
    "isolated-pod",
    "neighbor",
    "link-local",
    "broadcast",
    "subnet-broadcast",
    "multicast*",
    "all-nodes",
)
WITH_MESSAGE = ("udp-standalone-*", "udp-raw-magic", "ipv4-*options", "ipv6-*", "ip-*")
WITH_FRAME = ("tcp-syn-framed*", "fragments-tcp-framed", "ipv4-*options", "ipv6-*", "ip-*")
"""Forms that carry a message, or a frame, or may."""
PLAIN_SYNS = (
    "tcp-syn",
    "tcp-syn-options",
    "tcp-syn-data",
    "tcp-syn-fast-open",
    "tcp-syn-wrong-magic",
    "tcp-syn-ece-cwr",
)
"""Forms that are a SYN without a frame, which nothing lets pass."""

RESET_WHY = "a pod's enforcer resets what belongs to no connection, with its numbers; nothing else of it arrives"

FROM_CAGED: tuple[NotClaimed, ...] = (
    NotClaimed(
        "a machine inside the enforced networks that no enforcer serves receives messages without data",
        WITH_MESSAGE,
        ["neighbor"],
        [places.NEIGHBOR],
        is_udp,
    ),
    NotClaimed(
        "a bridge that netfilter does not see switches everything but SYNs to pods of its own",
        ["*"],
        ON_THE_BRIDGE,
        [places.NEAR, places.NEIGHBOR],
        is_for=_is_switched_unseen,
    ),
    NotClaimed(RESET_WHY, ["tcp-*"], ["*"], [places.NEAR, places.FAR, places.ISOLATED], is_bare_reset),
    NotClaimed(
        "the first bytes of a datagram or segment in fragments, on a bridge that netfilter does not see",
        ["unknown"],
        ["unknown"],
        [places.NEIGHBOR],
        is_for=_is_switched_unseen,
    ),
)


FROM_LABELLED: tuple[NotClaimed, ...] = (
    NotClaimed(
        "a SYN with the pod's own identity reaches the other pod's kernel without its data, before egress is evaluated",
        ["tcp-syn-framed-own"],
        ["near-pod", "far-pod", "service-pods", "dns-service", "node-port-*", "external-ip"],
        [places.NEAR, places.FAR],
        is_bare_syn,
    ),
    NotClaimed(
        "through a masquerade the identity in a SYN is not compared with its source address; no proof can follow it",
        ["tcp-syn-framed-copied"],
        ["node-port-*", "external-ip"],
        [places.NEAR, places.FAR],
        is_bare_syn,
    ),
    NotClaimed(
        "a machine inside the enforced networks that no enforcer serves receives frames",
        WITH_FRAME,
        ["neighbor"],
        [places.NEIGHBOR],
    ),
    NotClaimed(
        "only the other node knows where its node port leads: a frame reaches a port of that node's own",
        [*WITH_FRAME, *WITH_MESSAGE],
        ["node-port-other"],
        ["node:b"],
    ),
    *FROM_CAGED,
)
"""From a pod whose rules name pods."""


def is_to_allowed_port(packet: bytes) -> bool:
    """Return whether a packet is of TCP or UDP, to the port that policy allows, as a kernel reads it.

    A fragment that is not the first has no port: the node lets none pass before the whole is there.
    """
    if packet[0] >> 4 == 4:
        offset = (packet[0] & 15) * 4
        protocol, is_later = packet[9], bool(int.from_bytes(packet[6:8], "big") & 0x1FFF)
    else:
        protocol, offset, is_later = _walk(packet)
    if is_later:
        return protocol in places.ALLOWED_PORTS
    return int.from_bytes(packet[offset + 2 : offset + 4], "big") == places.ALLOWED_PORTS.get(protocol)


FROM_PARTLY: tuple[NotClaimed, ...] = (
    NotClaimed(
        "policy allows it",
        ["*"],
        ["outside", "service-outside"],
        [places.OUTSIDE],
        is_to_allowed_port,
        has_plain_syns=True,
    ),
    *FROM_CAGED,
)
"""From the pod that may send to the ports of one host."""
TO_SHUT: tuple[NotClaimed, ...] = (
    NotClaimed(RESET_WHY, ["tcp-*"], ["*"], [places.ISOLATED, places.FAR_ISOLATED], is_bare_reset),
)
"""To pods whose ingress nothing is allowed."""


@dataclass(frozen=True, slots=True)
class Impossible:
    """Forms that arrive nowhere at some destinations, whoever sends them."""

    why: str
    forms: Sequence[str]
    targets: Sequence[str]
    versions: Sequence[int] = (4, 6)

    def covers(self, form: str, target: str, version: int) -> bool:
        """Return whether this line is about the form at that destination."""
        return version in self.versions and _matches(form, self.forms) and _matches(target, self.targets)


ENFORCED = ("near-pod", "far-pod", "link-local", "service-pods", "external-ip")
TRANSLATED = ("service-pods", "service-nodes", "service-outside")
STRANGE_TCP = (
    "tcp-fin",
    "tcp-null",
    "tcp-rst",
    "tcp-rst-ack",
    "tcp-short",
    "tcp-syn-ack*",
    "tcp-syn-fin",
    "tcp-syn-rst",
)
IMPOSSIBLE: tuple[Impossible, ...] = (
    Impossible("no place has the address", ["*"], ["service-unknown-port", "unspecified"]),
    Impossible("the kernel takes nothing for its loopback address from a link", ["*"], ["loopback"], (6,)),
    Impossible("policy allows the pod no ingress", ["*"], ["isolated-pod"]),
    Impossible("a datagram that never becomes whole", ["fragments-*-only"], ["*"]),
    Impossible("the kernel refuses a wrong checksum of the header", ["ipv4-wrong-checksum"], ["*"]),
    Impossible("the kernel refuses a jumbogram that is none", ["ipv6-jumbogram"], ["*"]),
    Impossible(
        "the kernel refuses a first fragment without the whole transport header (RFC 8200, section 4.5)",
        ["fragments-tcp", "fragments-tcp-tiny", "ipv6-fragments-options"],
        ["*"],
        (6,),
    ),
    Impossible("routers refuse options that are malformed", ["ipv4-random-options"], ["*"]),
    Impossible(
        "its hops are used up on the way",
        ["ip-short-life"],
        ["far-pod", "other-node", "*outside", "node-port-*", "service-*", "external-*"],
    ),
    Impossible("translation leaves alone what conntrack calls invalid, or has no ports", STRANGE_TCP, TRANSLATED),
    Impossible(
        "translation leaves alone what conntrack calls invalid, or has no ports",
        [
            *("*-wrong-checksum", "*-wrong-length", "udp-raw-magic", "udp-surplus", "protocol-*"),
            *("tcp-random-flags", "ipv6-random-chain"),
        ],
        TRANSLATED,
    ),
    Impossible(
        "translation leaves alone what has no ports", ["ipv6-authentication", "ipv6-no-next-header"], TRANSLATED
    ),
    Impossible(
        "the receiving enforcer drops what belongs to no connection, and what is malformed",
        [*STRANGE_TCP, "tcp-ack", "ip-wrong-length", "udp-raw-magic"],
        ENFORCED,
    ),
    Impossible(
        "the receiving enforcer delivers nothing before the proof, and no frame that does not hold",
        ["tcp-syn-framed*", "fragments-tcp-framed", "udp-standalone-*", "udp-offer-*"],
        ENFORCED,
    ),
)


def unexplained(arrivals: Iterable[Arrival], variant: Variant, accepted: Sequence[NotClaimed]) -> list[Arrival]:
    """Return the arrivals that no line accepts."""
    return [arrival for arrival in arrivals if not any(line.covers(arrival, variant) for line in accepted)]
