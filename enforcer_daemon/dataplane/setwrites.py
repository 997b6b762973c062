# SPDX-License-Identifier: Apache-2.0
"""Writes elements of the guard's sets of addresses in one transaction, without the nft program.

To start nft takes some milliseconds of the processor, and an address becomes fresh each time a policy ends flows, when
new connections are about to be evaluated. Source: linux/netfilter/nfnetlink.h (batches), linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from socket import AF_UNSPEC
from typing import NamedTuple

from enforcer_daemon.dataplane.netlink import (
    BATCH_BEGIN,
    BATCH_END,
    HEADER,
    NETLINK_NETFILTER,
    NFNL_SUBSYS_NFTABLES,
    NFT_DELSETELEM,
    NFT_NEWSETELEM,
    NFTA_DATA_VALUE,
    NFTA_LIST_ELEM,
    NFTA_LIST_ELEMENTS,
    NFTA_LIST_SET,
    NFTA_LIST_TABLE,
    NFTA_SET_ELEM_KEY,
    NFTA_SET_ELEM_TIMEOUT,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    decode_messages,
    encode_attribute,
    encode_nested,
    error_code,
    netfilter_head,
    open_netlink,
)
from enforcer_daemon.dataplane.tampering import NFPROTO_INET
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import IPAddress

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
        messages.append((NFT_NEWSETELEM, NLM_F_CREATE, added))  # Else to delete one that expired is an error.
        messages.append((NFT_DELSETELEM, 0, _element(table, each, with_timeout=False)))
        messages.append((NFT_NEWSETELEM, NLM_F_CREATE, added))
    if not messages:
        return
    batch = [_message(BATCH_BEGIN, 0, 0, netfilter_head(AF_UNSPEC, NFNL_SUBSYS_NFTABLES))]
    for number, (kind, flags, body) in enumerate(messages, 1):
        is_last = number == len(messages)
        batch.append(_message(kind, flags | (NLM_F_ACK if is_last else 0), number, body))
    batch.append(_message(BATCH_END, 0, 0, netfilter_head(AF_UNSPEC, NFNL_SUBSYS_NFTABLES)))
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
    return HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | flags, sequence, 0) + body


def _element(table: str, renewal: Renewal, *, with_timeout: bool) -> bytes:
    value = encode_attribute(NFTA_DATA_VALUE, renewal.address.packed)
    content = encode_nested(NFTA_SET_ELEM_KEY, value)
    if with_timeout:
        content += encode_attribute(NFTA_SET_ELEM_TIMEOUT, round(renewal.timeout_s * 1e3).to_bytes(8, "big"))
    element = encode_nested(NFTA_LIST_ELEM, content)
    body = netfilter_head(NFPROTO_INET)
    for kind, text in ((NFTA_LIST_TABLE, table), (NFTA_LIST_SET, f"{renewal.set_name}{renewal.address.version}")):
        body += encode_attribute(kind, text.encode() + b"\0")
    return body + encode_nested(NFTA_LIST_ELEMENTS, element)
