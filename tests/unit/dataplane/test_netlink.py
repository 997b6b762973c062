# SPDX-License-Identifier: Apache-2.0
"""Netlink's attributes and messages, and the question to conntrack."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest

from enforcer_daemon.dataplane.conntrack import decode_original_source, decode_replying, encode_request
from enforcer_daemon.dataplane.netlink import (
    CTA_TUPLE_ORIG,
    CTA_TUPLE_REPLY,
    End,
    Message,
    decode_attributes,
    decode_messages,
    decode_tuple,
    encode_attribute,
    encode_tuple,
)
from enforcer_daemon.dataplane.nodeflows import SentTuple, decode_entry, encode_filter
from enforcer_daemon.errors import DataplaneError


def test_attributes_are_padded_and_found_again() -> None:
    row = encode_attribute(1, b"abc") + encode_attribute(2 | 0x8000, b"")
    assert row == struct.pack("=HH", 7, 1) + b"abc\0" + struct.pack("=HH", 4, 0x8002)
    assert decode_attributes(row) == {1: b"abc", 2: b""}


@pytest.mark.parametrize("length", [0, 3, 9])
def test_an_attribute_with_a_wrong_length_is_refused(length: int) -> None:
    with pytest.raises(DataplaneError, match=f"attribute 1 has length {length}"):
        decode_attributes(struct.pack("=HHI", length, 1, 0))


def test_messages_follow_each_other() -> None:
    one = struct.pack("=IHHII", 17, 3, 2, 7, 0) + b"x\0\0\0"
    two = struct.pack("=IHHII", 16, 2, 0, 8, 0)
    assert list(decode_messages(one + two)) == [Message(3, 2, 7, b"x"), Message(2, 0, 8, b"")]


@pytest.mark.parametrize(
    "data", [b"short", struct.pack("=IHHII", 15, 0, 0, 0, 0), struct.pack("=IHHII", 99, 0, 0, 0, 0)]
)
def test_a_message_that_does_not_fit_is_refused(data: bytes) -> None:
    with pytest.raises(DataplaneError, match="netlink: "):
        list(decode_messages(data))


def test_the_question_is_the_tuple_that_replies_have() -> None:
    request = encode_request(6, ip_address("10.0.0.1"), 4000, ip_address("10.0.0.2"), 80)
    assert request[:4] == b"\x02\0\0\0"
    reply = decode_attributes(decode_attributes(request[4:])[2])
    assert decode_attributes(reply[1]) == {1: ip_address("10.0.0.2").packed, 2: ip_address("10.0.0.1").packed}
    assert decode_attributes(reply[2]) == {1: b"\x06", 2: b"\x00\x50", 3: b"\x0f\xa0"}


def test_the_answer_states_the_original_source() -> None:
    for source, destination in (("10.0.0.3", "10.0.0.4"), ("fd00::3", "fd00::4")):
        ends = (ip_address(source), 4000), (ip_address(destination), 80)
        assert decode_original_source(bytes(4) + encode_tuple(CTA_TUPLE_ORIG, 6, *ends)) == ip_address(source)
        with pytest.raises(DataplaneError, match="no addresses"):
            decode_original_source(bytes(4) + encode_tuple(CTA_TUPLE_REPLY, 6, *ends))
    for useless in (b"", bytes(4)):
        with pytest.raises(DataplaneError, match="no addresses"):
            decode_original_source(useless)


@pytest.mark.parametrize("addresses", ["10.0.0.1 10.96.0.1 203.0.113.7", "fd00::1 fd00:96::1 2001:db8::7"])
def test_an_entry_states_where_the_node_sends_a_flow(addresses: str) -> None:
    pod, front, behind = map(ip_address, addresses.split())
    sent = SentTuple(6, pod, 4000, front, 443)
    opened = encode_tuple(CTA_TUPLE_ORIG, 6, (pod, 4000), (front, 443))
    answered = encode_tuple(CTA_TUPLE_REPLY, 6, (behind, 6443), (pod, 4000))
    assert decode_replying(bytes(4) + opened + answered, sent) == (behind, 6443)
    other_way = encode_tuple(CTA_TUPLE_ORIG, 6, (front, 443), (pod, 4000))
    assert decode_replying(bytes(4) + other_way + answered, sent) is None
    with pytest.raises(DataplaneError, match="no addresses"):
        decode_replying(bytes(4) + opened, sent)


@pytest.mark.parametrize("addresses", ["10.0.0.1 10.96.0.1", "fd00::1 fd00:96::1"])
def test_a_tuple_is_found_again(addresses: str) -> None:
    source, destination = map(ip_address, addresses.split())
    ends: tuple[End, End] = (source, 4000), (destination, 80)
    assert decode_tuple(decode_attributes(encode_tuple(CTA_TUPLE_ORIG, 17, *ends))[1]) == (17, *ends)


@pytest.mark.parametrize("ip", [{1: bytes(4)}, {2: bytes(4)}, {1: bytes(5), 2: bytes(5)}, {1: bytes(4), 4: bytes(16)}])
def test_a_tuple_without_two_addresses_of_one_family_is_refused(ip: dict[int, bytes]) -> None:
    with pytest.raises(DataplaneError, match="no addresses"):
        decode_tuple(encode_attribute(1, b"".join(encode_attribute(*each) for each in ip.items())))


def _tuple(protocol: int, source: str, destination: str, ports: tuple[int, int]) -> bytes:
    ends = (ip_address(source), ports[0]), (ip_address(destination), ports[1])
    return decode_attributes(encode_tuple(CTA_TUPLE_ORIG, protocol, *ends))[1]


def test_an_entry_is_named_by_its_tuple_zone_and_identifier() -> None:
    original = _tuple(6, "10.0.0.1", "10.96.0.1", (4000, 80))
    reply = _tuple(6, "10.0.0.2", "10.0.0.1", (8080, 4000))
    body = b"\x02\0\0\0" + encode_attribute(1 | 0x8000, original) + encode_attribute(2 | 0x8000, reply)
    body += encode_attribute(12, b"abcd") + encode_attribute(18, b"\0\7") + encode_attribute(8, bytes(4))
    for address in ("10.0.0.1", "10.0.0.2", "10.96.0.1"):
        request = decode_entry(body, ip_address(address))
        assert request is not None
        assert request[:4] == b"\x02\0\0\0"
        assert decode_attributes(request[4:]) == {1: original, 12: b"abcd", 18: b"\0\7"}
    assert decode_entry(body, ip_address("10.0.0.3")) is None


@pytest.mark.parametrize("side", [1, 2])
def test_a_dump_is_filtered_by_the_source_of_one_direction(side: int) -> None:
    request = encode_filter(ip_address("10.0.0.1"), side)
    wanted = decode_attributes(request[4:])
    assert request[0] == 2
    assert decode_attributes(decode_attributes(wanted[side])[1]) == {1: ip_address("10.0.0.1").packed}
    assert decode_attributes(wanted[25]) == {side: struct.pack("=I", 1)}
    assert encode_filter(ip_address("fd00::1"), side) == b"\x0a\0\0\0"  # The kernel's filter is wrong there.
