# SPDX-License-Identifier: Apache-2.0
"""What NetfilterQueue leaves out of the queue's messages: sends that pass uncut, and how a packet says that it is one.

Without NFQA_CFG_F_GSO the kernel cuts a send of many datagrams or segments (UDP_SEGMENT, TSO) for the queue. All its
parts share one entry of conntrack that is not in the table yet. Where another datagram of the flow is let go before,
that entry never gets there, and kernels since 6.12 drop whatever shares it on its way from the queue (net/netfilter/
nfnetlink_queue.c, nf_ct_drop_unconfirmed). Uncut, a send is one packet, and its checksum is not made yet.
"""

from __future__ import annotations

import socket

from enforcer_daemon.dataplane.netlink import (
    ATTRIBUTE,
    HEADER,
    NETFILTER,
    NFQA_CFG_F_GSO,
    NFQA_CFG_FLAGS,
    NFQA_CFG_MASK,
    NFQA_PAYLOAD,
    NFQA_SKB_INFO,
    NLM_F_REQUEST,
    QUEUE_CONFIG,
    encode_attribute,
    netfilter_head,
)
from enforcer_daemon.marks import CHECKSUM_PARTIAL, GSO

_INFO = ATTRIBUTE.pack(8, NFQA_SKB_INFO)
_FIRST_ATTRIBUTE = HEADER.size + NETFILTER.size


def encode_uncut(queue_number: int) -> bytes:
    """Write the request that sends come to the queue as they are."""
    flag = NFQA_CFG_F_GSO.to_bytes(4, "big")
    body = netfilter_head(socket.AF_UNSPEC, queue_number)
    body += encode_attribute(NFQA_CFG_MASK, flag) + encode_attribute(NFQA_CFG_FLAGS, flag)
    return HEADER.pack(HEADER.size + len(body), QUEUE_CONFIG, NLM_F_REQUEST, 0, 0) + body


def offloads(message: bytes) -> int:
    """Tell from a packet's message what is left to be done on its way out: CHECKSUM_PARTIAL and GSO, or 0."""
    if _INFO not in message:
        return 0
    at: int = _FIRST_ATTRIBUTE
    length: int
    kind: int
    while at + ATTRIBUTE.size <= len(message):
        length, kind = ATTRIBUTE.unpack_from(message, at)
        if kind == NFQA_SKB_INFO:
            return message[at + length - 1] & (CHECKSUM_PARTIAL | GSO)
        if kind == NFQA_PAYLOAD or length < ATTRIBUTE.size:
            return 0
        at += length + 3 & ~3
    return 0
