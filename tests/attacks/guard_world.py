# SPDX-License-Identifier: Apache-2.0
"""What the attacks on the guard share: packets by packet socket from anywhere, and who could read them."""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from enforcer_daemon.dataplane.addresses import interface
from enforcer_daemon.handshake.frames import MAGIC
from enforcer_daemon.model import IPAddress
from enforcer_daemon.packet.checksum import complement, ones_sum
from enforcer_daemon.packet.udp import build_udp
from tests.netns.lab import ACK, SYN, tcp_packet, wait_until
from trireme_lab import Lab
from trireme_lab.netns import in_netns, netns_path
from trireme_lab.network import POD_BRIDGE

BROADCAST_MAC = b"\xff" * 6
TCP_FORMS = ("framed-syn", "syn", "syn-with-data", "segment")
UDP_FORMS = ("standalone-message", "datagram")
FORMS = (*TCP_FORMS, *UDP_FORMS)
_ETHERTYPES = {4: b"\x08\x00", 6: b"\x86\xdd"}
_PATIENCE_S = 10.0
_BRIDGE_HOOKS = tuple(f"net.bridge.bridge-nf-call-{tool}" for tool in ("iptables", "ip6tables"))
_ports = itertools.count(20_000)


def fresh_port() -> int:
    """Return a source port that no other packet of the run has: it tells a packet from all others."""
    return next(_ports)


def packet(form: str, source: IPAddress, target: IPAddress, sport: int, dport: int) -> bytes:
    """Build a packet of a form that the guard tells apart."""
    ends = (str(source), sport), (str(target), dport)
    match form:
        case "framed-syn":
            return tcp_packet(*ends, SYN, MAGIC + bytes(600))
        case "syn":
            return tcp_packet(*ends, SYN)
        case "syn-with-data":
            return tcp_packet(*ends, SYN, bytes(600))
        case "segment":
            return tcp_packet(*ends, ACK, b"secret", seq=7, ack=7)
        case "standalone-message":
            return build_udp(source.packed, target.packed, (sport, dport), surplus=_surplus())
        case "datagram":
            return build_udp(source.packed, target.packed, (sport, dport), b"secret")
    raise ValueError(form)


def _surplus() -> bytes:
    """Return a surplus area with our magic, which adds nothing to the checksum of a receiver that takes it for data."""
    rest = bytes(6) + MAGIC + bytes(40)
    length = len(rest) + 2
    return complement(ones_sum(rest) + length).to_bytes(2, "big") + rest


