# SPDX-License-Identifier: Apache-2.0
"""Released flows and those who stand for them: dead nodes, new labels, restarts, blocked paths, copied identities.

The times of leases are short here: UDP lapses after 8 s, TCP after 14 s.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.daemon.limits import DaemonLimits
from enforcer_daemon.errors import FrameError, PacketError
from enforcer_daemon.handshake.datagrams import STANDALONE_EXID, find_message
from enforcer_daemon.handshake.frames import TYPE_OFFER, SynFrame, decode_syn, encode_syn, frame_type, is_frame
from enforcer_daemon.handshake.leaseframes import LEASE_PORT
from enforcer_daemon.handshake.leasepairs import LeaseTimes
from enforcer_daemon.marks import RELEASED
from enforcer_daemon.model import PodRef
from enforcer_daemon.packet.tcp import SYN, build, decode_tcp, with_options_and_payload
from enforcer_daemon.packet.udp import UDP_HEADER, build_udp, decode_udp, encode_option
from tests.e2e.attackers import SYN_OPTIONS
from tests.e2e.operation_world import FAMILIES, NODES, Stream, app, connection, endpoint, pod, policy
from trireme_lab import HostSpec, Lab, LabSpec, PodSpec, Tools
from trireme_lab.enforcer import enforcer_with
from trireme_lab.netns import open_socket

pytestmark = pytest.mark.kernel

PATIENCE_S = 20.0
SOON_S = 1.0
"""How soon a flow ends after its peer's labels have changed."""
TIMES = LeaseTimes(lease_s=0.5, silent_s=1.2, probe_s=0.3, udp_lapse_s=8.0, tcp_lapse_s=14.0)
PODS = (pod("server", "a"), pod("client", "b"))
MANIFESTS = (policy("server", "server", ingress=[{"from": [app("client")]}]),)
versions = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture
def lab(plugin: Path) -> Iterator[Lab]:
    world = LabSpec(NODES, {"x": {}}, PODS, (HostSpec("near", node="a"),), manifests=MANIFESTS)
    with Lab(world, Tools(plugin=plugin, enforcer=enforcer_with(DaemonLimits(leases=TIMES)))) as lab:
        yield lab


