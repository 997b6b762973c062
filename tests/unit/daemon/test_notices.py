# SPDX-License-Identifier: Apache-2.0
"""What the guard tells of, as flows."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer_daemon.daemon.notices import is_in_connection, sent_tuple
from enforcer_daemon.dataplane.droplog import Notice, decode_notices
from enforcer_daemon.dataplane.netlink import encode_attribute
from enforcer_daemon.dataplane.nodeflows import SentTuple
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.packet.tcp import ACK, RST, SYN, build
from enforcer_daemon.packet.udp import build_udp

ENDS = {4: ("10.0.0.1", "10.0.0.2"), 6: ("fd00::1", "fd00::2")}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kept", [128, 1500])
def test_a_packet_of_which_only_the_beginning_is_told_gives_its_flow(version: int, kept: int) -> None:
    source, destination = map(ip_address, ENDS[version])
    packet = build_udp(source.packed, destination.packed, (4444, 53), bytes(1_000))
    assert sent_tuple(packet[:kept]) == SentTuple(17, source, 4444, destination, 53)
    syn = build(source.packed, destination.packed, (4444, 80), (1, 0), SYN, 100)
    assert sent_tuple(syn) == SentTuple(6, source, 4444, destination, 80)


def test_what_has_no_ports_gives_none() -> None:
    source, destination = map(ip_address, ENDS[4])
    packet = build_udp(source.packed, destination.packed, (4444, 53))
    assert sent_tuple(packet[:9] + b"\1" + packet[10:]) is None
    assert sent_tuple(packet[:22]) is None
    assert sent_tuple(b"") is None


@pytest.mark.parametrize("version", [4, 6])
def test_only_a_segment_that_opens_nothing_is_one_of_a_connection(version: int) -> None:
    source, destination = (ip_address(end).packed for end in ENDS[version])
    for flags, is_wanted in ((ACK, True), (RST | ACK, True), (SYN, False), (SYN | ACK, False)):
        packet = build(source, destination, (4444, 80), (1, 0), flags, 100)
        assert is_in_connection(packet) is is_wanted
        assert not is_in_connection(packet[: (20 if version == 4 else 40) + 13])
    assert not is_in_connection(build_udp(source, destination, (4444, 53), bytes(20)))


@given(st.binary(max_size=200))
def test_any_bytes_give_a_flow_or_none(packet: bytes) -> None:
    sent_tuple(packet)
    is_in_connection(packet)


def _message(kind: int, body: bytes) -> bytes:
    return (16 + len(body)).to_bytes(4, "little") + kind.to_bytes(2, "little") + bytes(10) + body


def test_the_kernels_messages_are_read() -> None:
    body = bytes(4) + encode_attribute(10, b"stray\0") + encode_attribute(9, b"packet")
    assert decode_notices(_message(0x0400, body) + _message(2, bytes(4))) == [Notice("stray", b"packet")]


@given(st.binary(max_size=100))
def test_any_bytes_give_notices_or_the_declared_error(data: bytes) -> None:
    with suppress(DataplaneError):
        decode_notices(data)
