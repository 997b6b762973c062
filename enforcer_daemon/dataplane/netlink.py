# SPDX-License-Identifier: Apache-2.0
"""The netlink that stands on the way of packets: framing, attributes, requests, dumps, and all their constants.

pyroute2 reads links, addresses and queueing disciplines (rtnetlink.py). For the requests here it takes up to thirty
times as long, it cannot report that a socket is not there, and it does not know nfnetlink_log (ADR 26). Sources:
linux/netlink.h, RFC 3549, and the headers below.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Container, Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import IPAddress

NETLINK_SOCK_DIAG = 4
NETLINK_NETFILTER = 12
NLM_F_REQUEST = 0x01
NLM_F_ACK = 0x04
NLM_F_DUMP = 0x300
NLM_F_CREATE = 0x400
NLM_F_DUMP_INTR = 0x10
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLA_F_NESTED = 0x8000
_NLA_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
ATTRIBUTE = struct.Struct("=HH")  # length, type
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}

# linux/netfilter/nfnetlink.h: a subsystem's number << 8 | its message.
NETFILTER = struct.Struct("=BBH")  # family, version, resource in network order
BATCH_BEGIN, BATCH_END = 16, 17

# linux/netfilter/nfnetlink_conntrack.h
CT_NEW, CT_GET, CT_DELETE = 0x0100, 0x0101, 0x0102
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_STATUS, CTA_MARK, CTA_ID, CTA_ZONE = 1, 2, 3, 8, 12, 18
CTA_MARK_MASK, CTA_FILTER = 21, 25
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP = {4: (1, 2), 6: (3, 4)}  # source, destination
CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT = 1, 2, 3
CTA_FILTER_FLAGS = {CTA_TUPLE_ORIG: 1, CTA_TUPLE_REPLY: 2}  # CTA_FILTER_ORIG_FLAGS, CTA_FILTER_REPLY_FLAGS
CTA_FILTER_SOURCE = 1 << 0  # CTA_FILTER_FLAG(CTA_IP_SRC)
IPS_SEEN_REPLY = 1 << 1

# linux/netfilter/nf_tables.h
NFNL_SUBSYS_NFTABLES = 10
NFT_GETTABLE, NFT_GETCHAIN, NFT_GETGEN = 0x0A01, 0x0A04, 0x0A10
NFT_NEWSETELEM, NFT_GETSETELEM, NFT_DELSETELEM = 0x0A0C, 0x0A0D, 0x0A0E
NFTA_TABLE_NAME, NFTA_TABLE_HANDLE = 1, 4
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME = 1, 3
NFTA_GEN_ID = 1
NFTA_LIST_TABLE, NFTA_LIST_SET, NFTA_LIST_ELEMENTS, NFTA_LIST_ELEM = 1, 2, 3, 1
NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_TIMEOUT, NFTA_SET_ELEM_EXPIRATION, NFTA_SET_ELEM_USERDATA = 1, 4, 5, 6
NFTA_DATA_VALUE = 1

# linux/netfilter/nfnetlink_queue.h
QUEUE_CONFIG = 0x0302
NFQA_PAYLOAD, NFQA_SKB_INFO = 10, 14
NFQA_CFG_MASK, NFQA_CFG_FLAGS, NFQA_CFG_F_GSO = 4, 5, 4

# linux/netfilter/nfnetlink_log.h
LOG_PACKET, LOG_CONFIG = 0x0400, 0x0401
NFULA_PAYLOAD, NFULA_PREFIX = 9, 10
NFULA_CFG_CMD, NFULA_CFG_MODE, NFULA_CFG_QTHRESH = 1, 2, 5
NFULNL_CFG_CMD_BIND, NFULNL_COPY_PACKET = 1, 2

# linux/sock_diag.h, linux/inet_diag.h, net/tcp_states.h
SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21
DIAG_REQUEST = struct.Struct("=BBBBI48s")  # inet_diag_req_v2: family, protocol, 2 unused, states, inet_diag_sockid
DIAG_SOCKET = struct.Struct("=2s2s16s16sIII")  # inet_diag_sockid: ports, addresses, interface, cookie
DIAG_ANSWER = struct.Struct("=BBBB48s")  # the beginning of inet_diag_msg: family, state, 2 unused, inet_diag_sockid
DIAG_ENDS = struct.Struct("=BBBB2s2s16s16s")  # the same, with ports and addresses of the socket instead
DIAG_ANY_STATE = DIAG_NO_COOKIE = 0xFFFF_FFFF
TCP_LISTEN = 10

_RECEIVE_BYTES = 65_536  # the kernel fills dump buffers of at most 32 KiB
_MAX_DUMP_ATTEMPTS = 5  # a dump that the kernel interrupts is asked for again


def open_netlink(family: int) -> socket.socket:
    """Open a netlink socket in the calling thread's network namespace; the caller closes it."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, family)
    try:
        sock.bind((0, 0))
    except OSError:
        sock.close()
        raise
    return sock


