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
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from enforcer_daemon.dataplane.netlink import (
    CT_DELETE,
    CT_GET,
    CTA_FILTER,
    CTA_FILTER_FLAGS,
    CTA_FILTER_SOURCE,
    CTA_ID,
    CTA_IP,
    CTA_STATUS,
    CTA_TUPLE_IP,
    CTA_TUPLE_ORIG,
    CTA_TUPLE_REPLY,
    CTA_ZONE,
    FAMILIES,
    IPS_SEEN_REPLY,
    NETLINK_NETFILTER,
    acknowledged,
    decode_attributes,
    dump,
    encode_attribute,
    encode_nested,
    encode_tuple,
    netfilter_attributes,
    netfilter_head,
    open_netlink,
)
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import IPAddress

MAX_REMOVED_AT_ONCE = 16_384
"""Entries that one call removes: about half a second. A pod can have a hundred thousand."""


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
                    acknowledged(sock, CT_DELETE, entry, (errno.ENOENT,))
                    removed += 1
    except OSError as err:
        raise DataplaneError(f"conntrack: {err}") from err
    return removed


def remove_flows(flows: Iterable[SentTuple]) -> None:
    """Remove the entries of single flows; one that is gone already is no error. Raises DataplaneError."""
    try:
        with open_netlink(NETLINK_NETFILTER) as sock:
            for flow in flows:
                acknowledged(sock, CT_DELETE, encode_flow(flow), (errno.ENOENT,))
    except OSError as err:
        raise DataplaneError(f"conntrack: {err}") from err


def encode_flow(flow: SentTuple) -> bytes:
    """Encode the request for a flow's entry: the kernel looks it up in both directions."""
    source, destination = (flow.source, flow.source_port), (flow.destination, flow.destination_port)
    named = encode_tuple(CTA_TUPLE_ORIG, flow.protocol, source, destination)
    return netfilter_head(FAMILIES[flow.source.version]) + named


def _entries_of(address: IPAddress, limit: int, is_answered: bool) -> Iterator[bytes]:
    """Yield the deletion request of each entry with the address, up to `limit` for each direction.

    Whatever NAT does, the address that opened a flow is the source of the original tuple, and the one that answers it
    the source of the reply tuple. Each dump walks the whole table, so there is none for the other two places.
    """
    sides = tuple(CTA_FILTER_FLAGS) if address.version == 4 else (CTA_TUPLE_ORIG,)
    for side in sides:
        request = encode_filter(address, side)
        if is_answered:  # Linux 5.13; an older one returns the others, too, which may be many more than `limit`.
            request += encode_attribute(CTA_STATUS, IPS_SEEN_REPLY.to_bytes(4, "big"))
        most = sys.maxsize if is_answered else limit
        for body in dump(NETLINK_NETFILTER, CT_GET, request, address.packed, most):
            if (deletion := decode_entry(body, address)) and (not is_answered or _had_reply(body)):
                yield deletion


def encode_filter(address: IPAddress, side: int) -> bytes:
    """Encode the request for all entries with an address as the source of the tuple of one direction.

    For IPv6: for all entries of IPv6.
    """
    head = netfilter_head(FAMILIES[address.version])
    if address.version == 6:
        return head
    source, _ = CTA_IP[address.version]
    flags = encode_attribute(CTA_FILTER_FLAGS[side], CTA_FILTER_SOURCE.to_bytes(4, sys.byteorder))
    wanted = encode_nested(side, encode_nested(CTA_TUPLE_IP, encode_attribute(source, address.packed)))
    return head + wanted + encode_nested(CTA_FILTER, flags)


def decode_entry(body: bytes, address: IPAddress) -> bytes | None:
    """Return the deletion request of an entry; None if the address is at no place of its tuples.

    The identifier makes sure that a later entry with the same tuple is not removed in its place.
    """
    entry = netfilter_attributes(body)
    original = entry.get(CTA_TUPLE_ORIG, b"")
    if not any(_has(tuple_, address) for tuple_ in (original, entry.get(CTA_TUPLE_REPLY, b""))):
        return None
    request = netfilter_head(body[0]) + encode_nested(CTA_TUPLE_ORIG, original)
    for kind in (CTA_ID, CTA_ZONE):
        if kind in entry:
            request += encode_attribute(kind, entry[kind])
    return request


def _had_reply(body: bytes) -> bool:
    status = netfilter_attributes(body).get(CTA_STATUS, b"")
    return bool(int.from_bytes(status, "big") & IPS_SEEN_REPLY)


def _has(data: bytes, address: IPAddress) -> bool:
    found = decode_attributes(decode_attributes(data).get(CTA_TUPLE_IP, b""))
    return any(found.get(kind) == address.packed for kind in CTA_IP[address.version])
