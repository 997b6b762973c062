# SPDX-License-Identifier: Apache-2.0
"""Packets: any bytes are read or refused, and what is written again is right by another implementation's word."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, in4_chksum
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, in6_chksum

from enforcer_daemon.errors import PacketError
from enforcer_daemon.packet.checksum import ones_sum
from enforcer_daemon.packet.ip import decode_ip
from enforcer_daemon.packet.tcp import (
    announced_mss,
    build,
    decode_plain_segment,
    decode_tcp,
    walk_options,
    with_options_and_payload,
    with_payload,
    without_fast_open,
)
from enforcer_daemon.packet.transport import decode_datagram
from enforcer_daemon.packet.udp import (
    UDP_HEADER,
    SurplusOption,
    build_udp,
    decode_udp,
    find_option,
    with_option,
    without_surplus,
)

packets = st.one_of(
    st.binary(max_size=200),
    # Bytes that begin as an IP packet does get further.
    st.builds(
        lambda head, rest: bytes((head,)) + rest, st.sampled_from([0x45, 0x46, 0x4F, 0x60]), st.binary(max_size=200)
    ),
)
numbers = st.integers(0, 0xFFFF_FFFF)
ports = st.integers(0, 0xFFFF)
options = st.integers(0, 10).flatmap(lambda words: st.binary(min_size=words * 4, max_size=words * 4))
addresses = st.one_of(
    st.tuples(*[st.binary(min_size=4, max_size=4)] * 2), st.tuples(*[st.binary(min_size=16, max_size=16)] * 2)
)


@given(packets)
def test_any_bytes_are_read_or_refused(packet: bytes) -> None:
    for decode in (decode_ip, decode_tcp):
        with suppress(PacketError):
            decode(packet)


@given(packets)
def test_any_datagram_is_read_or_refused(packet: bytes) -> None:
    try:
        found = decode_datagram(packet, decode_ip(packet))
    except PacketError:
        return
    assert (found.sport is None) == (found.protocol not in (17, 132))


@given(packets)
def test_any_udp_is_read_or_refused_and_what_is_read_lies_inside_the_packet(packet: bytes) -> None:
    with suppress(PacketError):
        found = decode_udp(packet)
        assert 0 < found.offset + UDP_HEADER <= found.tail <= found.end
        assert found.payload in packet
        find_option(found)


@given(addresses, ports, ports, st.binary(max_size=64), st.binary(max_size=64), st.binary(max_size=9))
def test_a_surplus_area_is_found_again_and_a_checksum_over_all_of_the_packet_holds(
    ends: tuple[bytes, bytes], sport: int, exid: int, payload: bytes, content: bytes, other: bytes
) -> None:
    plain = build_udp(*ends, (sport, 53), payload)
    written = with_option(decode_udp(plain), exid, content)
    datagram = decode_udp(written)
    assert find_option(datagram) == SurplusOption(exid, content)
    assert datagram.payload == payload
    assert without_surplus(datagram) == plain
    assert with_option(decode_udp(build_udp(*ends, (sport, 53), payload, other)), exid, content) == written
    assert _checksum_of_scapy(17, plain, plain[datagram.offset :]) == 0
    # What conntrack computes: the pseudo-header's length is that of the whole IP payload.
    covered = written[datagram.offset :]
    assert (ones_sum(ends[0] + ends[1]) + ones_sum(covered) + 17 + len(covered)) % 0xFFFF == 0


@given(addresses, st.binary(max_size=40), st.data())
def test_a_changed_surplus_area_is_not_found(ends: tuple[bytes, bytes], payload: bytes, data: st.DataObject) -> None:
    written = with_option(decode_udp(build_udp(*ends, (1, 2), payload)), 1, b"content")
    at = data.draw(st.integers(decode_udp(written).tail, len(written) - 1))
    changed = written[:at] + bytes((written[at] ^ data.draw(st.integers(1, 254)),)) + written[at + 1 :]
    assert find_option(decode_udp(changed)) is None


@given(packets)
def test_what_is_read_lies_inside_the_packet(packet: bytes) -> None:
    try:
        found = decode_tcp(packet)
    except PacketError:
        return
    assert 20 <= found.offset < found.data <= min(found.end, len(packet))
    assert len(found.options) <= 40
    assert len(found.options) % 4 == 0


@given(packets | st.binary(min_size=40, max_size=80).map(lambda rest: b"\x45" + rest))
def test_the_short_way_reads_what_the_long_way_reads(packet: bytes) -> None:
    found = decode_plain_segment(packet)
    if found is not None:
        assert found == decode_tcp(packet)


@given(
    addresses, st.tuples(ports, ports), st.tuples(numbers, numbers), st.integers(0, 255), options, st.binary(max_size=9)
)
def test_the_short_way_is_that_of_every_plain_segment(
    ends: tuple[bytes, bytes], both: tuple[int, int], seq_ack: tuple[int, int], flags: int, extra: bytes, text: bytes
) -> None:
    packet = with_payload(decode_tcp(build(*ends, both, seq_ack, flags, 1, extra)), text)
    assert with_options_and_payload(decode_tcp(packet), extra, text, payload_sum=ones_sum(text)) == packet
    found = decode_plain_segment(packet)
    assert (found is None) == (len(ends[0]) == 16)
    for cut in range(len(packet)):
        assert decode_plain_segment(packet[:cut]) is None or decode_tcp(packet[:cut])


@given(addresses, st.tuples(ports, ports), st.tuples(numbers, numbers), st.integers(0, 255), ports, options)
def test_a_built_packet_is_what_scapy_reads(
    pair: tuple[bytes, bytes], both: tuple[int, int], seq_ack: tuple[int, int], flags: int, window: int, extra: bytes
) -> None:
    packet = build(*pair, both, seq_ack, flags, window, extra)
    assert decode_tcp(packet)[1:3] == pair
    assert _with_checksums_of_scapy(packet) == packet
    found = decode_tcp(packet)
    assert (found.sport, found.dport, found.seq, found.ack, found.flags, found.window, found.options) == (
        *both, *seq_ack, flags, window, extra,
    )  # fmt: skip


@given(addresses, options, st.binary(max_size=100), options, st.binary(max_size=100))
def test_other_options_and_payload_round_trip_with_right_checksums(
    pair: tuple[bytes, bytes], before: bytes, payload_before: bytes, after: bytes, payload_after: bytes
) -> None:
    original = with_options_and_payload(
        decode_tcp(build(*pair, (1, 2), (3, 4), 0x12, 5, before)), before, payload_before
    )
    written = with_options_and_payload(decode_tcp(original), after, payload_after)
    found = decode_tcp(written)
    assert (found.options, found.payload) == (after, payload_after)
    assert _with_checksums_of_scapy(written) == written
    assert with_options_and_payload(found, before, payload_before) == original


@given(st.lists(st.sampled_from([IPv6ExtHdrHopByHop, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment]), max_size=7), options)
def test_ipv6_extension_headers_are_walked_and_kept(kinds: list[type], extra: bytes) -> None:
    headers = IPv6(src="fd00::1", dst="fd00::2")
    for kind in kinds:
        headers = headers / kind()
    packet = bytes(headers / TCP(sport=1, dport=2, flags="S"))
    found = decode_tcp(packet)
    assert (found.sport, found.dport, found.offset) == (1, 2, 40 + 8 * len(kinds))
    written = with_options_and_payload(found, extra, b"payload")
    assert written[6 : found.offset] == packet[6 : found.offset]
    assert decode_tcp(written).payload == b"payload"
    assert int.from_bytes(written[4:6], "big") == len(written) - 40


def _checksum_of_scapy(protocol: int, packet: bytes, transport: bytes) -> int:
    checksum: int
    if packet[0] >> 4 == 4:
        checksum = in4_chksum(protocol, IP(packet), transport)
    else:
        checksum = in6_chksum(protocol, IPv6(packet), transport)  # type: ignore[no-untyped-call]
    return checksum


def _with_checksums_of_scapy(packet: bytes) -> bytes:
    """Let scapy compute every length and checksum anew."""
    parsed = IP(packet) if packet[0] >> 4 == 4 else IPv6(packet)
    if packet[0] >> 4 == 4:
        del parsed.chksum, parsed.len
    else:
        del parsed.plen
    tcp = parsed.payload
    raw = bytes(packet[len(packet) - len(bytes(tcp)) :])
    zeroed = raw[:16] + b"\0\0" + raw[18:]
    checksum = _checksum_of_scapy(6, packet, zeroed)
    parsed.remove_payload()
    head = bytes(packet[: len(packet) - len(raw)])
    rebuilt = bytes(parsed / raw)[: len(head)]
    return rebuilt + raw[:16] + checksum.to_bytes(2, "big") + raw[18:]


@given(st.binary(max_size=40))
def test_options_are_walked_within_bounds(text: bytes) -> None:
    for kind, at, length in walk_options(text):
        assert kind not in (0, 1)
        assert length >= 2
        assert at + length <= len(text)
    announced_mss(text)


@given(st.binary(max_size=40))
def test_no_fast_open_cookie_is_left_and_nothing_else_is_touched(text: bytes) -> None:
    cleaned = without_fast_open(text)
    assert len(cleaned) == len(text)
    for kind, at, _ in walk_options(cleaned):
        assert kind != 34
        assert not (kind == 254 and cleaned[at + 2 : at + 4] == b"\xf9\x89")
    kept = [(kind, at, n) for kind, at, n in walk_options(text) if (kind, at, n) in list(walk_options(cleaned))]
    assert all(text[at : at + n] == cleaned[at : at + n] for _, at, n in kept)
    assert without_fast_open(cleaned) == cleaned
