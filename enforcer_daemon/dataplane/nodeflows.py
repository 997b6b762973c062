# SPDX-License-Identifier: Apache-2.0
"""The node's own conntrack entries of pods' flows: removed when a pod goes, or when a flow is no longer allowed.

The guard lets pass what belongs to a flow that the node's conntrack knows. So a flow ends only when its entry is gone:
what is sent later opens a new flow, and the guard evaluates it. The kernel filters the dump of IPv4 by address (Linux
5.8; an older one returns the whole table). Its filter for IPv6 addresses returns all entries but those asked for
(ctnetlink_filter_match_tuple negates ipv6_addr_cmp, also in Linux 6.18), so IPv6 is filtered here. Source:
linux/netfilter/nfnetlink_conntrack.h, net/netfilter/nf_conntrack_netlink.c (filter flags).
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from enforcer_daemon.dataplane.netlink import (
    NETLINK_NETFILTER,
    NLA_F_NESTED,
    acknowledged,
    decode_attributes,
    dump,
    encode_attribute,
    open_netlink,
)
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import IPAddress

MAX_REMOVED_AT_ONCE = 16_384
"""Entries that one call removes: about half a second. A pod can have a hundred thousand."""

_CT_GET, _CT_DELETE = 0x0101, 0x0102  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET, _DELETE
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_STATUS, _CTA_ID, _CTA_ZONE, _CTA_FILTER = 1, 2, 3, 12, 18, 25
_SEEN_REPLY = struct.pack("!I", 1 << 1)  # IPS_SEEN_REPLY
_CTA_FILTER_FLAGS = {_CTA_TUPLE_ORIG: 1, _CTA_TUPLE_REPLY: 2}  # CTA_FILTER_ORIG_FLAGS, CTA_FILTER_REPLY_FLAGS
_CTA_FILTER_SOURCE = 1 << 0  # CTA_FILTER_FLAG(CTA_IP_SRC)
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_IP = {4: (1, 2), 6: (3, 4)}  # source, destination
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_NFGENMSG_BYTES = 4
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


class SentTuple(NamedTuple):
    """A flow by the packets that the pod sends in it, as the node sees them before any NAT."""

    protocol: int
    source: IPAddress
    source_port: int
    destination: IPAddress
    destination_port: int


def remove_of(addresses: Iterable[IPAddress], limit: int = MAX_REMOVED_AT_ONCE, is_answered: bool = False) -> int:
    """Remove the entries of the flows that one of the addresses opened or answers; return their number.

    With `is_answered` only of flows that had a reply: nobody makes these towards an address that he does not have. Call
    it again while it returns `limit`. Works on the current network namespace and blocks for some milliseconds.
    Raises DataplaneError.
    """
    removed = 0
    try:
        with open_netlink(NETLINK_NETFILTER) as sock:
            for address in addresses:
                for entry in _entries_of(address, limit, is_answered):
                    if removed == limit:
                        return removed
                    acknowledged(sock, _CT_DELETE, entry, (errno.ENOENT,))
                    removed += 1
    except OSError as err:
        raise DataplaneError(f"conntrack: {err}") from err
    return removed


def remove_flows(flows: Iterable[SentTuple]) -> None:
    """Remove the entries of single flows; one that is gone already is no error. Raises DataplaneError."""
    try:
        with open_netlink(NETLINK_NETFILTER) as sock:
            for flow in flows:
                body = struct.pack("=BBH", _FAMILIES[flow.source.version], 0, 0) + encode_tuple(flow)
                acknowledged(sock, _CT_DELETE, body, (errno.ENOENT,))
    except OSError as err:
        raise DataplaneError(f"conntrack: {err}") from err


def encode_tuple(flow: SentTuple) -> bytes:
    """Encode what names an entry: the kernel looks it up in both directions."""
    source, destination = _CTA_IP[flow.source.version]
    ip = encode_attribute(source, flow.source.packed) + encode_attribute(destination, flow.destination.packed)
    ports = encode_attribute(_CTA_PROTO_NUM, bytes((flow.protocol,)))
    ports += encode_attribute(_CTA_PROTO_SRC_PORT, flow.source_port.to_bytes(2, "big"))
    ports += encode_attribute(_CTA_PROTO_DST_PORT, flow.destination_port.to_bytes(2, "big"))
    return _nested(_CTA_TUPLE_ORIG, _nested(_CTA_TUPLE_IP, ip) + _nested(_CTA_TUPLE_PROTO, ports))


def _nested(kind: int, content: bytes) -> bytes:
    return encode_attribute(kind | NLA_F_NESTED, content)


def _entries_of(address: IPAddress, limit: int, is_answered: bool) -> Iterator[bytes]:
    """Yield the deletion request of each entry with the address, up to `limit` for each direction.

    Whatever NAT does, the address that opened a flow is the source of the original tuple, and the one that answers it
    the source of the reply tuple. Each dump walks the whole table, so there is none for the other two places.
    """
    sides = tuple(_CTA_FILTER_FLAGS) if address.version == 4 else (_CTA_TUPLE_ORIG,)
    for side in sides:
        request = encode_filter(address, side)
        if is_answered:  # Linux 5.13; an older one returns the others, too, which may be many more than `limit`.
            request += encode_attribute(_CTA_STATUS, _SEEN_REPLY)
        most = sys.maxsize if is_answered else limit
        for body in dump(NETLINK_NETFILTER, _CT_GET, request, address.packed, most):
            if (deletion := decode_entry(body, address)) and (not is_answered or _had_reply(body)):
                yield deletion


def encode_filter(address: IPAddress, side: int) -> bytes:
    """Encode the request for all entries with an address as the source of the tuple of one direction.

    For IPv6: for all entries of IPv6.
    """
    head = struct.pack("=BBH", _FAMILIES[address.version], 0, 0)
    if address.version == 6:
        return head
    source, _ = _CTA_IP[address.version]
    flags = encode_attribute(_CTA_FILTER_FLAGS[side], struct.pack("=I", _CTA_FILTER_SOURCE))
    wanted = _nested(side, _nested(_CTA_TUPLE_IP, encode_attribute(source, address.packed)))
    return head + wanted + _nested(_CTA_FILTER, flags)


def decode_entry(body: bytes, address: IPAddress) -> bytes | None:
    """Return the deletion request of an entry; None if the address is at no place of its tuples.

    The identifier makes sure that a later entry with the same tuple is not removed in its place.
    """
    entry = decode_attributes(body[_NFGENMSG_BYTES:])
    original = entry.get(_CTA_TUPLE_ORIG, b"")
    if not any(_has(tuple_, address) for tuple_ in (original, entry.get(_CTA_TUPLE_REPLY, b""))):
        return None
    request = body[:1] + bytes(_NFGENMSG_BYTES - 1) + _nested(_CTA_TUPLE_ORIG, original)
    for kind in (_CTA_ID, _CTA_ZONE):
        if kind in entry:
            request += encode_attribute(kind, entry[kind])
    return request


def _had_reply(body: bytes) -> bool:
    status = decode_attributes(body[_NFGENMSG_BYTES:]).get(_CTA_STATUS, b"")
    return bool(int.from_bytes(status, "big") & int.from_bytes(_SEEN_REPLY, "big"))


def _has(data: bytes, address: IPAddress) -> bool:
    found = decode_attributes(decode_attributes(data).get(_CTA_TUPLE_IP, b""))
    return any(found.get(kind) == address.packed for kind in _CTA_IP[address.version])
