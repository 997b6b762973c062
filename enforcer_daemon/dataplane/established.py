# SPDX-License-Identifier: Apache-2.0
"""Released flows of a pod, as its conntrack holds them: list them, and end those that are no longer allowed.

To end a flow its socket is destroyed first, while its packets still pass, so that the RST of the pod's kernel reaches
the peer; then its mark is cleared, so that nothing more of it passes unjudged. The mark is what counts: where a socket
cannot be found or destroyed, the flow's next data meets the queue, and is answered with RST both ways. Sources:
linux/netfilter/nfnetlink_conntrack.h, linux/inet_diag.h, linux/sock_diag.h.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol as Interface

from enforcer_daemon.dataplane.netlink import (
    ATTRIBUTE,
    CT_GET,
    CT_NEW,
    CTA_MARK,
    CTA_TUPLE_ORIG,
    CTA_TUPLE_REPLY,
    DIAG_ANSWER,
    DIAG_ANY_STATE,
    DIAG_NO_COOKIE,
    DIAG_REQUEST,
    DIAG_SOCKET,
    FAMILIES,
    NETFILTER,
    NETLINK_NETFILTER,
    NETLINK_SOCK_DIAG,
    SOCK_DESTROY,
    SOCK_DIAG_BY_FAMILY,
    TCP_LISTEN,
    End,
    acknowledged,
    ask,
    decode_tuple,
    dump,
    encode_mark,
    encode_nested,
    netfilter_attributes,
    netfilter_head,
    open_netlink,
)
from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.dataplane.nodeflows import SentTuple, encode_flow
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.marks import INDEX_MASK, INDEX_SHIFT, NODE, OWN_MASK, RELEASED
from enforcer_daemon.model import IPAddress, Protocol

# The socket has ended meanwhile, or the kernel cannot do it (built without INET_DIAG_DESTROY).
_HARMLESS = (errno.ENOENT, errno.ESTALE, errno.EOPNOTSUPP)


_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")
"""Entries of the namespace of the thread that reads it."""


@dataclass(frozen=True, slots=True)
class ReleasedFlow:
    """One flow that goes on in the kernel, by its original direction as the pod sees it."""

    protocol: int
    source: IPAddress
    source_port: int
    destination: IPAddress
    destination_port: int
    index: int
    """What it was evaluated by: an index of the endpoint's flow table."""
    answering: End
    """Who answers: the destination, or the sidecar in the pod that the flow is redirected to."""
    tuple_attribute: bytes
    """CTA_TUPLE_ORIG, to name the entry again."""

    def sent_by(self, pod: Container[IPAddress]) -> SentTuple:
        """Return the flow by what a pod with these addresses sends in it."""
        ends = (self.source, self.source_port), (self.destination, self.destination_port)
        own, other = ends if self.source in pod else ends[::-1]
        return SentTuple(self.protocol, *own, *other)


class FlowEvaluator(Interface):
    """Who says which flows may go on."""

    def is_index_allowed(self, index: int) -> bool:
        """Return whether all flows of an index may go on; where that depends on the flow, they may not."""

    def is_ended(self, flow: ReleasedFlow) -> bool:
        """Return whether a flow may not go on. Asked only about flows of an index that is not allowed as a whole."""


def end_flows(netns_fd: int, evaluate: FlowEvaluator) -> list[ReleasedFlow]:
    """End the released flows of a namespace that may not go on; return them.

    Blocks while the table is read (some milliseconds for a thousand flows). Raises DataplaneError if the table
    cannot be read, or, after all others were ended, where some flow could not be. The flows of the node are not asked
    about: the node may always reach its pods.
    """
    return open_in(netns_fd, lambda: _end_flows(evaluate))


def end_masqueraded(netns_fd: int, is_ended: Callable[[ReleasedFlow], bool]) -> list[ReleasedFlow]:
    """End the flows that were let in as the node's and may not go on; return them.

    A client that the node masquerades comes under its address, and only the node's own conntrack knows his. Blocks and
    raises as `end_flows` does.
    """

    def end() -> list[ReleasedFlow]:
        flows = (decode_flow(body, NODE) for body in _dump(NODE))
        ended = [flow for flow in flows if flow is not None and is_ended(flow)]
        if ended:
            _end_all(ended)
        return ended

    return open_in(netns_fd, end)


@dataclass(frozen=True, slots=True)
class EndedIndexes:
    """Ends all flows of some indexes, and no other."""

    indexes: frozenset[int]

    def is_index_allowed(self, index: int) -> bool:
        """Return whether an index is none of them."""
        return index not in self.indexes

    def is_ended(self, flow: ReleasedFlow) -> bool:
        """Tell that none of these flows may go on."""
        return flow.index in self.indexes


def take_back(netns_fd: int, flows: Iterable[SentTuple]) -> list[SentTuple]:
    """Take the releases of flows back that the pod opened; return them. Their next packets go to the enforcer.

    A flow that was opened to the pod stays: only its opener can handshake again. Raises DataplaneError.
    """

    def take() -> list[SentTuple]:
        try:
            with open_netlink(NETLINK_NETFILTER) as sock:
                return [flow for flow in flows if _take_back(sock, flow)]
        except OSError as err:
            raise DataplaneError(f"conntrack: {err}") from err

    return open_in(netns_fd, take)


def _take_back(sock: socket.socket, flow: SentTuple) -> bool:
    body = ask(sock, CT_GET, encode_flow(flow), 1)
    found = None if body is None else decode_flow(body)
    if found is None or found.sent_by((found.source,)) != flow:
        return False
    _clear_mark(sock, found)
    return True


