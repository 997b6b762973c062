# SPDX-License-Identifier: Apache-2.0
"""What a pod without capabilities can send: every kind of socket to every address, with every option that it may set.

Run as a program inside the pod's namespace, without capabilities; it reads its targets from standard input and prints
what it tried. Each attempt carries the run's tag and a number, as those of the sweep do.
"""

from __future__ import annotations

import contextlib
import errno
import json
import resource
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

IP_TRANSPARENT, IP_FREEBIND, IP_RECVERR, IP_NODEFRAG, IP_BIND_ADDRESS_NO_PORT = 19, 15, 11, 22, 24
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, IPV6_DONTFRAG, IPV6_TRANSPARENT, IPV6_FREEBIND = 10, 23, 62, 75, 78
IPV6_HOPOPTS, IPV6_RTHDR, IPV6_DSTOPTS, IPV6_FLOWINFO_SEND, IPV6_AUTOFLOWLABEL = 54, 57, 59, 33, 70
SO_MARK, SO_PRIORITY, SO_BINDTODEVICE, SO_TXTIME, SO_NO_CHECK = 36, 12, 25, 61, 11
UDP_SEGMENT, UDP_CORK, UDP_NO_CHECK6_TX = 103, 1, 101
TCP_FASTOPEN_CONNECT, TCP_REPAIR, TCP_ULP = 30, 19, 31
SCTP, UDP_LITE, DCCP, MPTCP = 132, 136, 33, 262
MSG_MORE, MSG_FASTOPEN, MSG_CONFIRM = 0x8000, 0x20000000, 0x800
_ROUTER_ALERT = b"\x94\x04\0\0"
_HOP_BY_HOP = b"\x00\x00\x01\x04\0\0\0\0"
_ROUTING = b"\x00\x02\x00\x01" + bytes(20)
_OUR_BITS = struct.pack("=I", 0xE000_0000)
_LARGE_BYTES = 30_000
_DCCP_STREAM = 6
_ANSWER_S = 2.0
"""How long an answer to what was dialed is waited for, seconds."""
Option = tuple[int, int, int | bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """An address, and the ports to try."""

    kind: str
    address: str
    ports: tuple[int, ...]

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET


@dataclass(frozen=True, slots=True)
class Way:
    """One way to send: a name, options, flags, and how."""

    name: str
    send: Callable[[socket.socket, bytes, tuple[object, ...]], None]
    kind: int = socket.SOCK_DGRAM
    protocol: int = 0
    options: Sequence[Option] = ()
    families: Sequence[socket.AddressFamily] = (socket.AF_INET, socket.AF_INET6)
    bound: tuple[str, int] | None = None


def _sendto(flags: int = 0) -> Callable[[socket.socket, bytes, tuple[object, ...]], None]:
    def send(sock: socket.socket, data: bytes, address: tuple[object, ...]) -> None:
        sock.sendto(data, flags, address)

    return send


def _large(sock: socket.socket, data: bytes, address: tuple[object, ...]) -> None:
    sock.sendto(data + bytes(_LARGE_BYTES), address)


def _corked(sock: socket.socket, data: bytes, address: tuple[object, ...]) -> None:
    sock.sendto(data[:8], MSG_MORE, address)
    sock.sendto(data[8:], address)


def _segmented(sock: socket.socket, data: bytes, address: tuple[object, ...]) -> None:
    ancillary = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", 64))]
    sock.sendmsg([data.ljust(64, b"x") * 4], ancillary, 0, address)


def _connected(sock: socket.socket, data: bytes, address: tuple[object, ...]) -> None:
    sock.connect(address)
    sock.send(data)


def _dial(sock: socket.socket, data: bytes, address: tuple[object, ...]) -> None:
    sock.settimeout(0.0)
    with contextlib.suppress(BlockingIOError):
        sock.connect(address)
    with contextlib.suppress(OSError):
        sock.send(data)


def _fast_open(sock: socket.socket, data: bytes, address: tuple[object, ...]) -> None:
    sock.settimeout(0.0)
    with contextlib.suppress(BlockingIOError):
        sock.sendto(data, MSG_FASTOPEN, address)


def _extended(kind: int, content: bytes) -> Callable[[socket.socket, bytes, tuple[object, ...]], None]:
    def send(sock: socket.socket, data: bytes, address: tuple[object, ...]) -> None:
        sock.sendmsg([data], [(socket.IPPROTO_IPV6, kind, content)], 0, address)

    return send


_FOUR, _SIX = (socket.AF_INET,), (socket.AF_INET6,)
_DGRAM, _STREAM, _RAW = socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.SOCK_RAW
_IP, _IP6, _SOL = socket.IPPROTO_IP, socket.IPPROTO_IPV6, socket.SOL_SOCKET
WAYS: tuple[Way, ...] = (
    Way("udp", _sendto()),
    Way("udp-connected", _connected),
    Way("udp-large", _large),
    Way("udp-corked", _corked),
    Way("udp-segmented", _segmented),
    Way("udp-confirm", _sendto(MSG_CONFIRM)),
    Way("udp-no-checksum", _sendto(), options=((_SOL, SO_NO_CHECK, 1),)),
    Way("udp-broadcast", _sendto(), options=((_SOL, socket.SO_BROADCAST, 1),)),
    Way("udp-tos", _sendto(), options=((_IP, socket.IP_TOS, 0xFC), (_SOL, SO_PRIORITY, 6)), families=_FOUR),
    Way("udp-ip-options", _sendto(), options=((_IP, socket.IP_OPTIONS, _ROUTER_ALERT),), families=_FOUR),
    Way("udp-ttl-1", _sendto(), options=((_IP, socket.IP_TTL, 1),), families=_FOUR),
    Way("udp-dont-fragment", _sendto(), options=((_IP, IP_MTU_DISCOVER, 3),), families=_FOUR),
    Way("udp-free-bind", _sendto(), options=((_IP, IP_FREEBIND, 1),), families=_FOUR, bound=("192.168.60.11", 0)),
    Way("udp-transparent", _sendto(), options=((_IP, IP_TRANSPARENT, 1),), families=_FOUR),
    Way("udp-mark", _sendto(), options=((_SOL, SO_MARK, _OUR_BITS),)),
    Way("udp-device", _sendto(), options=((_SOL, SO_BINDTODEVICE, b"eth0\0"),)),
    Way("udp-low-port", _sendto(), bound=("", 53)),
    Way("udp-hop-by-hop", _extended(IPV6_HOPOPTS, _HOP_BY_HOP), families=_SIX),
    Way("udp-destination-options", _extended(IPV6_DSTOPTS, _HOP_BY_HOP), families=_SIX),
    Way("udp-routing", _extended(IPV6_RTHDR, _ROUTING), families=_SIX),
    Way("udp-transparent-6", _sendto(), options=((_IP6, IPV6_TRANSPARENT, 1),), families=_SIX),
    Way("udp-no-checksum-6", _sendto(), options=((socket.IPPROTO_UDP, UDP_NO_CHECK6_TX, 1),), families=_SIX),
    Way("udp-lite", _sendto(), protocol=UDP_LITE),
    Way("tcp", _dial, _STREAM),
    Way("tcp-fast-open", _fast_open, _STREAM),
    Way("tcp-fast-open-connect", _dial, _STREAM, options=((socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1),)),
    Way("tcp-ip-options", _dial, _STREAM, options=((_IP, socket.IP_OPTIONS, _ROUTER_ALERT),), families=_FOUR),
    Way("tcp-mark", _dial, _STREAM, options=((_SOL, SO_MARK, _OUR_BITS),)),
    Way("tcp-repair", _dial, _STREAM, options=((socket.IPPROTO_TCP, TCP_REPAIR, 1),)),
    Way("tcp-bound", _dial, _STREAM, options=((_SOL, socket.SO_REUSEADDR, 1),), bound=("", 8_081)),
    Way("mptcp", _dial, _STREAM, MPTCP),
    Way("sctp", _dial, _STREAM, SCTP),
    Way("dccp", _dial, _DCCP_STREAM, DCCP),
    Way("raw-udp", _sendto(), _RAW, socket.IPPROTO_UDP),
    Way("raw-other", _sendto(), _RAW, 253),
    Way("raw-ip", _sendto(), _RAW, socket.IPPROTO_RAW),
)
NEEDS_CAPABILITY = frozenset(
    {
        *("udp-transparent", "udp-transparent-6", "udp-mark", "tcp-mark", "tcp-repair"),
        *("raw-udp", "raw-other", "raw-ip", "udp-hop-by-hop", "udp-destination-options"),
    }
)
"""Ways that the kernel refuses to a process without capabilities."""


@dataclass(slots=True)
class Attempt:
    """One numbered attempt, and what became of it."""

    number: int
    way: Way
    target: Target
    said: str
    sock: socket.socket | None

    def entry(self) -> tuple[int, str, str, int, str]:
        """Return number, way, kind of target, IP version, and `sent`, `answered`, or the kernel's refusal."""
        version = 6 if self.target.family == socket.AF_INET6 else 4
        return self.number, self.way.name, self.target.kind, version, self.said


def attempt(number: int, way: Way, target: Target, port: int, payload: bytes) -> Attempt:
    """Try one way; a stream stays open, so that its SYN is retried and its answer is seen."""
    try:
        sock = socket.socket(target.family, way.kind, way.protocol)
    except OSError as err:
        return Attempt(number, way, target, str(err.strerror), None)
    try:
        for level, name, value in way.options:
            sock.setsockopt(level, name, value)
        if way.bound is not None:
            sock.bind(way.bound)
        way.send(sock, payload, (target.address, port))
    except OSError as err:
        sock.close()
        return Attempt(number, way, target, str(err.strerror), None)
    if way.kind in (socket.SOCK_STREAM, _DCCP_STREAM):
        return Attempt(number, way, target, "sent", sock)
    sock.close()
    return Attempt(number, way, target, "sent", None)


def note_answer(tried: Attempt) -> None:
    """Look whether somebody answered what was dialed: a connection, or a refusal."""
    if tried.sock is None:
        return
    error = tried.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    is_connected = False
    with contextlib.suppress(OSError):
        is_connected = bool(tried.sock.getpeername())
    if is_connected or error == errno.ECONNREFUSED:
        tried.said = "answered"
    tried.sock.close()


def try_all(targets: Sequence[Target], tag: bytes) -> list[Attempt]:
    """Try every way to every target, a stream to the first port alone."""
    tried: list[Attempt] = []
    for target in targets:
        for way in WAYS:
            if target.family in way.families:
                for port in target.ports[:1] if way.kind == socket.SOCK_STREAM else target.ports:
                    number = len(tried) + 1
                    payload = (tag + number.to_bytes(4, "big")) * 4
                    tried.append(attempt(number, way, target, port, payload))
    time.sleep(_ANSWER_S)
    for entry in tried:
        note_answer(entry)
    return tried


def main() -> None:
    """Read the tag and the targets, print the attempts."""
    request = json.load(sys.stdin)
    targets = [Target(kind, address, tuple(ports)) for kind, address, ports in request["targets"]]
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    json.dump([entry.entry() for entry in try_all(targets, bytes.fromhex(request["tag"]))], sys.stdout)


if __name__ == "__main__":
    main()
