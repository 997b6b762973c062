# SPDX-License-Identifier: Apache-2.0
"""Ask conntrack for the true source of a flow that was masqueraded on its way to a pod.

A pod sees the address that the host put in; the host's entry, found by the tuple that replies will have, also holds the
source that the flow came with. Source: linux/netfilter/nfnetlink_conntrack.h.
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
    ask,
    decode_tuple,
    encode_tuple,
    netfilter_attributes,
    netfilter_head,
    open_netlink,
)
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
        request = encode_request(protocol, source, source_port, destination, destination_port)
        self._sequence = (self._sequence + 1) & 0xFFFF_FFFF
        try:
            answer = ask(self._sock, CT_GET, request, self._sequence)
        except OSError as err:
            raise DataplaneError(f"conntrack: {err}") from err
        return None if answer is None else decode_original_source(answer)


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
