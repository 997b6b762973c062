# SPDX-License-Identifier: Apache-2.0
"""A small network for tests of the dataplane: remote host, node and pod, each in a namespace without a name.

    remote 10.88.0.2, fd88::2 -- 10.88.0.1, fd88::1 node 10.77.0.1, fd77::1 -- 10.77.0.2, fd77::2 pod (eth0)

The namespaces live as long as their descriptors, so a test that dies leaves nothing behind.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.datapath.endpoint import Output
from enforcer_daemon.dataplane.addresses import node_addresses
from enforcer_daemon.dataplane.backends import IptablesBackend, NftBackend, RulesBackend, choose_backend
from enforcer_daemon.dataplane.netns import new_netns, open_in
from enforcer_daemon.dataplane.queue import PacketQueue, QueueSizes
from enforcer_daemon.dataplane.ratelimits import QueueLimits
from enforcer_daemon.dataplane.ruleset import EndpointRules
from enforcer_daemon.dataplane.tools import run_in
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import Direction
from enforcer_daemon.settings import RulesBackend as BackendSetting
from enforcer_daemon.verdict import ACCEPT, Verdict

QUEUE = 4242
PATIENCE_S = 20.0
"""For what must happen, seconds: an emulated processor is that slow, and a fast one does not wait."""
DENIED_S = 0.6
"""For what must not happen."""
SIZES = QueueSizes()
LIMITS = QueueLimits(per_source=4_000, total=8_000)
POD = {4: "10.77.0.2", 6: "fd77::2"}
NODE = {4: "10.77.0.1", 6: "fd77::1"}
NODE_OUTSIDE = {4: "10.88.0.1", 6: "fd88::1"}
REMOTE = {4: "10.88.0.2", 6: "fd88::2"}
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
BACKENDS: dict[str, Callable[[], RulesBackend]] = {
    "iptables-nft": lambda: IptablesBackend("nft"),
    "iptables-legacy": lambda: IptablesBackend("legacy"),
}
IPTABLES = (pytest.param("iptables-nft", marks=pytest.mark.stock_kernel), "iptables-legacy")
EVERY_BACKEND = (pytest.param("nft", marks=pytest.mark.stock_kernel), *IPTABLES)
"""Names for `make_backend`, as parameters. No stock kernel need show the legacy tools again."""


def make_backend(name: str) -> RulesBackend:
    """Make a backend; skip the test where the kernel has no nft queue expression."""
    if name != "nft":
        return BACKENDS[name]()
    try:
        choose_backend(BackendSetting.NFT)
    except DataplaneError:
        pytest.skip("this kernel has no nft queue expression")
    return NftBackend()


@dataclass(frozen=True)
class Lab:
    """Descriptors of the three namespaces."""

    remote: int
    node: int
    pod: int

    def rules(self) -> EndpointRules:
        return EndpointRules(("eth0",), QUEUE, open_in(self.node, node_addresses), LIMITS)

    def open_socket(self, place: int, version: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """Make a socket in one of the namespaces."""
        sock = open_in(place, lambda: socket.socket(FAMILIES[version], kind))
        sock.settimeout(PATIENCE_S)
        return sock

    def listen(self, place: int, version: int, port: int = 8080) -> socket.socket:
        sock = self.open_socket(place, version)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("::" if version == 6 else "0.0.0.0", port))  # noqa: S104 - a namespace of the test's own
        sock.listen()
        return sock

    def connects(self, place: int, target: tuple[str, int], timeout_s: float = PATIENCE_S, mark: int = 0) -> bool:
        """Return whether a connection comes about in that time (DENIED_S if none must); a refusal is False, too."""
        with self.open_socket(place, ip_address(target[0]).version) as sock:
            if mark:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", mark))
            sock.settimeout(timeout_s)
            try:
                sock.connect(target)
            except OSError:
                return False
            return True


@contextmanager
def open_lab() -> Iterator[Lab]:
    """Build the network; take it down at the end."""
    fds: list[int] = []
    try:
        for _ in range(3):
            fds.append(new_netns())
        lab = Lab(*fds)
        for fd in fds:
            open_in(fd, _set_parameters)
        links = _link("pod0", lab.pod, "eth0") + _link("out0", lab.remote, "eth0")
        _ip_batch(lab.node, [*links, *_addresses("pod0", NODE), *_addresses("out0", NODE_OUTSIDE)])
        for place, addresses, gateway in ((lab.pod, POD, NODE), (lab.remote, REMOTE, NODE_OUTSIDE)):
            routes = [f"route add default via {gateway[version]}" for version in FAMILIES]
            _ip_batch(place, [*_addresses("eth0", addresses), *routes])
        yield lab
    finally:
        for fd in fds:
            os.close(fd)


def _set_parameters() -> None:
    """Let a namespace forward; a forwarded packet needs a link-local address that is not tentative."""
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        Path("/proc/sys/net", name).write_text("1", encoding="ascii")
    for name in ("default", "all"):
        Path("/proc/sys/net/ipv6/conf", name, "accept_dad").write_text("0", encoding="ascii")


def _link(left: str, place: int, right: str) -> list[str]:
    return [
        f"link add {left} type veth peer name {right}",
        f"link set {right} netns /proc/{os.getpid()}/fd/{place}",
    ]


def _addresses(name: str, addresses: dict[int, str]) -> list[str]:
    return [
        f"addr add {addresses[4]}/24 dev {name}",
        f"addr add {addresses[6]}/64 dev {name} nodad",
        f"link set {name} up",
        "link set lo up",
    ]


def _ip_batch(place: int, commands: list[str]) -> None:
    """One program for all: to start one for each takes most of a test's time on an emulated processor."""
    run_in(place, ("ip", "-batch", "-"), "\n".join(commands) + "\n")


