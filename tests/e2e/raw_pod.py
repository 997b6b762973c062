# SPDX-License-Identifier: Apache-2.0
"""A pod with CAP_NET_RAW: whole frames by packet socket, past every rule of its own namespace, and who hears them."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptPrefixInfo,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    PadN,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw

from enforcer_daemon.dataplane.addresses import interface
from enforcer_daemon.handshake.frames import MAGIC
from tests.support.fragments import fragment_v4
from trireme_lab import Lab
from trireme_lab.netns import in_netns, netns_path
from trireme_lab.network import POD_BRIDGE

SOL_PACKET, PACKET_QDISC_BYPASS = 263, 20
ETH_P_ALL = 3
MARKER_BYTES = 8
_LATE_S = 0.02
"""For what is on its way when the control has arrived, seconds."""
_PATIENCE_S = 10.0
"""For what must arrive, seconds."""


@dataclass(frozen=True, slots=True)
class Scene:
    """An attacker, whom it sends to, and a neighbor on whose behalf it may pretend to speak."""

    lab: Lab
    attacker: str
    target: str
    neighbor: str
    node: str
    version: int

    def ip(self, place: str) -> str:
        return str(self.lab.place(place).address(self.version))

    def packet(self, source: str, destination: str) -> Any:
        """Begin an IP packet."""
        layer = IP if self.version == 4 else IPv6
        return layer(src=self.ip(source), dst=self.ip(destination))


Attack = Callable[[Scene, bytes], Sequence[Any]]
"""(scene, marker) -> packets with the marker in them; frames where they begin with a link-layer header."""


def _tcp(scene: Scene, marker: bytes, flags: str, payload: bytes = b"") -> Any:
    seq, ack = struct.unpack("!II", marker)
    segment = TCP(sport=_port(marker), dport=8080, seq=seq, ack=ack, flags=flags)
    return scene.packet(scene.attacker, scene.target) / segment / payload


def _port(marker: bytes) -> int:
    """Return each attempt a connection of its own, also for conntrack."""
    return 20_000 + int.from_bytes(marker[-2:], "big") % 10_000


def plain_syn(scene: Scene, marker: bytes) -> Sequence[Any]:
    return [_tcp(scene, marker, "S")]


def syn_with_other_data(scene: Scene, marker: bytes) -> Sequence[Any]:
    return [_tcp(scene, marker, "S", b"x" * 600)]


def framed_syn(scene: Scene, marker: bytes) -> Sequence[Any]:
    return [_tcp(scene, marker, "S", MAGIC + b"x" * 600)]


def data_of_no_connection(scene: Scene, marker: bytes) -> Sequence[Any]:
    return [_tcp(scene, marker, "PA", b"secret")]


def fragmented_syn(scene: Scene, marker: bytes) -> Sequence[Any]:
    pieces = fragment_v4(_tcp(scene, marker, "S"), 16)
    assert len(pieces) > 1
    return pieces


def syn_in_fragments_behind_options(scene: Scene, marker: bytes) -> Sequence[Any]:
    """No piece says that it is of TCP: the first ends with the options, and the second begins in the middle."""
    segment = _tcp(scene, marker, "S")[TCP]
    options = IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(20))])
    whole = bytes(scene.packet(scene.attacker, scene.target) / options / segment)[40:]
    cut = 24
    number = int.from_bytes(marker[:4], "big")
    pieces = ((0, 1, whole[:cut]), (cut // 8, 0, whole[cut:]))
    return [
        scene.packet(scene.attacker, scene.target)
        / IPv6ExtHdrFragment(nh=60, offset=offset, m=more, id=number)
        / Raw(piece)
        for offset, more, piece in pieces
    ]


def datagram(scene: Scene, marker: bytes) -> Sequence[Any]:
    return [scene.packet(scene.attacker, scene.target) / UDP(sport=2345, dport=5353) / marker]


def datagram_with_a_wrong_checksum(scene: Scene, marker: bytes) -> Sequence[Any]:
    return [scene.packet(scene.attacker, scene.target) / UDP(sport=2345, dport=5353, chksum=1) / marker]


def another_protocol(scene: Scene, marker: bytes) -> Sequence[Any]:
    packet = scene.packet(scene.attacker, scene.target)
    setattr(packet, "proto" if scene.version == 4 else "nh", 253)
    return [packet / marker]


def under_a_neighbours_address(scene: Scene, marker: bytes) -> Sequence[Any]:
    return [scene.packet(scene.neighbor, scene.target) / UDP(sport=2345, dport=5353) / marker]


def under_the_nodes_address(scene: Scene, marker: bytes) -> Sequence[Any]:
    return [scene.packet(scene.node, scene.target) / UDP(sport=2345, dport=5353) / marker]


def syn_under_the_nodes_address(scene: Scene, marker: bytes) -> Sequence[Any]:
    seq, ack = struct.unpack("!II", marker)
    return [scene.packet(scene.node, scene.target) / TCP(sport=_port(marker), dport=8080, seq=seq, ack=ack, flags="S")]


def tagged(scene: Scene, marker: bytes) -> Sequence[Any]:
    return [Ether() / Dot1Q(vlan=7) / datagram(scene, marker)[0]]


def another_link_protocol(_: Scene, marker: bytes) -> Sequence[Any]:
    return [Ether(type=0x88B5) / (marker + bytes(40))]


def arp_for_a_neighbour(scene: Scene, marker: bytes) -> Sequence[Any]:
    hardware = marker[:6].hex(":")
    reply = ARP(op=2, hwsrc=hardware, psrc=scene.ip(scene.neighbor), hwdst=hardware, pdst=scene.ip(scene.target))
    return [Ether() / reply]


def advertisement_for_a_neighbour(scene: Scene, marker: bytes) -> Sequence[Any]:
    stated = ICMPv6ND_NA(tgt=scene.ip(scene.neighbor), R=0, S=0, O=1)
    option = ICMPv6NDOptDstLLAddr(lladdr=marker[:6].hex(":"))
    return [IPv6(src=scene.ip(scene.attacker), dst=scene.ip(scene.target), hlim=255) / stated / option]


def solicitation_for_a_neighbours_address(scene: Scene, marker: bytes) -> Sequence[Any]:
    """Duplicate address detection: who has an address may not hear of another that wants it."""
    option = ICMPv6NDOptDstLLAddr(lladdr=marker[:6].hex(":"))
    return [IPv6(src="::", dst="ff02::1", hlim=255) / ICMPv6ND_NS(tgt=scene.ip(scene.neighbor)) / option]


def router_advertisement(_: Scene, marker: bytes) -> Sequence[Any]:
    prefix = "2001:db8:" + marker[:4].hex(":", 2) + "::"
    option = ICMPv6NDOptPrefixInfo(prefix=prefix, prefixlen=64)
    return [IPv6(src="fe80::1", dst="ff02::1", hlim=255) / ICMPv6ND_RA() / option]


def under_anothers_link_local_address(scene: Scene, marker: bytes) -> Sequence[Any]:
    return [IPv6(src="fe80::bad", dst=scene.ip(scene.target)) / UDP(sport=2345, dport=5353) / marker]


def ping(scene: Scene, marker: bytes) -> Sequence[Any]:
    return [IP(src=scene.ip(scene.attacker), dst=scene.ip(scene.target)) / ICMP() / marker]


def mac(lab: Lab, place: str, ifname: str = "eth0") -> bytes:
    """Return an interface's MAC."""
    descriptor = os.open(netns_path(lab.place(place).netns), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return interface(descriptor, ifname).mac
    finally:
        os.close(descriptor)


class RawPod:
    """A packet socket in a pod. A context manager."""

    def __init__(self, lab: Lab, pod: str, *, bypasses_qdisc: bool = False) -> None:
        self._lab = lab
        self._own = mac(lab, pod)
        self._node = lab.pod_node(pod).name
        self._socket = in_netns(lab.place(pod).netns, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
        try:
            self._socket.bind(("eth0", 0))
            if bypasses_qdisc:
                self._socket.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> RawPod:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, target: str, packets: Sequence[Any]) -> None:
        """Send packets to a pod on the same node directly, elsewhere by way of the node."""
        for frame in self.frames(target, packets):
            self.send_frame(frame)

    def send_frame(self, frame: bytes) -> None:
        self._socket.send(frame)

    def frames(self, target: str, packets: Sequence[Any]) -> list[bytes]:
        """Return the frames of packets to a target."""
        is_near = self._lab.has_pod(target) and self._lab.pod_node(target).name == self._node
        to = mac(self._lab, target) if is_near else mac(self._lab, f"node:{self._node}", POD_BRIDGE)
        frames = [packet if isinstance(packet, Ether) else Ether() / packet for packet in packets]
        for frame in frames:
            frame.dst, frame.src = to.hex(":"), self._own.hex(":")
        return [bytes(frame) for frame in frames]


@contextmanager
def hearing(lab: Lab, place: str) -> Iterator[socket.socket]:
    """Yield a socket that hears every frame that comes to a place, before any rule."""
    netns = lab.place(place).netns
    with in_netns(netns, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))) as sock:
        sock.bind(("eth0", ETH_P_ALL))
        yield sock


