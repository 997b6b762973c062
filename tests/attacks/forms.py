# SPDX-License-Identifier: Apache-2.0
"""The forms of packets that the sweep sends: one function each, from an aim to the packets of one attempt. Pure.

Every packet of an attempt carries the attempt's marker, where a witness finds it: in the payload, in a TCP header's
numbers, in the nonce of a handshake's message, in a MAC. ICMP is open by design, so no form is of ICMP but those that
speak for a neighbor.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

from enforcer_daemon.handshake import frames
from enforcer_daemon.handshake.frames import MAGIC, SynFrame, encode_again, encode_proof, encode_syn, proof_option
from enforcer_daemon.packet.udp import encode_option
from tests.attacks import packets
from tests.attacks.aim import Aim, Form
from tests.attacks.packets import ACK, FIN, PSH, RST, SYN, TCP, UDP, URG

ALONE, BESIDE = 0x5453, 0x5452
"""ExIDs of a handshake's message in a datagram without and with user data."""
MSS = b"\x02\x04\x05\xb4"
MARKER_ID, MARKER_FLOW_LABEL = 0x5452, 0x05452
SCTP, UDP_LITE, DCCP = 132, 136, 33
OTHER_PROTOCOLS = (4, 33, 41, 46, 47, 50, 51, 89, 94, 103, 108, 112, 115, 132, 135, 136, 139, 140, 142, 143, 253, 255)
"""Protocols that are neither TCP, UDP, ICMP nor IGMP; for IPv6 some of them are extension headers."""


def _nonce(aim: Aim) -> bytes:
    return aim.marker + bytes(frames.NONCE_BYTES - len(aim.marker))


def _segment(flags: int, options: bytes = b"", payload: bytes = b"") -> Form:
    return lambda aim: [aim.wrap(TCP, aim.segment(flags, payload, options))]


def _framed(block: Callable[[Aim], bytes], flags: int = SYN, options: bytes = MSS) -> Form:
    def build(aim: Aim) -> Sequence[bytes]:
        return [aim.wrap(TCP, aim.segment(flags, encode_syn(SynFrame(_nonce(aim), block(aim))), options))]

    return build


def _garbage(aim: Aim) -> bytes:
    return aim.rng.randbytes(400)


def _syn_with_options(aim: Aim) -> Sequence[bytes]:
    options = aim.rng.choice((b"", MSS, MSS + b"\x01\x01\x04\x02", MSS + b"\x08\x0a" + bytes(8), b"\x01" * 40))
    return [aim.wrap(TCP, aim.segment(SYN, options=options))]


def _syn_with_wrong_magic(aim: Aim) -> Sequence[bytes]:
    wrong = bytearray(MAGIC)
    wrong[aim.rng.randrange(4)] ^= 1 << aim.rng.randrange(8)
    return [aim.wrap(TCP, aim.segment(SYN, bytes(wrong) + aim.rng.randbytes(400), MSS))]


def _magic_elsewhere(aim: Aim) -> Sequence[bytes]:
    return [aim.wrap(TCP, aim.segment(SYN, aim.rng.randbytes(4) + MAGIC + bytes(200), b"\x01" * 4 + MAGIC))]


def _random_flags(aim: Aim) -> Sequence[bytes]:
    return [aim.wrap(TCP, aim.segment(aim.rng.randrange(512), aim.data))]


def _random_tcp_options(aim: Aim) -> Sequence[bytes]:
    options = aim.rng.randbytes(aim.rng.choice((4, 8, 20, 40)))
    return [aim.wrap(TCP, aim.segment(aim.rng.choice((SYN, ACK, SYN | ACK)), options=options))]


def _tcp_with_wrong_checksum(aim: Aim) -> Sequence[bytes]:
    flags = aim.rng.choice((SYN, ACK | PSH, SYN | ACK))
    segment = packets.tcp(aim.addresses, aim.ports, aim.numbers, flags, aim.data, checksum_delta=1)
    return [aim.wrap(TCP, segment)]