def highest_index(netns_fd: int) -> int:
    """Return the highest index in the marks of a namespace's released flows, 0 where there are none."""
    return open_in(netns_fd, lambda: max((_index_of(body) or 0 for body in _dump()), default=0))


def indexes_in_use(netns_fd: int) -> frozenset[int]:
    """Return the indexes in the marks of a namespace's released flows. Blocks as `end_flows` does."""
    return open_in(netns_fd, lambda: frozenset(index for body in _dump() if (index := _index_of(body)) is not None))


def list_released() -> list[ReleasedFlow]:
    """Return the released flows in the current network namespace, without those of the node."""
    return [flow for flow in map(decode_flow, _dump()) if flow is not None]


def _end_flows(evaluate: FlowEvaluator) -> list[ReleasedFlow]:
    ended = []
    for body in _dump():
        # A busy pod has thousands of flows of few indexes: only those in doubt are worth decoding.
        index = _index_of(body)
        if index is None or evaluate.is_index_allowed(index):
            continue
        flow = decode_flow(body)
        if flow is not None and evaluate.is_ended(flow):
            ended.append(flow)
    if ended:
        _end_all(ended)
    return ended


def _end_all(flows: list[ReleasedFlow]) -> None:
    failures: list[Exception] = []
    try:
        with open_netlink(NETLINK_SOCK_DIAG) as diag, open_netlink(NETLINK_NETFILTER) as conntrack:
            for flow in flows:
                for end, sock in ((_destroy, diag), (_clear_mark, conntrack)):
                    try:
                        end(sock, flow)
                    except (OSError, DataplaneError) as err:
                        failures.append(err)
    except OSError as err:
        raise DataplaneError(f"flows cannot be ended: {err}") from err
    if failures:
        raise DataplaneError(
            f"{len(failures)} errors while {len(flows)} flows were ended: {failures[0]}"
        ) from failures[0]


def _dump(opened_by: int = RELEASED) -> list[bytes]:
    """Return the entries with our mark: those that we released, or the node's.

    The kernel walks the table of all namespaces: 9 ms, however few there are.
    """
    if not _has_entries():
        return []
    try:
        request = netfilter_head(socket.AF_UNSPEC) + encode_mark(opened_by, RELEASED | NODE)
        return dump(NETLINK_NETFILTER, CT_GET, request)
    except OSError as err:
        raise DataplaneError(f"conntrack: {err}") from err


def _has_entries() -> bool:
    try:
        return int(_COUNT.read_text(encoding="ascii")) > 0
    except (OSError, ValueError):
        return True  # Not knowing, look.


def _index_of(body: bytes, opened_by: int = RELEASED) -> int | None:
    """Read the index out of an entry's mark; None for one that is of another kind.

    The kernel's filter by mark is a hint only: old kernels do not know it.
    """
    offset: int = NETFILTER.size
    while offset + 8 <= len(body):
        length, kind = ATTRIBUTE.unpack_from(body, offset)
        if kind == CTA_MARK:
            mark = int.from_bytes(body[offset + 4 : offset + 8], "big")
            return (mark & INDEX_MASK) >> INDEX_SHIFT if mark & (RELEASED | NODE) == opened_by else None
        if length < 4:
            raise DataplaneError(f"conntrack: attribute {kind} has length {length}")
        offset += (length + 3) & ~3
    return None


def decode_flow(body: bytes, opened_by: int = RELEASED) -> ReleasedFlow | None:
    """Decode an entry; None for one that is of another kind."""
    index = _index_of(body, opened_by)
    if index is None:
        return None
    entry = netfilter_attributes(body)
    original = entry.get(CTA_TUPLE_ORIG, b"")
    protocol, source, destination = decode_tuple(original)
    _, answering, _ = decode_tuple(entry.get(CTA_TUPLE_REPLY, b""))
    return ReleasedFlow(protocol, *source, *destination, index, answering, encode_nested(CTA_TUPLE_ORIG, original))


def _clear_mark(sock: socket.socket, flow: ReleasedFlow) -> None:
    """Take our bits from the connection; one that has ended meanwhile is no error."""
    body = netfilter_head(FAMILIES[flow.source.version]) + flow.tuple_attribute + encode_mark(0, OWN_MASK)
    acknowledged(sock, CT_NEW, body, (errno.ENOENT,))


def _destroy(sock: socket.socket, flow: ReleasedFlow) -> None:
    """End the pod's socket, whichever end of the original direction it is; one that is not there is no error."""
    if flow.protocol != Protocol.TCP:
        return
    one = (flow.source, flow.source_port)
    other = (flow.destination, flow.destination_port)
    pairs = {(one, other): None, (other, one): None, (flow.answering, one): None}
    for (local, local_port), (remote, remote_port) in pairs:
        ports = local_port.to_bytes(2, "big"), remote_port.to_bytes(2, "big")
        wanted = DIAG_SOCKET.pack(*ports, local.packed, remote.packed, 0, DIAG_NO_COOKIE, DIAG_NO_COOKIE)
        head = FAMILIES[local.version], flow.protocol, 0, 0, DIAG_ANY_STATE
        found = ask(sock, SOCK_DIAG_BY_FAMILY, DIAG_REQUEST.pack(*head, wanted), 1)
        if found is None:
            continue
        family, state, _, _, identifier = DIAG_ANSWER.unpack_from(found)
        # Where no socket has the flow any more, the kernel finds the one that listens on its port, which must live on.
        # The cookie in the identifier makes sure that what is destroyed is what was found.
        if state != TCP_LISTEN:
            # A socket for both families says AF_INET6 of its IPv4 connections too, and is named that way.
            acknowledged(sock, SOCK_DESTROY, DIAG_REQUEST.pack(family, *head[1:], identifier), _HARMLESS)
