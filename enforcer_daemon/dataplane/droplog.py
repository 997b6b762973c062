# SPDX-License-Identifier: Apache-2.0
"""What the guard tells of packets: the first bytes of each, and what became of it.

The guard limits how many packets of one pod it tells of; what this socket has no room for is lost, and told again with
the flow's next packet. Source: linux/netfilter/nfnetlink_log.h.
"""

from __future__ import annotations

import socket
import struct
from types import TracebackType
from typing import NamedTuple, Self

from enforcer_daemon.dataplane.guard_rules import LOG_GROUP, LOGGED_BYTES
from enforcer_daemon.dataplane.netlink import (
    LOG_CONFIG,
    LOG_PACKET,
    NETLINK_NETFILTER,
    NFULA_CFG_CMD,
    NFULA_CFG_MODE,
    NFULA_CFG_QTHRESH,
    NFULA_PAYLOAD,
    NFULA_PREFIX,
    NFULNL_CFG_CMD_BIND,
    NFULNL_COPY_PACKET,
    acknowledged,
    decode_messages,
    encode_attribute,
    netfilter_attributes,
    netfilter_head,
    open_netlink,
)
from enforcer_daemon.errors import DataplaneError

_RECEIVE_BYTES = 65_536


class Notice(NamedTuple):
    """One packet that the guard tells of."""

    prefix: str
    """The reason why it was dropped, or what else is to be known of it."""
    packet: bytes
    """Its beginning, from the IP header on."""


class DropLog:
    """The guard's log in the current network namespace. A context manager."""

    __slots__ = ("_sock",)

    def __init__(self) -> None:
        """Bind the group; raise DataplaneError if the kernel has no such log, or if another program has the group."""
        try:
            self._sock = open_netlink(NETLINK_NETFILTER)
        except OSError as err:
            raise DataplaneError(f"log of the guard: {err}") from err
        try:
            acknowledged(self._sock, LOG_CONFIG, _bind_request())
            self._sock.setblocking(False)
        except (OSError, DataplaneError) as err:
            self._sock.close()
            raise DataplaneError(f"log of the guard: {err}") from err

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sock.close()

    def fileno(self) -> int:
        """Return the descriptor that is readable when packets are told of."""
        return self._sock.fileno()

    def read(self, limit: int) -> list[Notice]:
        """Return what has come, about as many as `limit`; never block."""
        found: list[Notice] = []
        while len(found) < limit:
            try:
                found += decode_notices(self._sock.recv(_RECEIVE_BYTES))
            except BlockingIOError:
                break
            except OSError:  # ENOBUFS: some were lost.
                continue
        return found


def _bind_request() -> bytes:
    """One message for all settings: packets may come right after the first."""
    mode = struct.pack("!IBB", LOGGED_BYTES, NFULNL_COPY_PACKET, 0)
    body = encode_attribute(NFULA_CFG_CMD, bytes((NFULNL_CFG_CMD_BIND,))) + encode_attribute(NFULA_CFG_MODE, mode)
    body += encode_attribute(NFULA_CFG_QTHRESH, struct.pack("!I", 1))  # Each at once: the default waits for a second.
    return netfilter_head(socket.AF_UNSPEC, LOG_GROUP) + body


def decode_notices(data: bytes) -> list[Notice]:
    """Decode one read of the socket; raise DataplaneError if a length does not hold."""
    found = []
    for message in decode_messages(data):
        if message.kind == LOG_PACKET:
            attributes = netfilter_attributes(message.body)
            prefix = attributes.get(NFULA_PREFIX, b"").rstrip(b"\0").decode("ascii", "replace")
            found.append(Notice(prefix, attributes.get(NFULA_PAYLOAD, b"")))
    return found