def ip(place: int, arguments: str) -> None:
    run_in(place, ("ip", *arguments.split()))


Answer = Callable[[bytes, Direction, int], Verdict | Output]


def as_output(answer: Verdict | Output) -> Output:
    """Return an output with a verdict alone, if that is all that a test answers."""
    return answer if isinstance(answer, Output) else Output(answer)


class Recorder:
    """Notes what it saw, and answers by a function of the test."""

    def __init__(self, answer: Answer = lambda *_: ACCEPT) -> None:
        self.answer = answer
        self.seen: list[tuple[bytes, Direction, int]] = []

    def __call__(self, packet: bytes, direction: Direction, mark: int) -> Output:
        self.seen.append((packet, direction, mark))
        return as_output(self.answer(packet, direction, mark))


@contextmanager
def serve(lab: Lab, answer: Answer, sizes: QueueSizes = SIZES) -> Iterator[PacketQueue]:
    """Serve the pod's queue from a thread of its own, as the event loop would."""
    errors: list[Exception] = []
    queue = PacketQueue.open(lab.pod, QUEUE, sizes, lambda *args: as_output(answer(*args)), on_error=errors.append)
    stop_read, stop_write = os.pipe()

    def loop() -> None:
        while True:
            ready, _, _ = select.select([queue.fileno(), stop_read], [], [])
            if stop_read in ready:
                return
            queue.read_batch()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield queue
    finally:
        os.write(stop_write, b"x")
        thread.join()
        queue.close()
        os.close(stop_read)
        os.close(stop_write)


def wait_until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> bool:
    """Return whether the condition came true in that time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def tcp_flags(packet: bytes) -> int:
    return packet[(33 if packet[0] >> 4 == 4 else 53)]


SYN, RST, ACK = 0x02, 0x04, 0x10


def is_syn(packet: bytes) -> bool:
    return tcp_flags(packet) & (SYN | ACK) == SYN


def tcp_packet(
    source: tuple[str, int], target: tuple[str, int], flags: int, payload: bytes = b"", seq: int = 1, ack: int = 0
) -> bytes:
    """Build a TCP packet with right checksums."""
    src, dst = ip_address(source[0]), ip_address(target[0])
    segment = struct.pack("!HHIIBBHHH", source[1], target[1], seq, ack, 5 << 4, flags, 64240, 0, 0) + payload
    pseudo = src.packed + dst.packed + struct.pack("!II", len(segment), 6)
    segment = segment[:16] + struct.pack("!H", _checksum(pseudo + segment)) + segment[18:]
    if src.version == 4:
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0, 64, 6, 0) + src.packed + dst.packed
        header = header[:10] + struct.pack("!H", _checksum(header)) + header[12:]
    else:
        header = struct.pack("!IHBB", 6 << 28, len(segment), 6, 64) + src.packed + dst.packed
    return header + segment


def _checksum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
