# SPDX-License-Identifier: Apache-2.0
"""Ask conntrack for the true source of a flow that was masqueraded on its way to a pod.

A pod sees the address that the host put in; the host's entry, found by the tuple that replies will have, also holds the
source that the flow came with. Source: linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from types import TracebackType
from typing import Self

from enforcer_daemon.dataplane.netlink import (
    NETLINK_NETFILTER,
    NLA_F_NESTED,
    ask,
    decode_attributes,
    encode_attribute,
    open_netlink,
)
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import IPAddress

_GET = 0x0101  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY = 1, 2
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_IP_V4_SRC, _CTA_IP_V4_DST, _CTA_IP_V6_SRC, _CTA_IP_V6_DST = 1, 2, 3, 4
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_NFGENMSG_BYTES = 4  # family, version, resource
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
            answer = ask(self._sock, _GET, request, self._sequence)
        except OSError as err:
            raise DataplaneError(f"conntrack: {err}") from err
        return None if answer is None else decode_original_source(answer)


def encode_request(
    protocol: int, source: IPAddress, source_port: int, destination: IPAddress, destination_port: int
) -> bytes:
    """Encode the request for the entry whose replies go back from `destination` to `source`."""
    family, kinds = (
        (socket.AF_INET, (_CTA_IP_V4_SRC, _CTA_IP_V4_DST))
        if source.version == 4
        else (socket.AF_INET6, (_CTA_IP_V6_SRC, _CTA_IP_V6_DST))
    )
    reply_ip = encode_attribute(kinds[0], destination.packed) + encode_attribute(kinds[1], source.packed)
    reply_ports = (
        encode_attribute(_CTA_PROTO_NUM, bytes((protocol,)))
        + encode_attribute(_CTA_PROTO_SRC_PORT, destination_port.to_bytes(2, "big"))
        + encode_attribute(_CTA_PROTO_DST_PORT, source_port.to_bytes(2, "big"))
    )
    return struct.pack("=BBH", family, 0, 0) + encode_attribute(
        _CTA_TUPLE_REPLY | NLA_F_NESTED,
        encode_attribute(_CTA_TUPLE_IP | NLA_F_NESTED, reply_ip)
        + encode_attribute(_CTA_TUPLE_PROTO | NLA_F_NESTED, reply_ports),
    )


def decode_original_source(answer: bytes) -> IPAddress:
    """Decode the source of the original direction from an entry; raise DataplaneError if it is not there."""
    entry = decode_attributes(answer[_NFGENMSG_BYTES:])
    addresses = decode_attributes(decode_attributes(entry.get(_CTA_TUPLE_ORIG, b"")).get(_CTA_TUPLE_IP, b""))
    packed = addresses.get(_CTA_IP_V4_SRC, addresses.get(_CTA_IP_V6_SRC))
    if packed is None or len(packed) not in (4, 16):
        raise DataplaneError("conntrack: the entry states no original source")
    return ipaddress.ip_address(packed)