def is_heard(sock: socket.socket, marker: bytes, patience_s: float = _PATIENCE_S) -> bool:
    """Wait for the marker as long as a busy machine may need; tell whether it came."""
    deadline = time.monotonic() + patience_s
    while (left_s := deadline - time.monotonic()) > 0:
        sock.settimeout(left_s)
        try:
            if marker in sock.recv(65_536):
                return True
        except TimeoutError:
            return False
    return False


def arrives(lab: Lab, sock: socket.socket, marker: bytes, control: tuple[str, str], version: int = 4) -> bool:
    """Return whether the marker came to the socket before a datagram that is sent now, by `control` (from, to).

    The two may be served by different cores, so what must arrive is better awaited by `is_heard`.
    """
    source, target = control
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    signal, deadline = os.urandom(MARKER_BYTES), time.monotonic() + _PATIENCE_S
    with lab.open_socket(source, family, socket.SOCK_DGRAM) as honest:
        honest.sendto(signal, (str(lab.place(target).address(version)), 9))
        while time.monotonic() < deadline:
            sock.settimeout(0.5)
            try:
                frame = sock.recv(65_536)
            except TimeoutError:
                honest.sendto(signal, (str(lab.place(target).address(version)), 9))
                continue
            if marker in frame:
                return True
            if signal in frame:
                return _is_late(sock, marker)
    raise AssertionError(f"the control from {source} did not reach {target}")


def _is_late(sock: socket.socket, marker: bytes) -> bool:
    sock.settimeout(_LATE_S)
    try:
        while True:
            if marker in sock.recv(65_536):
                return True
    except TimeoutError:
        return False


def fresh_marker() -> bytes:
    return os.urandom(MARKER_BYTES)