def fragments(whole: bytes) -> list[bytes]:
    """Cut an IP packet in two, behind the first eight bytes of its payload."""
    cut, number = 8, next(_ports)
    if whole[0] >> 4 == 6:
        pieces = []
        for at, more, part in ((0, 1, whole[40 : 40 + cut]), (cut, 0, whole[40 + cut :])):
            extension = struct.pack("!BBHI", whole[6], 0, at | more, number)
            length = struct.pack("!H", len(extension) + len(part))
            pieces.append(whole[:4] + length + bytes((44,)) + whole[7:40] + extension + part)
        return pieces
    pieces = []
    for at, more, part in ((0, 0x2000, whole[20 : 20 + cut]), (cut, 0, whole[20 + cut :])):
        fields = struct.pack("!HHH", 20 + len(part), number & 0xFFFF, more | at // 8)
        header = whole[:2] + fields + whole[8:10] + bytes(2) + whole[12:20]
        pieces.append(header[:10] + struct.pack("!H", complement(ones_sum(header))) + header[12:] + part)
    return pieces


def mac(lab: Lab, place: str) -> bytes:
    """Return the MAC of a place's interface; of a node: of the bridge of its pods."""
    descriptor = os.open(netns_path(lab.place(place).netns), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return interface(descriptor, POD_BRIDGE if place.startswith("node:") else "eth0").mac
    finally:
        os.close(descriptor)


class Sender:
    """A packet socket at a place: what CAP_NET_RAW gives. A context manager."""

    def __init__(self, lab: Lab, place: str) -> None:
        self._mac = mac(lab, place)
        self._socket = in_netns(lab.place(place).netns, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
        self._socket.bind(("eth0", 0))

    def __enter__(self) -> Sender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def send(self, to: bytes, packets: Sequence[bytes], own: bytes = b"", tag: bytes = b"") -> None:
        """Send IP packets to a MAC, from the interface's own MAC or another, behind a VLAN tag where one is given."""
        for each in packets:
            self._socket.send(to + (own or self._mac) + tag + _ETHERTYPES[each[0] >> 4] + each)


class Witness:
    """Notes, behind all rules of a place, from which source ports packets came to its sockets. A context manager."""

    def __init__(
        self, lab: Lab, place: str, *, table: str = "inet attack_witness", hook: str = "input priority 300"
    ) -> None:
        self._lab, self._place, self._table, self._hook = lab, place, table, hook

    def __enter__(self) -> Witness:
        lines = (
            f"add table {self._table}",
            f"delete table {self._table}",
            f"add table {self._table}",
            f"add set {self._table} seen {{ type inet_service; size 65535; flags dynamic; }}",
            f"add chain {self._table} arrived {{ type filter hook {self._hook}; }}",
            f"add rule {self._table} arrived meta l4proto {{ tcp, udp }} update @seen {{ th sport }}",
        )
        self._lab.run(self._place, "nft", "; ".join(lines))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lab.run(self._place, "nft", f"delete table {self._table}")

    def seen(self) -> set[int]:
        """Return the source ports so far."""
        listing = self._lab.run(self._place, "nft", "-n", "list", "set", *self._table.split(), "seen")
        _, _, elements = listing.partition("elements = {")
        return {int(word) for word in elements.partition("}")[0].replace(",", " ").split()}

    def has_seen(self, port: int) -> bool:
        return port in self.seen()

    def has_seen_any(self) -> bool:
        return bool(self.seen())

    def sees(self, port: int) -> bool:
        """Wait for a packet from a port, as long as a busy machine may need."""
        return wait_until(lambda: self.has_seen(port), _PATIENCE_S)

    def sees_any(self) -> bool:
        """Wait for any packet."""
        return wait_until(self.has_seen_any, _PATIENCE_S)


@contextmanager
def bridge_hooks(lab: Lab, node: str, *, are_on: bool) -> Iterator[None]:
    """Have the node's bridges show packets to netfilter's IP hooks, or not."""
    before = [lab.run(node, "sysctl", "-n", name).strip() for name in _BRIDGE_HOOKS]
    try:
        lab.run(node, "sysctl", "-qw", *(f"{name}={int(are_on)}" for name in _BRIDGE_HOOKS))
        yield
    finally:
        lab.run(node, "sysctl", "-qw", *(f"{name}={value}" for name, value in zip(_BRIDGE_HOOKS, before, strict=True)))


@contextmanager
def translation(
    lab: Lab, node: str, tool: str, front: tuple[IPAddress, int], back: tuple[IPAddress, int]
) -> Iterator[None]:
    """Translate a Service's address and port on a node, TCP and UDP, as kube-proxy does by iptables or by nftables."""
    version = front[0].version
    target = f"{back[0]}:{back[1]}" if version == 4 else f"[{back[0]}]:{back[1]}"
    family, program = ("ip", "iptables") if version == 4 else ("ip6", "ip6tables")
    rules = [
        f"-d {front[0]} -p {protocol} --dport {front[1]} -j DNAT --to-destination {target}"
        for protocol in ("tcp", "udp")
    ]
    try:
        if tool == "nftables":
            table = f"{family} attack_services"
            lines = [
                f"add table {table}",
                f"add chain {table} services {{ type nat hook prerouting priority -100; }}",
                *(
                    f"add rule {table} services {family} daddr {front[0]} {protocol} dport {front[1]} dnat to {target}"
                    for protocol in ("tcp", "udp")
                ),
            ]
            lab.run(node, "nft", "; ".join(lines))
        else:
            for rule in rules:
                lab.run(node, program, "-t", "nat", "-A", "PREROUTING", *rule.split())
        yield
    finally:
        if tool == "nftables":
            lab.run(node, "nft", f"delete table {family} attack_services")
        else:
            for rule in rules:
                lab.run(node, program, "-t", "nat", "-D", "PREROUTING", *rule.split())
