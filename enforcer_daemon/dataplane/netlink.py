# SPDX-License-Identifier: Apache-2.0
"""The few netlink messages that the dataplane speaks: framing, attributes, one request and its answer.

Written out because a request stands on the path of a packet, and a general library costs more memory and start-up than
everything else here together. Source: linux/netlink.h, RFC 3549.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Container, Iterator
from dataclasses import dataclass

from enforcer_daemon.errors import DataplaneError

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12
NLM_F_REQUEST = 0x01
NLM_F_ACK = 0x04
NLM_F_DUMP = 0x300
NLM_F_DUMP_INTR = 0x10
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLA_F_NESTED = 0x8000
_NLA_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_RECEIVE_BYTES = 65_536  # the kernel fills dump buffers of at most 32 KiB
_MAX_DUMP_ATTEMPTS = 5  # a dump that the kernel interrupts is asked for again


def open_netlink(family: int, groups: int = 0) -> socket.socket:
    """Open a netlink socket in the calling thread's network namespace; the caller closes it."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, family)
    try:
        sock.bind((0, groups))
    except OSError:
        sock.close()
        raise
    return sock


def encode_attribute(kind: int, value: bytes) -> bytes:
    """Encode one attribute, padded to four bytes."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def decode_attributes(data: bytes) -> dict[int, bytes]:
    """Decode a row of attributes; raise DataplaneError if a length does not hold."""
    return dict(_attributes(data))


def decode_nested(data: bytes) -> list[bytes]:
    """Decode a list, whose attributes all are of one kind; raise DataplaneError if a length does not hold."""
    return [value for _, value in _attributes(data)]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4 or offset + length > len(data):
            raise DataplaneError(f"netlink: attribute {kind} has length {length} of {len(data) - offset} bytes")
        yield kind & _NLA_TYPE_MASK, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


@dataclass(frozen=True, slots=True)
class Message:
    """One netlink message."""

    kind: int
    flags: int
    sequence: int
    body: bytes


def decode_messages(data: bytes) -> Iterator[Message]:
    """Yield each message of a datagram; raise DataplaneError if a length does not hold."""
    offset = 0
    while offset < len(data):
        if offset + 16 > len(data):
            raise DataplaneError(f"netlink: {len(data) - offset} bytes cannot hold a message header")
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < 16 or offset + length > len(data):
            raise DataplaneError(f"netlink: message has length {length} of {len(data) - offset} bytes")
        yield Message(kind, flags, sequence, data[offset + 16 : offset + length])
        offset += (length + 3) & ~3


def ask(sock: socket.socket, kind: int, body: bytes, sequence: int) -> bytes | None:
    """Send one request; return the body of its answer, or None if the kernel knows no such object.

    `sequence` tells the answer from one that came too late for an earlier request.
    """
    sock.send(_HEADER.pack(16 + len(body), kind, NLM_F_REQUEST, sequence, 0) + body)
    while True:
        for message in decode_messages(sock.recv(_RECEIVE_BYTES)):
            if message.sequence != sequence:
                continue
            if message.kind != NLMSG_ERROR:
                return message.body
            code = error_code(message.body)
            if code == errno.ENOENT:
                return None
            raise DataplaneError(f"netlink: request {kind:#x}: {os.strerror(code)}")


def acknowledged(sock: socket.socket, kind: int, body: bytes, tolerated: Container[int] = ()) -> None:
    """Send one request and wait for the kernel's word; raise DataplaneError unless it is success or tolerated."""
    sock.send(_HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | NLM_F_ACK, 0, 0) + body)
    for message in decode_messages(sock.recv(_RECEIVE_BYTES)):
        code = error_code(message.body) if message.kind == NLMSG_ERROR else 0
        if code and code not in tolerated:
            raise DataplaneError(f"netlink: request {kind:#x}: {os.strerror(code)}")


def dump(family: int, kind: int, body: bytes, containing: bytes = b"", limit: int = sys.maxsize) -> list[bytes]:
    """Return the bodies of all objects of a kind, from a socket of its own in the current network namespace.

    With `containing` only of those in which these bytes are; the others cost hardly anything. Reading ends at `limit`.
    """
    for _ in range(_MAX_DUMP_ATTEMPTS):
        with open_netlink(family) as sock:
            sock.send(_HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, 0, 0) + body)
            bodies = _receive_dump(sock, kind, containing, limit)
        if bodies is not None:
            return bodies
    raise DataplaneError(f"netlink: dump {kind:#x} was interrupted {_MAX_DUMP_ATTEMPTS} times")


def _receive_dump(sock: socket.socket, kind: int, containing: bytes, limit: int) -> list[bytes] | None:
    """Return the dump, or None if it changed while it was read and may have holes."""
    bodies: list[bytes] = []
    is_interrupted = False
    while True:
        data = sock.recv(_RECEIVE_BYTES)
        if containing not in data and not _has_news(data):
            continue
        for message in decode_messages(data):
            is_interrupted |= bool(message.flags & NLM_F_DUMP_INTR)
            if message.kind == NLMSG_DONE:
                return None if is_interrupted else bodies
            if message.kind == NLMSG_ERROR:
                raise DataplaneError(f"netlink: dump {kind:#x}: {os.strerror(error_code(message.body))}")
            if containing in message.body:
                bodies.append(message.body)
                if len(bodies) >= limit:
                    return bodies


def _has_news(data: bytes) -> bool:
    """Return whether a part of a dump has more than objects: its end, an error, or that it was interrupted."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags, _, _ = _HEADER.unpack_from(data, offset)
        if kind in (NLMSG_DONE, NLMSG_ERROR) or flags & NLM_F_DUMP_INTR or length < 16:
            return True
        offset += (length + 3) & ~3
    return False


def error_code(body: bytes) -> int:
    """Return the code of an NLMSG_ERROR, 0 for an acknowledgment; raise DataplaneError if it has none."""
    if len(body) < 4:
        raise DataplaneError("netlink: error message without a code")
    (code,) = struct.unpack_from("=i", body)
    return -int(code)
