# SPDX-License-Identifier: Apache-2.0
"""What NetfilterQueue leaves out of the queue's messages: sends that pass uncut, and how a packet says that it is one.

Without NFQA_CFG_F_GSO the kernel cuts a send of many datagrams or segments (UDP_SEGMENT, TSO) for the queue. All its
parts share one entry of conntrack that is not in the table yet. Where another datagram of the flow is let go before,
that entry never gets there, and kernels since 6.12 drop whatever shares it on its way from the queue (net/netfilter/
nfnetlink_queue.c, nf_ct_drop_unconfirmed). Uncut, a send is one packet, and its checksum is not made yet.
"""

from __future__ import annotations

from struct import Struct

from enforcer_daemon.dataplane.netlink import encode_attribute
from enforcer_daemon.marks import CUT, UNSUMMED

_HEADER = Struct("=IHHII")
_ATTRIBUTE = Struct("=HH")
_FAMILY_VERSION_QUEUE = Struct("!BBH")
_NLM_F_REQUEST = 1  # linux/netlink.h
_CONFIG = 3 << 8 | 2  # linux/netfilter/nfnetlink_queue.h: NFNL_SUBSYS_QUEUE, NFQNL_MSG_CONFIG
_CFG_MASK, _CFG_FLAGS, _CFG_F_GSO = 4, 5, 4
_NFQA_PAYLOAD, _NFQA_SKB_INFO = 10, 14
_INFO = _ATTRIBUTE.pack(8, _NFQA_SKB_INFO)
_FIRST_ATTRIBUTE = _HEADER.size + _FAMILY_VERSION_QUEUE.size


def encode_uncut(queue_number: int) -> bytes:
    """Write the request that sends come to the queue as they are."""
    flag = _CFG_F_GSO.to_bytes(4, "big")
    body = _FAMILY_VERSION_QUEUE.pack(0, 0, queue_number)
    body += encode_attribute(_CFG_MASK, flag) + encode_attribute(_CFG_FLAGS, flag)
    return _HEADER.pack(_HEADER.size + len(body), _CONFIG, _NLM_F_REQUEST, 0, 0) + body


def offloads(message: bytes) -> int:
    """Tell from a packet's message what is left to be done on its way out: UNSUMMED and CUT, or 0."""
    if _INFO not in message:
        return 0
    at: int = _FIRST_ATTRIBUTE
    length: int
    kind: int
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        if kind == _NFQA_SKB_INFO:
            return message[at + length - 1] & (UNSUMMED | CUT)
        if kind == _NFQA_PAYLOAD or length < _ATTRIBUTE.size:
            return 0
        at += length + 3 & ~3
    return 0
