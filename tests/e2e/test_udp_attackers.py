# SPDX-License-Identifier: Apache-2.0
"""Attacks on UDP by identity with real packets: stolen offers, replays, floods. Nothing reaches the application."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from enforcer_daemon.errors import FrameError, PacketError
from enforcer_daemon.handshake.datagrams import PIGGYBACKED_EXID, STANDALONE_EXID, find_message
from enforcer_daemon.handshake.fairtable import Limit
from enforcer_daemon.handshake.frames import TYPE_OFFER, encode_again, encode_proof, frame_type
from enforcer_daemon.handshake.limits import HandshakeLimits
from enforcer_daemon.packet.udp import UDP_HEADER, UDPDatagram, build_udp, decode_udp, encode_option
from tests.e2e.operation_world import FAMILIES, NODES, app, denials, endpoint, pod, policy
from trireme_lab import HostSpec, Lab, LabSpec, Tools
from trireme_lab.netns import open_socket

pytestmark = pytest.mark.kernel

PATIENCE_S = 10.0
SETTLE_S = 0.3
SO_SNDBUFFORCE = 32  # asm-generic/socket.h
SECRET = b"not for strangers"
PODS = (pod("server", "a"), pod("client", "a"), pod("far-client", "b", app="client"), pod("opener", "a"))
MANIFESTS = (
    policy("server", "server", ingress=[{"from": [app("client"), app("opener")]}]),
    policy("opener", "opener", egress=[{"to": [app("server")]}]),
)
versions = pytest.mark.parametrize("version", [4, 6])
_ports = itertools.count(9_000)


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    world = LabSpec(NODES, {"x": {}}, PODS, (HostSpec("near", node="a"),), manifests=MANIFESTS)
    with Lab(world, Tools(plugin=plugin)) as lab:
        yield lab


@contextmanager
def serving(lab: Lab, version: int) -> Iterator[socket.socket]:
    with lab.open_socket("x/server", FAMILIES[version], socket.SOCK_DGRAM) as server:
        server.bind((str(lab.address_of("x/server", version)), next(_ports)))
        server.settimeout(PATIENCE_S)
        yield server


class RawHost:
    """A machine on the server's bridge that sends packets under any address. A context manager."""

    def __init__(self, lab: Lab, version: int) -> None:
        self._family = FAMILIES[version]
        self._sock = open_socket(lab.place("host:near").netns, self._family, socket.SOCK_RAW, socket.IPPROTO_RAW)

    def __enter__(self) -> RawHost:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def send(self, packet: bytes) -> None:
        to = packet[16:20] if packet[0] >> 4 == 4 else packet[24:40]
        self._sock.sendto(packet, (socket.inet_ntop(self._family, to), 0))


def _messages(packets: list[bytes], port: int) -> list[tuple[UDPDatagram, bytes]]:
    """Return the datagrams with a message among captured packets, of the flows of one port."""
    found = []
    for packet in packets:
        try:
            datagram = decode_udp(packet)
            message = find_message(datagram)
        except (PacketError, FrameError):
            continue
        if message is not None and port in (datagram.sport, datagram.dport):
            found.append((datagram, message[0]))
    return found


def _hears_nothing(server: socket.socket) -> bool:
    server.settimeout(SETTLE_S)
    try:
        server.recv(65_536)
    except TimeoutError:
        return True
    return False


@contextmanager
def finished_handshake(lab: Lab, server: socket.socket, version: int) -> Iterator[list[tuple[UDPDatagram, bytes]]]:
    """Let a client speak to the server; give the messages that went by. The client lives as long as the block."""
    with (
        lab.capture("x/server") as capture,
        lab.open_socket("x/far-client", FAMILIES[version], socket.SOCK_DGRAM) as client,
    ):
        client.connect(server.getsockname()[:2])
        client.send(b"once")
        assert server.recv(100) == b"once"
        yield _messages(capture.close(), server.getsockname()[1])


@versions
def test_whatever_went_by_is_sent_again_and_nothing_arrives(lab: Lab, version: int) -> None:
    with serving(lab, version) as server, RawHost(lab, version) as host:
        with finished_handshake(lab, server, version) as messages:
            assert [frame_type(message) for _, message in messages] == [3, 4, 5]
            for datagram, _ in messages:
                host.send(datagram.packet)
            assert _hears_nothing(server)
        lab.run("x/server", "conntrack", "-D", "-f", f"ipv{version}", "-p", "udp")
        for datagram, _ in messages:
            host.send(datagram.packet)
        assert _hears_nothing(server)