def encode_attribute(kind: int, value: bytes) -> bytes:
    """Encode one attribute, padded to four bytes."""
    return ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def decode_attributes(data: bytes) -> dict[int, bytes]:
    """Decode a row of attributes; raise DataplaneError if a length does not hold."""
    return dict(_attributes(data))


def decode_nested(data: bytes) -> list[bytes]:
    """Decode a list, whose attributes all are of one kind; raise DataplaneError if a length does not hold."""
    return [value for _, value in _attributes(data)]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + 4 <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, offset)
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
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, offset)
        if length < 16 or offset + length > len(data):
            raise DataplaneError(f"netlink: message has length {length} of {len(data) - offset} bytes")
        yield Message(kind, flags, sequence, data[offset + 16 : offset + length])
        offset += (length + 3) & ~3


def ask(sock: socket.socket, kind: int, body: bytes, sequence: int) -> bytes | None:
    """Send one request; return the body of its answer, or None if the kernel knows no such object.

    `sequence` tells the answer from one that came too late for an earlier request.
    """
    sock.send(HEADER.pack(16 + len(body), kind, NLM_F_REQUEST, sequence, 0) + body)
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
    sock.send(HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | NLM_F_ACK, 0, 0) + body)
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
            sock.send(HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, 0, 0) + body)
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
        length, kind, flags, _, _ = HEADER.unpack_from(data, offset)
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


End = tuple[IPAddress, int]
"""Address and port."""


def encode_nested(kind: int, content: bytes) -> bytes:
    """Encode an attribute whose value is a row of attributes."""
    return encode_attribute(kind | NLA_F_NESTED, content)


def netfilter_head(family: int, resource: int = 0) -> bytes:
    """Encode what each message of netfilter begins with."""
    return NETFILTER.pack(family, 0, socket.htons(resource))


def netfilter_attributes(body: bytes) -> dict[int, bytes]:
    """Decode the attributes of a message of netfilter; raise DataplaneError if a length does not hold."""
    return decode_attributes(body[NETFILTER.size :])


def encode_tuple(side: int, protocol: int, source: End, destination: End) -> bytes:
    """Encode a direction of a conntrack entry; as CTA_TUPLE_ORIG it names an entry by either of its directions."""
    source_kind, destination_kind = CTA_IP[source[0].version]
    ip = encode_attribute(source_kind, source[0].packed) + encode_attribute(destination_kind, destination[0].packed)
    ports = encode_attribute(CTA_PROTO_NUM, bytes((protocol,)))
    ports += encode_attribute(CTA_PROTO_SRC_PORT, source[1].to_bytes(2, "big"))
    ports += encode_attribute(CTA_PROTO_DST_PORT, destination[1].to_bytes(2, "big"))
    return encode_nested(side, encode_nested(CTA_TUPLE_IP, ip) + encode_nested(CTA_TUPLE_PROTO, ports))


def decode_tuple(data: bytes) -> tuple[int, End, End]:
    """Decode protocol, source and destination of a direction; raise DataplaneError if it has no addresses."""
    parts = decode_attributes(data)
    addresses = decode_attributes(parts.get(CTA_TUPLE_IP, b""))
    transport = decode_attributes(parts.get(CTA_TUPLE_PROTO, b""))
    source, destination = (
        next((addresses[kind] for kind in kinds if kind in addresses), b"")
        for kinds in zip(*CTA_IP.values(), strict=True)
    )
    if len(source) not in (4, 16) or len(destination) != len(source):
        raise DataplaneError("conntrack: the entry states no addresses")
    protocol, source_port, destination_port = (
        int.from_bytes(transport.get(kind, b"")[:size], "big")
        for kind, size in ((CTA_PROTO_NUM, 1), (CTA_PROTO_SRC_PORT, 2), (CTA_PROTO_DST_PORT, 2))
    )
    return protocol, (ip_address(source), source_port), (ip_address(destination), destination_port)


def encode_mark(mark: int, mask: int) -> bytes:
    """Encode a mark of conntrack and which of its bits count."""
    return encode_attribute(CTA_MARK, mark.to_bytes(4, "big")) + encode_attribute(
        CTA_MARK_MASK, mask.to_bytes(4, "big")
    )
