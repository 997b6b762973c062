# SPDX-License-Identifier: Apache-2.0
"""Ask the node's conntrack for the other side of NAT: who opened a flow to a pod, and where a pod's flow leads.

A pod sees the address that a masquerade put in; the node's entry, found by the tuple that replies will have, also holds
the source that the flow came with. A pod that dials a Service sees the Service's address; the entry, found by what was
dialed, also holds the source of the replies. Source: linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Self

from enforcer_daemon.dataplane.netlink import (
    CT_GET,
    CTA_TUPLE_ORIG,
    CTA_TUPLE_REPLY,
    FAMILIES,
    NETLINK_NETFILTER,
    End,
    ask,
    decode_tuple,
    encode_tuple,
    netfilter_attributes,
    netfilter_head,
    open_netlink,
)
from enforcer_daemon.dataplane.nodeflows import SentTuple, encode_flow
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import IPAddress

_ANSWER_TIMEOUT_S = 1.0  # the kernel answers before send returns


class Conntrack:
    """The conntrack table of the network namespace in which this was opened."""

    __slots__ = ("_sequence", "_sock")

    def __init__(self) -> None:
        self._sock: socket.socket = open_netlink(NETLINK_NETFILTER)
        self._sock.settimeout(_ANSWER_TIMEOUT_S)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; a second time does nothing."""
        self._sock.close()

    def original_source(
        self, protocol: int, source: IPAddress, source_port: int, destination: IPAddress, destination_port: int
    ) -> IPAddress | None:
        """Return where the flow of a packet that the pod sees with these values came from, or None: no such flow.

        Raises DataplaneError if the kernel refuses the question or answers something else.
        """
        answer = self._ask(encode_request(protocol, source, source_port, destination, destination_port))
        return None if answer is None else decode_original_source(answer)

    def translated_destination(
        self, protocol: int, source: IPAddress, source_port: int, destination: IPAddress, destination_port: int
    ) -> End | None:
        """Return the address and port that replies to what a pod sends really come from, or None: no such flow.

        Raises DataplaneError if the kernel refuses the question or answers something else.
        """
        sent = SentTuple(protocol, source, source_port, destination, destination_port)
        answer = self._ask(encode_flow(sent))
        return None if answer is None else decode_replying(answer, sent)

    def _ask(self, request: bytes) -> bytes | None:
        self._sequence = (self._sequence + 1) & 0xFFFF_FFFF
        try:
            return ask(self._sock, CT_GET, request, self._sequence)
        except OSError as err:
            raise DataplaneError(f"conntrack: {err}") from err


def encode_request(
    protocol: int, source: IPAddress, source_port: int, destination: IPAddress, destination_port: int
) -> bytes:
    """Encode the request for the entry whose replies go back from `destination` to `source`."""
    replies = encode_tuple(CTA_TUPLE_REPLY, protocol, (destination, destination_port), (source, source_port))
    return netfilter_head(FAMILIES[source.version]) + replies


def decode_original_source(answer: bytes) -> IPAddress:
    """Decode the source of the original direction from an entry; raise DataplaneError if it is not there."""
    _, (source, _), _ = decode_tuple(netfilter_attributes(answer).get(CTA_TUPLE_ORIG, b""))
    return source


def decode_replying(answer: bytes, sent: SentTuple) -> End | None:
    """Decode the source of the reply direction of an entry; None if the flow was opened the other way.

    The kernel finds an entry by the tuple of either direction. Raises DataplaneError if the entry states no addresses.
    """
    entry = netfilter_attributes(answer)
    protocol, source, destination = decode_tuple(entry.get(CTA_TUPLE_ORIG, b""))
    if (protocol, *source, *destination) != sent:
        return None
    _, replying, _ = decode_tuple(entry.get(CTA_TUPLE_REPLY, b""))
    return replying
