# SPDX-License-Identifier: Apache-2.0
"""The builders make what they say: another implementation reads the same, and agrees with every checksum."""

from __future__ import annotations

import random
from ipaddress import ip_address

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.packet import Packet

from enforcer_daemon.handshake.datagrams import find_message
from enforcer_daemon.handshake.frames import MAGIC
from enforcer_daemon.packet.udp import decode_udp
from tests.attacks import packets
from tests.attacks.aim import Aim
from tests.attacks.expectations import IMPOSSIBLE, is_bare_syn, is_to_allowed_port
from tests.attacks.forms import FORMS

ADDRESSES = {
    4: (ip_address("10.0.0.1").packed, ip_address("203.0.113.7").packed),
    6: (ip_address("fd00::1").packed, ip_address("2001:db8::7").packed),
}
MARKER = b"\xa7abc\0\0\0\7"


def _aim(version: int, seed: int = 1, port: int = 8080) -> Aim:
    return Aim(version, ADDRESSES[version], (20_001, port), MARKER, random.Random(seed), b"o" * 500, b"c" * 500)


def _read(packet: bytes) -> Packet:
    return IP(packet) if packet[0] >> 4 == 4 else IPv6(packet)


def _rebuilt(packet: bytes) -> bytes:
    """Have the other implementation compute lengths and checksums anew."""
    read = _read(packet)
    for layer in (IP, TCP, UDP):
        if layer in read:
            del read[layer].chksum
    return bytes(read)


RIGHT = ("tcp-syn", "tcp-syn-framed", "tcp-syn-framed-own", "tcp-data", "tcp-fin", "udp", "udp-large", "udp-marked")


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("form", RIGHT)
def test_right_packets_are_right(form: str, version: int) -> None:
    (packet,) = FORMS[version][form](_aim(version))
    assert _rebuilt(packet) == packet


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("form", ["tcp-wrong-checksum", "udp-wrong-checksum"])
def test_wrong_checksums_are_wrong(form: str, version: int) -> None:
    (packet,) = FORMS[version][form](_aim(version))
    assert _rebuilt(packet) != packet


@pytest.mark.parametrize("version", [4, 6])
def test_every_form_carries_the_whole_marker_in_one_of_its_packets(version: int) -> None:
    for form, build in FORMS[version].items():
        for seed in range(20):
            built = build(_aim(version, seed))
            assert built
            whole = b"".join(packet[40:] if version == 6 else packet[20:] for packet in built)
            assert MARKER in whole or form in ("fragments-tcp-tiny", "tcp-short"), form


@pytest.mark.parametrize("version", [4, 6])
def test_messages_are_ones_that_an_enforcer_reads(version: int) -> None:
    for form in ("udp-offer-own", "udp-standalone-offer-own", "udp-standalone-again", "udp-proof"):
        (packet,) = FORMS[version][form](_aim(version))
        found = find_message(decode_udp(packet))
        assert found is not None
        assert found[0].startswith(MAGIC)


def test_fragments_become_the_packet_again() -> None:
    whole = packets.ipv6(ADDRESSES[6], packets.UDP, packets.udp(ADDRESSES[6], (1, 2), MARKER * 10))
    first, second = packets.fragments(whole, (64,), 7)
    pieces = [_read(piece)[IPv6ExtHdrFragment] for piece in (first, second)]
    assert [(piece.offset, piece.m, piece.id, piece.nh) for piece in pieces] == [(0, 1, 7, 17), (8, 0, 7, 17)]
    assert b"".join(bytes(piece.payload) for piece in pieces) == whole[40:]


def test_extension_headers_follow_one_another() -> None:
    first, headers = packets.chain((packets.HOP_BY_HOP, packets.DESTINATION), packets.UDP)
    packet = packets.ipv6(ADDRESSES[6], first, headers + packets.udp(ADDRESSES[6], (1, 5353), MARKER))
    read = _read(packet)
    assert [layer in read for layer in (IPv6ExtHdrHopByHop, IPv6ExtHdrDestOpt, UDP)] == [True] * 3
    assert is_to_allowed_port(packet)


def test_what_policy_allows_is_read_as_a_kernel_reads_it() -> None:
    for version in (4, 6):
        (syn,) = FORMS[version]["tcp-syn"](_aim(version))
        (other,) = FORMS[version]["tcp-syn"](_aim(version, port=8081))
        (hidden,) = FORMS[version]["protocol-135-tcp"](_aim(version))
        assert [is_to_allowed_port(packet) for packet in (syn, other, hidden)] == [True, False, False]
        assert is_bare_syn(syn)


def test_each_pattern_of_what_cannot_arrive_names_a_form() -> None:
    for line in IMPOSSIBLE:
        for pattern in line.forms:
            known = [form for version in line.versions for form in FORMS[version]]
            assert any(type(line)(line.why, [pattern], ["*"]).covers(form, "any", 4) for form in known), pattern
