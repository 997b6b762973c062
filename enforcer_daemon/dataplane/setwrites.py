# SPDX-License-Identifier: Apache-2.0
"""Writes elements of the guard's sets of addresses in one transaction, without the nft program.

To start nft takes some milliseconds of the processor, and an address becomes fresh each time a policy ends flows, when
new connections are about to be evaluated. Source: linux/netfilter/nfnetlink.h (batches), linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from typing import NamedTuple

from enforcer_daemon.dataplane.netlink import (
    NETLINK_NETFILTER,
    NLA_F_NESTED,
    NLM_F_ACK,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    decode_messages,
    encode_attribute,
    error_code,
    open_netlink,
)
from enforcer_daemon.dataplane.tampering import NFPROTO_INET
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import IPAddress

_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END = 16, 17  # NFNL_MSG_BATCH_BEGIN, _END
_NEW, _DELETE = (_SUBSYSTEM << 8) | 12, (_SUBSYSTEM << 8) | 14  # NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_LIST_ELEMENT, _KEY, _TIMEOUT, _VALUE = 1, 1, 4, 1
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_GENMSG = struct.Struct("!BBH")  # family, version, resource
_NLM_F_CREATE = 0x400
_RECEIVE_BYTES = 65_536


class Renewal(NamedTuple):
    """An element whose time is to begin, whether it is there or not."""

    set_name: str
    address: IPAddress
    timeout_s: float


def renew(table: str, renewals: Iterable[Renewal]) -> None:
    """Let the times of elements of a table of family inet begin; raise DataplaneError, and nothing has changed then."""
    messages: list[tuple[int, int, bytes]] = []
    for each in renewals:
        added = _element(table, each, with_timeout=True)
        messages.append((_NEW, _NLM_F_CREATE, added))  # Else to delete one that expired is an error.
        messages.append((_DELETE, 0, _element(table, each, with_timeout=False)))
        messages.append((_NEW, _NLM_F_CREATE, added))
    if not messages:
        return
    batch = [_message(_BATCH_BEGIN, 0, 0, _GENMSG.pack(0, 0, _SUBSYSTEM))]
    for number, (kind, flags, body) in enumerate(messages, 1):
        is_last = number == len(messages)
        batch.append(_message(kind, flags | (NLM_F_ACK if is_last else 0), number, body))
    batch.append(_message(_BATCH_END, 0, 0, _GENMSG.pack(0, 0, _SUBSYSTEM)))
    _transact(b"".join(batch), len(messages))


def _transact(batch: bytes, last: int) -> None:
    try:
        with open_netlink(NETLINK_NETFILTER) as sock:
            sock.send(batch)
            while True:
                for message in decode_messages(sock.recv(_RECEIVE_BYTES)):
                    if message.kind != NLMSG_ERROR:
                        continue
                    if code := error_code(message.body):
                        raise DataplaneError(f"nf_tables: element {message.sequence}: {os.strerror(code)}")
                    if message.sequence == last:
                        return
    except OSError as err:
        raise DataplaneError(f"nf_tables: {err}") from err


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return _HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | flags, sequence, 0) + body


def _element(table: str, renewal: Renewal, *, with_timeout: bool) -> bytes:
    value = encode_attribute(_VALUE, renewal.address.packed)
    content = encode_attribute(_KEY | NLA_F_NESTED, value)
    if with_timeout:
        content += encode_attribute(_TIMEOUT, round(renewal.timeout_s * 1e3).to_bytes(8, "big"))
    element = encode_attribute(_LIST_ELEMENT | NLA_F_NESTED, content)
    body = _GENMSG.pack(NFPROTO_INET, 0, 0)
    for kind, text in ((_LIST_TABLE, table), (_LIST_SET, f"{renewal.set_name}{renewal.address.version}")):
        body += encode_attribute(kind, text.encode() + b"\0")
    return body + encode_attribute(_LIST_ELEMENTS | NLA_F_NESTED, element)
