# SPDX-License-Identifier: Apache-2.0
"""Where the transport header begins, and which packets have none to evaluate."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.ipsec import AH

from enforcer_daemon.errors import PacketError
from enforcer_daemon.packet.ip import decode_ip
from enforcer_daemon.packet.tcp import announced_mss, decode_tcp, overhead, with_options_and_payload, without_fast_open
from enforcer_daemon.packet.transport import decode_datagram

V4 = IP(src="10.0.0.1", dst="10.0.0.2")
V6 = IPv6(src="fd00::1", dst="fd00::2")
SYN = TCP(sport=1, dport=2, flags="S")


def test_ipv4_with_and_without_options() -> None:
    plain = decode_ip(bytes(V4 / SYN))
    assert (plain.src, plain.dst, plain.protocol, plain.offset, plain.end) == (
        bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2)), 6, 20, 40,
    )  # fmt: skip
    assert decode_ip(bytes(IP(options=b"\x94\x04\0\0") / SYN)).offset == 24


@pytest.mark.parametrize(
    ("headers", "offset"),
    [
        (V6, 40),
        (V6 / IPv6ExtHdrHopByHop(), 48),
        (V6 / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting(), 64),
        (V6 / IPv6ExtHdrFragment(), 48),
        (V6 / AH(nh=6, payloadlen=4, icv=bytes(12)), 64),
    ],
    ids=["none", "hop-by-hop", "three", "atomic-fragment", "authentication"],
)
def test_ipv6_extension_headers(headers: IPv6, offset: int) -> None:
    found = decode_tcp(bytes(headers / SYN))
    assert (found.offset, found.sport, found.dport) == (offset, 1, 2)


@pytest.mark.parametrize("kind", [50, 59, 135, 139, 140, 253, 254])
def test_what_the_kernel_takes_for_a_protocol_is_not_walked_past(kind: int) -> None:
    """A rule for TCP must not release what a receiver hands to a socket of another protocol."""
    inside = bytes((6, 0)) + bytes(6) + bytes(SYN)
    for chain, offset in ((V6, 40), (V6 / IPv6ExtHdrHopByHop(), 48)):
        packet = chain.copy()
        packet.lastlayer().nh = kind
        assert decode_ip(bytes(packet / inside))[2:4] == (kind, offset)


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (b"", "shorter than a header"),
        (bytes(V4 / SYN)[:19], "shorter than a header"),
        (bytes(V6 / SYN)[:39], "shorter than a header"),
        (b"\x50" + bytes(60), "neither"),
        (b"\x44" + bytes(V4 / SYN)[1:], "contradict"),
        (b"\x4f" + bytes(V4 / SYN)[1:], "contradict"),
        (bytes(V4 / SYN)[:2] + b"\0\0" + bytes(V4 / SYN)[4:], "contradict"),
        (bytes(IP(flags="MF") / SYN), "fragment"),
        (bytes(IP(frag=1) / SYN), "fragment"),
        (bytes(IP(frag=0x1F00) / SYN), "fragment"),
        (bytes(V6 / IPv6ExtHdrFragment(m=1) / SYN), "fragment"),
        (bytes(V6 / IPv6ExtHdrFragment(offset=9) / SYN), "fragment"),
        (bytes(V6 / IPv6ExtHdrHopByHop())[:44], "truncated"),
        (bytes(V6 / IPv6ExtHdrHopByHop(len=30)), "longer than the packet"),
    ],
)
def test_what_has_no_transport_header_is_refused(packet: bytes, message: str) -> None:
    with pytest.raises(PacketError, match=message):
        decode_ip(packet)


def test_too_many_extension_headers_are_refused() -> None:
    headers = V6
    for _ in range(8):
        headers = headers / IPv6ExtHdrDestOpt()
    with pytest.raises(PacketError, match="too many"):
        decode_ip(bytes(headers / SYN))


@pytest.mark.parametrize(
    ("packet", "message"),
    [
        (bytes(V4 / UDP()), "not TCP"),
        (bytes(V4 / SYN)[:30], "truncated"),
        (bytes(V4 / TCP(dataofs=4)), "data offset"),
        (bytes(V4 / TCP(dataofs=15)), "data offset"),
    ],
)
def test_what_is_no_tcp_segment_is_refused(packet: bytes, message: str) -> None:
    with pytest.raises(PacketError, match=message):
        decode_tcp(packet)


def test_link_padding_is_no_payload() -> None:
    assert decode_tcp(bytes(V4 / SYN) + b"padding").payload == b""


def test_a_packet_that_was_cut_can_be_read_but_not_written() -> None:
    found = decode_tcp(bytes(V4 / SYN / b"0123456789")[:45])
    assert found.payload == b"01234"
    with pytest.raises(PacketError, match="beginning"):
        with_options_and_payload(found, b"", b"")


def test_flags_beside_the_checksum_and_the_urgent_pointer_survive() -> None:
    packet = bytes(V4 / TCP(sport=1, dport=2, flags="SEC", reserved=1, urgptr=7, options=[("MSS", 1460)]))
    found = decode_tcp(packet)
    written = with_options_and_payload(found, b"", b"frame")
    restored = with_options_and_payload(decode_tcp(written), found.options, b"")
    assert restored == packet


@pytest.mark.parametrize(
    ("packet", "ports"),
    [
        (bytes(V4 / UDP(sport=5, dport=6)), (5, 6)),
        (bytes(IP(proto=132) / bytes.fromhex("0005000600000000")), (5, 6)),
        (bytes(V4 / ICMP()), (None, None)),
    ],
)
def test_datagrams_and_their_ports(packet: bytes, ports: tuple[int | None, int | None]) -> None:
    found = decode_datagram(packet, decode_ip(packet))
    assert (found.sport, found.dport) == ports


def test_a_datagram_without_its_whole_header_is_refused() -> None:
    packet = bytes(V4 / UDP())[:27]
    with pytest.raises(PacketError, match="truncated"):
        decode_datagram(packet, decode_ip(packet))


@pytest.mark.parametrize(
    ("options", "cleaned"),
    [
        (b"\x22\x02\x01\x01", b"\x01" * 4),
        (b"\x22\x0acookie!!\x01\x01", b"\x01" * 12),
        (b"\xfe\x04\xf9\x89", b"\x01" * 4),
        (b"\xfe\x0c\xf9\x89cookie!!", b"\x01" * 12),
        (b"\xfe\x04\xf9\x88", b"\xfe\x04\xf9\x88"),
        (b"\xfd\x04\xf9\x89", b"\xfd\x04\xf9\x89"),
        (b"\x02\x04\x05\xb4\x22\x04ab\x22\x04cd", b"\x02\x04\x05\xb4" + b"\x01" * 8),
        (b"\x00\x22\x02\x01", b"\x00\x22\x02\x01"),
        (b"\x05\x00\x22\x02", b"\x05\x00\x22\x02"),
        (b"\x22", b"\x22"),
        (b"\x22\x09ab", b"\x22\x09ab"),
    ],
    ids=[
        "request", "cookie", "experimental-request", "experimental-cookie", "another-experiment", "another-kind",
        "two-of-them", "behind-the-end", "behind-a-malformed-one", "kind-alone", "too-long",
    ],
)  # fmt: skip
def test_fast_open_cookies_are_taken_off(options: bytes, cleaned: bytes) -> None:
    """Behind an end marker or a malformed option no kernel looks for one either."""
    assert without_fast_open(options) == cleaned


def test_the_announced_mss() -> None:
    assert announced_mss(b"\x01\x02\x04\x05\xb4") == 1_460
    assert announced_mss(b"\x02\x03\x05\x01") is None
    assert announced_mss(b"") is None


def test_headers_before_a_payload() -> None:
    assert (overhead(bytes(4)), overhead(bytes(16))) == (80, 100)