@versions
def test_a_stolen_offer_gains_nothing_under_any_address_or_port(lab: Lab, version: int) -> None:
    with serving(lab, version) as server, RawHost(lab, version) as host:
        with finished_handshake(lab, server, version) as messages:
            offer, message = messages[0]
        port = server.getsockname()[1]
        own = lab.address_of("host:near", version).packed
        for source in (own, offer.src):
            for exid, payload in ((PIGGYBACKED_EXID, b"attack"), (STANDALONE_EXID, b"")):
                for nonce in (message[8:24], os.urandom(16)):
                    stolen = message[:8] + nonce + message[24:]
                    sport = next(_ports)
                    surplus = encode_option(UDP_HEADER + len(payload), exid, stolen)
                    host.send(build_udp(source, offer.dst, (sport, port), payload, surplus))
                    proof = encode_option(UDP_HEADER, STANDALONE_EXID, encode_proof(nonce, os.urandom(16)))
                    host.send(build_udp(source, offer.dst, (sport, port), b"", proof))
                    host.send(build_udp(source, offer.dst, (sport, port), b"attack"))
        assert _hears_nothing(server)


@versions
def test_a_flood_of_stolen_offers_is_bounded_and_passes(lab: Lab, version: int) -> None:
    limits = HandshakeLimits()
    with serving(lab, version) as server, RawHost(lab, version) as host:
        with finished_handshake(lab, server, version) as messages:
            offer, message = messages[0]
        _await_calm(lab)
        port = server.getsockname()[1]
        for sport in range(20_000, 21_000):
            stolen = message[:8] + os.urandom(16) + message[24:]
            surplus = encode_option(UDP_HEADER + 6, PIGGYBACKED_EXID, stolen)
            host.send(build_udp(offer.src, offer.dst, (sport, port), b"attack", surplus))
            assert sport % 250 or _count(lab, "held_packets") <= limits.max_held_packets_per_source
        assert _hears_nothing(server)
        assert _count(lab, "half_open_flows") <= limits.max_half_open_flows_per_source
        _await_calm(lab)
    with serving(lab, version) as server, finished_handshake(lab, server, version) as messages:
        assert frame_type(messages[0][1]) == TYPE_OFFER


@versions
def test_flows_that_nobody_answers_are_bounded_and_hurt_no_other(lab: Lab, version: int) -> None:
    """Where the pod's policy knows labels alone, its datagrams wait for an answer, which a stranger never gives."""
    limits = HandshakeLimits()
    silent = str(lab.address_of("host:near", version))
    with (
        serving(lab, version) as server,
        lab.capture("host:near") as capture,
        lab.open_socket("x/opener", FAMILIES[version], socket.SOCK_DGRAM) as opener,
    ):
        # What waits in the queue takes room of its socket; without more of it, the pod would wait itself.
        opener.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 16 << 20)
        for port in range(10_000, 11_000):
            opener.sendto(SECRET, (silent, port))
            if port % 500 == 499:
                assert _count(lab, "held_packets", "x/opener") <= limits.max_held_packets_per_source
                assert _count(lab, "half_open_flows", "x/opener") <= limits.max_half_open_flows_per_source
                _speak(lab, "x/client", server, version)
                _speak(lab, "x/opener", server, version)
        hits = lab.pod_node("x/opener").status()["limits_reached"]
        assert isinstance(hits, dict)
        assert hits[Limit.HELD_PACKETS_PER_SOURCE.value] > 0
        assert "hold-queue-full" in denials(lab, "x/opener")
        _await_calm(lab, "x/opener")
        packets = capture.close()
        assert _messages(packets, opener.getsockname()[1])
    assert [packet for packet in packets if SECRET in packet] == []


def _speak(lab: Lab, place: str, server: socket.socket, version: int) -> None:
    """Open a flow to the server, and hear its answer."""
    with lab.open_socket(place, FAMILIES[version], socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE_S)
        client.connect(server.getsockname()[:2])
        client.send(b"hello")
        received, source = server.recvfrom(100)
        server.sendto(received, source)
        assert client.recv(100) == b"hello"


def _await_calm(lab: Lab, place: str = "x/server") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while _count(lab, "held_packets", place) or _count(lab, "half_open_flows", place):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _count(lab: Lab, what: str, place: str = "x/server") -> int:
    count = endpoint(lab, place)[what]
    assert isinstance(count, int)
    return count


@versions
def test_forged_requests_to_shake_hands_again_stop_no_flow(lab: Lab, version: int) -> None:
    with (
        serving(lab, version) as server,
        lab.open_socket("x/client", FAMILIES[version], socket.SOCK_DGRAM) as client,
        RawHost(lab, version) as host,
    ):
        client.settimeout(PATIENCE_S)
        client.connect(server.getsockname()[:2])
        ends = lab.address_of("x/server", version).packed, lab.address_of("x/client", version).packed
        for n in range(20):
            client.send(b"%d" % n)
            received, source = server.recvfrom(100)
            assert received == b"%d" % n
            server.sendto(b"re: " + received, source)
            assert client.recv(100) == b"re: " + received
            for _ in range(10):
                surplus = encode_option(UDP_HEADER, STANDALONE_EXID, encode_again(os.urandom(16)))
                host.send(build_udp(*ends, (server.getsockname()[1], source[1]), b"", surplus))