@contextmanager
def datagrams(lab: Lab, version: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a released UDP flow from the client to the server."""
    family = FAMILIES[version]
    with (
        lab.open_socket("x/server", family, socket.SOCK_DGRAM) as server,
        lab.open_socket("x/client", family, socket.SOCK_DGRAM) as client,
    ):
        server.bind((str(lab.address_of("x/server", version)), 0))
        client.connect(server.getsockname()[:2])
        for sock in (server, client):
            sock.settimeout(PATIENCE_S)
        client.send(b"hello")
        _, address = server.recvfrom(100)
        server.connect(address[:2])
        server.send(b"welcome")
        assert client.recv(100) == b"welcome"

        def is_released_after_another() -> bool:
            """What waited together is released with the next datagram (docs/udp.md, limits)."""
            client.send(b"again")
            assert server.recv(100) == b"again"
            return has_release(lab, server)

        until(is_released_after_another, "the flow is released")
        yield client, server


def has_release(lab: Lab, server: socket.socket) -> bool:
    """Return whether the server's kernel has the release of a flow to one of its sockets."""
    family = "ipv4" if server.family == socket.AF_INET else "ipv6"
    protocol = "udp" if server.type == socket.SOCK_DGRAM else "tcp"
    entries = lab.run("x/server", "conntrack", "-L", "-f", family, "-p", protocol)
    port = server.getsockname()[1]
    found = [line for line in entries.splitlines() if f"dport={port} " in line]
    marks = [int(match[1]) for line in found if (match := re.search(r" mark=(\d+)", line))]
    return any(mark & RELEASED for mark in marks)


def until(holds: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> float:
    """Wait until something holds; return how long it took, seconds."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < patience_s, f"not within {patience_s} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - started


def keeps_on(lab: Lab, server: socket.socket, seconds: float) -> None:
    """Fail if a release is gone at any time within so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert has_release(lab, server), "the flow was ended"
        time.sleep(0.2)


def leases(lab: Lab, name: str) -> dict[str, int]:
    found = endpoint(lab, name)["leases"]
    assert isinstance(found, dict)
    return found


def leased(lab: Lab) -> None:
    """Wait until both sides have heard of each other."""
    for name in ("x/server", "x/client"):
        until(lambda name=name: leases(lab, name)["pairs"] >= 1, f"{name} has a lease")  # type: ignore[misc]
    time.sleep(2 * TIMES.lease_s)
    assert leases(lab, "x/server")["unanswered"] == 0


def die(lab: Lab) -> None:
    """Let the client's node end without a word: its enforcer, and all that its pod could send."""
    lab.node("b").daemon.stop(signal.SIGKILL)
    lab.run("x/client", "ip", "link", "set", "eth0", "down")


# Silence.


@versions
def test_the_flows_of_a_dead_node_lapse_udp_first_and_tcp_later(lab: Lab, version: int) -> None:
    with connection(lab, "x/client", "x/server", version) as (_, tcp), datagrams(lab, version) as (_, udp):
        leased(lab)
        die(lab)
        took_s = until(lambda: not has_release(lab, udp), "the UDP flow lapses")
        assert took_s > TIMES.udp_lapse_s - 2 * TIMES.lease_s - 0.5
        assert has_release(lab, tcp)
        took_s += until(lambda: not has_release(lab, tcp), "the connection lapses")
        assert TIMES.tcp_lapse_s - 2 * TIMES.lease_s - 0.5 < took_s < TIMES.tcp_lapse_s + 2.0


@pytest.mark.parametrize("node", ["a", "b"])
def test_a_restart_of_an_enforcer_cuts_no_flow(lab: Lab, node: str) -> None:
    with connection(lab, "x/client", "x/server") as ends, Stream(*ends) as stream, datagrams(lab, 4) as (_, udp):
        leased(lab)
        lab.node(node).daemon.stop(signal.SIGKILL)
        time.sleep(TIMES.lease_s)
        lab.node(node).start()
        lab.node(node).wait_ready()
        deadline = time.monotonic() + TIMES.tcp_lapse_s + 2.0
        while time.monotonic() < deadline:
            stream.wait_for_rounds(2)
            assert has_release(lab, udp)
            time.sleep(0.2)
        assert leases(lab, "x/server")["unanswered"] == leases(lab, "x/client")["unanswered"] == 0


def test_where_lease_messages_are_blocked_no_flow_is_cut_and_it_is_shown(lab: Lab) -> None:
    block = ("-p", "udp", "--dport", str(LEASE_PORT), "-j", "DROP")
    for node in ("node:a", "node:b"):
        lab.run(node, "iptables", "-t", "raw", "-I", "PREROUTING", *block)
    with connection(lab, "x/client", "x/server") as (client, server), datagrams(lab, 4) as (_, udp):
        until(lambda: leases(lab, "x/server") == {"pairs": 1, "unanswered": 1}, "it is counted")
        keeps_on(lab, udp, TIMES.tcp_lapse_s + 1.0)
        assert has_release(lab, server)
        client.sendall(b"still there")
        assert server.recv(100) == b"still there"
        metrics = lab.node("a").admin("metrics")
        assert "trireme_unanswered_leases 1.0" in str(metrics)


# Another pod at the address.

REUSED = (ip_address("10.244.2.77"), ip_address("fd00:10:244:2::77"))


@versions
def test_another_pod_at_the_address_ends_the_flows_of_the_one_before(lab: Lab, version: int) -> None:
    """Its first datagram waits until the old pod has not answered three probes; nothing of its flows is left then."""
    old = PodSpec(PodRef("x", "old"), "b", labels={"app": "client"}, addresses=REUSED)
    lab.add_pod(old)
    with connection(lab, "x/old", "x/server", version) as (_, tcp):
        until(lambda: leases(lab, "x/server")["pairs"] >= 1, "there is a lease")
        time.sleep(2 * TIMES.lease_s)
        lab.remove_pod("x/old")
        removed_at = time.monotonic()
        lab.add_pod(replace(old, pod=PodRef("x", "new")))
        for place in ("x/server", "node:a", "node:b"):  # The old pod had another MAC.
            lab.run(place, "ip", "neigh", "flush", "to", str(REUSED[0]))
            lab.run(place, "ip", "-6", "neigh", "flush", "to", str(REUSED[1]))
        assert has_release(lab, tcp)
        family = FAMILIES[version]
        with (
            lab.open_socket("x/server", family, socket.SOCK_DGRAM) as server,
            lab.open_socket("x/new", family, socket.SOCK_DGRAM) as newcomer,
        ):
            server.bind((str(lab.address_of("x/server", version)), 0))
            server.settimeout(0.3)
            for _ in range(20):
                newcomer.sendto(b"new", server.getsockname()[:2])
                with suppress(TimeoutError):
                    assert server.recv(100) == b"new"
                    break
            else:
                raise AssertionError("the newcomer is not heard")
            assert not has_release(lab, tcp)
        assert time.monotonic() - removed_at < TIMES.tcp_lapse_s - 1.0, "it may have lapsed by silence"


# New labels.


@versions
def test_a_relabelled_client_loses_its_flows_at_the_remote_server_within_a_second(lab: Lab, version: int) -> None:
    with connection(lab, "x/client", "x/server", version) as (_, tcp), datagrams(lab, version) as (_, udp):
        leased(lab)
        lab.label("x/client", {"app": "stranger"})
        until(lambda: not has_release(lab, udp), "the UDP flow ends", SOON_S)
        until(lambda: not has_release(lab, tcp), "the connection ends", SOON_S)


def test_a_label_that_changes_nothing_costs_no_connection(lab: Lab) -> None:
    with connection(lab, "x/client", "x/server") as ends, Stream(*ends) as stream, datagrams(lab, 4) as (_, udp):
        leased(lab)
        for leader in ("yes", "no", "yes"):
            lab.label("x/client", {"app": "client", "leader": leader})
            stream.wait_for_rounds(3)
            keeps_on(lab, udp, SOON_S)
        stream.wait_for_rounds(3)


# Copied identities.


class Spoofer:
    """A machine on the server's bridge that sends packets under the client's address. A context manager."""

    def __init__(self, lab: Lab, version: int) -> None:
        self._family = FAMILIES[version]
        self._sock = open_socket(lab.place("host:near").netns, self._family, socket.SOCK_RAW, socket.IPPROTO_RAW)

    def __enter__(self) -> Spoofer:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def send(self, packet: bytes) -> None:
        to = packet[16:20] if packet[0] >> 4 == 4 else packet[24:40]
        self._sock.sendto(packet, (socket.inet_ntop(self._family, to), 0))


def copied_block(packets: list[bytes]) -> bytes:
    """Find the client's identity block among captured packets."""
    for packet in packets:
        try:
            segment = decode_tcp(packet)
        except PacketError:
            continue
        if segment.flags & 0x3F == SYN and is_frame(segment.payload):
            return decode_syn(segment.payload).block
    raise AssertionError("no SYN with an identity was captured")


@versions
def test_a_syn_with_a_copied_identity_ends_no_transfer(lab: Lab, version: int) -> None:
    with (
        lab.capture("x/server") as capture,
        connection(lab, "x/client", "x/server", version) as ends,
        Stream(*ends) as stream,
        Spoofer(lab, version) as spoofer,
    ):
        stream.wait_for_rounds(2)
        block = copied_block(capture.close())
        client, server = (end.getsockname() for end in ends)
        far, near = (socket.inet_pton(FAMILIES[version], end[0]) for end in (client, server))
        for n in range(20):
            bare = build(far, near, (client[1], server[1]), (1_000_000 * n, 0), SYN, 64_240)
            frame = encode_syn(SynFrame(os.urandom(16), block))
            spoofer.send(with_options_and_payload(decode_tcp(bare), SYN_OPTIONS, frame))
            stream.wait_for_rounds(1)
        stream.wait_for_rounds(5)
        assert has_release(lab, ends[1])


def _offers(packets: list[bytes]) -> list[bytes]:
    found = []
    for packet in packets:
        try:
            message = find_message(decode_udp(packet))
        except (PacketError, FrameError):
            continue
        if message is not None and frame_type(message[0]) == TYPE_OFFER:
            found.append(message[0])
    return found


@versions
def test_an_offer_with_a_copied_identity_ends_no_udp_flow(lab: Lab, version: int) -> None:
    with (
        lab.capture("x/server") as capture,
        datagrams(lab, version) as (client, server),
        Spoofer(lab, version) as spoofer,
    ):
        block = decode_syn(_offers(capture.close())[0], TYPE_OFFER).block
        ends = client.getsockname(), server.getsockname()
        far, near = (socket.inet_pton(FAMILIES[version], end[0]) for end in ends)
        for n in range(20):
            message = encode_syn(SynFrame(os.urandom(16), block), TYPE_OFFER)
            surplus = encode_option(UDP_HEADER, STANDALONE_EXID, message)
            spoofer.send(build_udp(far, near, (ends[0][1], ends[1][1]), b"", surplus))
            client.send(b"%d" % n)
            assert server.recv(100) == b"%d" % n
        assert has_release(lab, server)