def _tcp_with_wrong_offset(aim: Aim) -> Sequence[bytes]:
    words = aim.rng.choice((0, 1, 4, 6, 15))
    segment = packets.tcp(aim.addresses, aim.ports, aim.numbers, SYN, MAGIC, header_words=words)
    return [aim.wrap(TCP, segment)]


def _short_tcp(aim: Aim) -> Sequence[bytes]:
    return [aim.wrap(TCP, aim.segment(SYN)[: aim.rng.choice((12, 13, 14, 16, 19))])]


def _proof(aim: Aim) -> Sequence[bytes]:
    option = proof_option(aim.rng.randbytes(16), is_standalone=aim.rng.random() < 0.5)
    return [aim.wrap(TCP, aim.segment(ACK, aim.data, option))]


def _udp(aim: Aim) -> Sequence[bytes]:
    return [aim.wrap(UDP, aim.datagram(aim.data))]


def _large_udp(aim: Aim) -> Sequence[bytes]:
    return [aim.wrap(UDP, aim.datagram(aim.marker + bytes(1_300)))]


def _udp_with_wrong_checksum(aim: Aim) -> Sequence[bytes]:
    return [aim.wrap(UDP, packets.udp(aim.addresses, aim.ports, aim.data, checksum=1))]


def _udp_without_checksum(aim: Aim) -> Sequence[bytes]:
    return [aim.wrap(UDP, packets.udp(aim.addresses, aim.ports, aim.data, checksum=0))]


def _udp_with_wrong_length(aim: Aim) -> Sequence[bytes]:
    delta = aim.rng.choice((-12, -8, -1, 1, 4, 500))
    return [aim.wrap(UDP, packets.udp(aim.addresses, aim.ports, aim.data, length_delta=delta))]


def _surplus(aim: Aim) -> Sequence[bytes]:
    return [aim.wrap(UDP, aim.datagram(aim.data, aim.rng.randbytes(aim.rng.choice((1, 4, 30)))))]


def _with_marked_identification(aim: Aim) -> Sequence[bytes]:
    payload = aim.datagram(aim.data)
    if aim.version == 4:
        return [packets.ipv4(aim.addresses, UDP, payload, identification=MARKER_ID)]
    return [packets.ipv6(aim.addresses, UDP, payload, flow_label=MARKER_FLOW_LABEL)]


def _message(content: Callable[[Aim], bytes], *, is_alone: bool, is_marked: bool = False) -> Form:
    def build(aim: Aim) -> Sequence[bytes]:
        payload = b"" if is_alone else aim.data
        surplus = encode_option(8 + len(payload), ALONE if is_alone else BESIDE, content(aim))
        datagram = aim.datagram(payload, surplus)
        if aim.version == 6 and is_marked:
            return [packets.ipv6(aim.addresses, UDP, datagram, flow_label=MARKER_FLOW_LABEL)]
        return [aim.wrap(UDP, datagram, MARKER_ID if is_marked else 0)]

    return build


def _offer(block: Callable[[Aim], bytes]) -> Callable[[Aim], bytes]:
    return lambda aim: encode_syn(SynFrame(_nonce(aim), block(aim)), frames.TYPE_OFFER)


def _own(aim: Aim) -> bytes:
    return aim.own_block


def _copied(aim: Aim) -> bytes:
    return aim.copied_block


def _raw_magic(aim: Aim) -> Sequence[bytes]:
    """A datagram with the magic where the guard looks for it, and no option that is well formed."""
    surplus = aim.rng.randbytes(8) + MAGIC + aim.marker + bytes(40)
    return [aim.wrap(UDP, packets.udp(aim.addresses, aim.ports, b"", surplus))]


def _another_protocol(aim: Aim) -> Sequence[bytes]:
    return [aim.wrap(aim.rng.choice(OTHER_PROTOCOLS), aim.marker * 3 + bytes(16))]


def _ports_of_another_protocol(aim: Aim) -> Sequence[bytes]:
    """A header of ports under a protocol that may be read as one with ports."""
    protocol = aim.rng.choice((SCTP, UDP_LITE, DCCP, packets.MOBILITY, packets.HIP, packets.SHIM6))
    body = struct.pack("!HH", *aim.ports) + aim.marker * 3
    return [aim.wrap(protocol, body)]


