# SPDX-License-Identifier: Apache-2.0
"""What a queue's message says of a packet's offloads; in tests/netns/test_queue.py a kernel writes it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer_daemon.dataplane.netlink import encode_attribute
from enforcer_daemon.dataplane.queuemessages import encode_uncut, offloads
from enforcer_daemon.marks import CHECKSUM_PARTIAL, GSO

HEAD = bytes(20) + encode_attribute(1, bytes(7)) + encode_attribute(5, bytes(4))
LOOKALIKE = encode_attribute(14, b"\0\0\0\3")


@pytest.mark.parametrize(
    ("info", "left_to_do"),
    [(0, 0), (1, CHECKSUM_PARTIAL), (2, GSO), (3, CHECKSUM_PARTIAL | GSO), (4, 0), (7, CHECKSUM_PARTIAL | GSO)],
)
def test_offloads(info: int, left_to_do: int) -> None:
    message = HEAD + encode_attribute(14, info.to_bytes(4, "big")) + encode_attribute(10, b"packet")
    assert offloads(message) == left_to_do


def test_what_a_packet_carries_says_nothing_of_it() -> None:
    assert offloads(HEAD + encode_attribute(10, LOOKALIKE)) == 0


@given(st.binary(max_size=200))
def test_any_bytes_have_an_answer(message: bytes) -> None:
    assert offloads(message) in range(4)
    assert offloads(message + LOOKALIKE) in range(4)


def test_the_request_that_sends_come_uncut() -> None:
    # struct nlmsghdr, struct nfgenmsg, NFQA_CFG_MASK and NFQA_CFG_FLAGS, as linux/netfilter/nfnetlink_queue.h has them.
    assert encode_uncut(0x0102)[4:] == bytes.fromhex(
        "0203 0100 00000000 00000000 0000 0102 0800 0400 00000004 0800 0500 00000004".replace(" ", "")
    )