def _tcp_behind_mobility(aim: Aim) -> Sequence[bytes]:
    """Bytes of TCP behind what looks like a mobility header; kernels take the whole for protocol 135."""
    first, headers = packets.chain((packets.MOBILITY,), TCP)
    return [aim.wrap(first, headers + aim.segment(SYN))]


def _tunnel(aim: Aim) -> Sequence[bytes]:
    inner = aim.wrap(UDP, aim.datagram(aim.data))
    if aim.rng.random() < 0.5:
        return [aim.wrap(4 if aim.version == 4 else 41, inner)]
    return [aim.wrap(47, b"\0\0" + packets.ETHERTYPES[aim.version] + inner)]


def _whole(aim: Aim) -> tuple[int, bytes]:
    """Return what extension headers or options are put before."""
    return aim.rng.choice(
        (
            (UDP, aim.datagram(aim.data)),
            (TCP, aim.segment(SYN)),
            (TCP, aim.segment(SYN, MAGIC + bytes(300))),
            (UDP, aim.datagram(b"", encode_option(8, ALONE, encode_again(_nonce(aim))))),
        )
    )


def _extended(kinds: Sequence[int], contents: Sequence[bytes] = ()) -> Form:
    def build(aim: Aim) -> Sequence[bytes]:
        last, payload = _whole(aim)
        first, headers = packets.chain(kinds, last, contents)
        return [packets.ipv6(aim.addresses, first, headers + payload)]

    return build


def _random_chain(aim: Aim) -> Sequence[bytes]:
    known = (packets.HOP_BY_HOP, packets.ROUTING, packets.FRAGMENT, packets.AUTHENTICATION, packets.DESTINATION)
    kinds = [
        aim.rng.choice((*known, packets.MOBILITY, packets.HIP, packets.SHIM6)) for _ in range(aim.rng.randint(1, 9))
    ]
    return _extended(kinds)(aim)


def _no_next_header(aim: Aim) -> Sequence[bytes]:
    return [packets.ipv6(aim.addresses, packets.NO_NEXT_HEADER, aim.marker * 3)]


def _routing_header(aim: Aim) -> Sequence[bytes]:
    """One that names a further stop: the destination that policy does not allow."""
    kind = aim.rng.choice((0, 2, 3, 4, 253))
    content = bytes((kind, 1, 0, 0, 0, 0)) + aim.addresses[1]
    return _extended((packets.ROUTING,), (content,))(aim)


def _jumbogram(aim: Aim) -> Sequence[bytes]:
    first, headers = packets.chain((packets.HOP_BY_HOP,), UDP, (b"\xc2\x04\x00\x01\x00\x00",))
    payload = headers + aim.datagram(aim.data)
    return [packets.ipv6(aim.addresses, first, payload, length_delta=-len(payload))]


_IP_OPTIONS = (
    b"\x01" * 4,
    b"\x94\x04\0\0",  # router alert
    b"\x07\x07\x04" + bytes(4),  # record route
    b"\x44\x0c\x05\0" + bytes(8),  # time stamps
    b"\x83\x07\x04" + bytes((127, 0, 0, 1)),  # loose source route
    b"\x89\x07\x04" + bytes((10, 0, 0, 1)),  # strict source route
    b"\x88\x04\0\1",  # stream identifier
    b"\x82\x0b" + bytes(9),  # security
)


def _ip_options(aim: Aim) -> Sequence[bytes]:
    protocol, payload = _whole(aim)
    return [packets.ipv4(aim.addresses, protocol, payload, options=aim.rng.choice(_IP_OPTIONS))]


def _random_ip_options(aim: Aim) -> Sequence[bytes]:
    protocol, payload = _whole(aim)
    return [packets.ipv4(aim.addresses, protocol, payload, options=aim.rng.randbytes(aim.rng.choice((4, 12, 40))))]


def _wrong_ip_length(aim: Aim) -> Sequence[bytes]:
    protocol, payload = _whole(aim)
    delta = aim.rng.choice((-30, -8, -1, 1, 64))
    if aim.version == 4:
        return [packets.ipv4(aim.addresses, protocol, payload, total_delta=delta)]
    return [packets.ipv6(aim.addresses, protocol, payload, length_delta=delta)]


def _wrong_ip_checksum(aim: Aim) -> Sequence[bytes]:
    protocol, payload = _whole(aim)
    return [packets.ipv4(aim.addresses, protocol, payload, checksum_delta=1)]


def _short_life(aim: Aim) -> Sequence[bytes]:
    protocol, payload = _whole(aim)
    left = aim.rng.choice((0, 1, 2))
    if aim.version == 4:
        return [packets.ipv4(aim.addresses, protocol, payload, ttl=left)]
    return [packets.ipv6(aim.addresses, protocol, payload, hop_limit=left)]


def _cut(payload: Callable[[Aim], tuple[int, bytes]], at: Sequence[int]) -> Form:
    def build(aim: Aim) -> list[bytes]:
        protocol, whole = payload(aim)
        packet = aim.wrap(protocol, whole)
        return packets.fragments(packet, at, aim.rng.getrandbits(32))

    return build


def _long_datagram(aim: Aim) -> tuple[int, bytes]:
    return UDP, aim.datagram(aim.marker * 40)


def _long_segment(aim: Aim) -> tuple[int, bytes]:
    return TCP, aim.segment(SYN, MAGIC + aim.marker * 40, MSS)


def _syn_segment(aim: Aim) -> tuple[int, bytes]:
    return TCP, aim.segment(SYN, options=MSS)


def _reversed(form: Form) -> Form:
    return lambda aim: list(form(aim))[::-1]


def _only(form: Form, *kept: int) -> Form:
    return lambda aim: [form(aim)[number] for number in kept]


def _overlapping(aim: Aim) -> Sequence[bytes]:
    whole = list(_cut(_long_datagram, (64, 128))(aim))
    number = aim.rng.getrandbits(32)
    return [*packets.fragments(aim.wrap(*_long_datagram(aim)), (64,), number), *whole[1:2]]


def _options_in_fragments(aim: Aim) -> Sequence[bytes]:
    """No piece but the last says that it is of TCP: the first ends with the options."""
    first, headers = packets.chain((packets.DESTINATION,), TCP)
    body = headers + aim.segment(SYN, options=b"\x01" * 8)
    packet = packets.ipv6(aim.addresses, first, body)
    return packets.fragments(packet, (8, 24), aim.rng.getrandbits(32))


def _atomic_then_more(aim: Aim) -> Sequence[bytes]:
    last, payload = _whole(aim)
    first, headers = packets.chain((packets.FRAGMENT, packets.DESTINATION), last, (b"\0\0" + aim.rng.randbytes(4),))
    return [packets.ipv6(aim.addresses, first, headers + payload)]


BOTH: Mapping[str, Form] = {
    "tcp-syn": _segment(SYN),
    "tcp-syn-options": _syn_with_options,
    "tcp-syn-data": _segment(SYN, MSS, b"x" * 600),
    "tcp-syn-fast-open": _segment(SYN, MSS + b"\x22\x0a" + bytes(8) + b"\x01\x01", b"early data"),
    "tcp-syn-framed": _framed(_garbage),
    "tcp-syn-framed-own": _framed(_own),
    "tcp-syn-framed-copied": _framed(_copied),
    "tcp-syn-framed-long-header": _framed(_garbage, options=b"\x01" * 40),
    "tcp-syn-wrong-magic": _syn_with_wrong_magic,
    "tcp-syn-magic-elsewhere": _magic_elsewhere,
    "tcp-syn-ece-cwr": _segment(SYN | 0xC0),
    "tcp-syn-ack": _segment(SYN | ACK, MSS),
    "tcp-syn-ack-framed": _framed(_copied, SYN | ACK),
    "tcp-syn-fin": _segment(SYN | FIN),
    "tcp-syn-rst": _segment(SYN | RST),
    "tcp-syn-psh-urg": _segment(SYN | PSH | URG),
    "tcp-ack": _segment(ACK),
    "tcp-data": _segment(ACK | PSH, b"", b"some data"),
    "tcp-data-framed": _framed(_own, ACK | PSH),
    "tcp-fin": _segment(FIN | ACK),
    "tcp-rst": _segment(RST),
    "tcp-rst-ack": _segment(RST | ACK),
    "tcp-null": _segment(0),
    "tcp-random-flags": _random_flags,
    "tcp-random-options": _random_tcp_options,
    "tcp-proof": _proof,
    "tcp-wrong-checksum": _tcp_with_wrong_checksum,
    "tcp-wrong-offset": _tcp_with_wrong_offset,
    "tcp-short": _short_tcp,
    "udp": _udp,
    "udp-large": _large_udp,
    "udp-wrong-checksum": _udp_with_wrong_checksum,
    "udp-no-checksum": _udp_without_checksum,
    "udp-wrong-length": _udp_with_wrong_length,
    "udp-surplus": _surplus,
    "udp-marked": _with_marked_identification,
    "udp-offer-own": _message(_offer(_own), is_alone=False),
    "udp-offer-copied": _message(_offer(_copied), is_alone=False),
    "udp-offer-marked": _message(_offer(_own), is_alone=False, is_marked=True),
    "udp-standalone-offer-own": _message(_offer(_own), is_alone=True),
    "udp-standalone-offer-copied": _message(_offer(_copied), is_alone=True),
    "udp-standalone-offer-garbage": _message(_offer(_garbage), is_alone=True),
    "udp-standalone-proof": _message(lambda aim: encode_proof(_nonce(aim), bytes(16)), is_alone=True),
    "udp-standalone-again": _message(lambda aim: encode_again(_nonce(aim)), is_alone=True),
    "udp-proof": _message(lambda aim: encode_proof(_nonce(aim), bytes(16)), is_alone=False),
    "udp-raw-magic": _raw_magic,
    "protocol-other": _another_protocol,
    "protocol-with-ports": _ports_of_another_protocol,
    "protocol-tunnel": _tunnel,
    "protocol-135-tcp": _tcp_behind_mobility,
    "ip-wrong-length": _wrong_ip_length,
    "ip-short-life": _short_life,
    "fragments-udp": _cut(_long_datagram, (64,)),
    "fragments-udp-many": _cut(_long_datagram, (8, 16, 64)),
    "fragments-udp-reversed": _reversed(_cut(_long_datagram, (64, 128))),
    "fragments-udp-overlapping": _overlapping,
    "fragments-udp-first-only": _only(_cut(_long_datagram, (64,)), 0),
    "fragments-udp-last-only": _only(_cut(_long_datagram, (64,)), 1),
    "fragments-tcp": _cut(_syn_segment, (16,)),
    "fragments-tcp-tiny": _cut(_syn_segment, (8,)),
    "fragments-tcp-framed": _cut(_long_segment, (24, 64)),
    "fragments-tcp-last-only": _only(_cut(_long_segment, (64,)), 1),
}
IPV4_ONLY: Mapping[str, Form] = {
    "ipv4-options": _ip_options,
    "ipv4-random-options": _random_ip_options,
    "ipv4-wrong-checksum": _wrong_ip_checksum,
}
IPV6_ONLY: Mapping[str, Form] = {
    "ipv6-hop-by-hop": _extended((packets.HOP_BY_HOP,)),
    "ipv6-destination-options": _extended((packets.DESTINATION,)),
    "ipv6-routing": _routing_header,
    "ipv6-authentication": _extended((packets.AUTHENTICATION,)),
    "ipv6-atomic-fragment": _extended((packets.FRAGMENT,)),
    "ipv6-atomic-fragment-options": _atomic_then_more,
    "ipv6-many-headers": _extended((packets.HOP_BY_HOP, packets.DESTINATION, packets.ROUTING, packets.DESTINATION)),
    "ipv6-random-chain": _random_chain,
    "ipv6-no-next-header": _no_next_header,
    "ipv6-jumbogram": _jumbogram,
    "ipv6-fragments-options": _options_in_fragments,
}
FORMS: Mapping[int, Mapping[str, Form]] = {4: {**BOTH, **IPV4_ONLY}, 6: {**BOTH, **IPV6_ONLY}}
"""By IP version."""
