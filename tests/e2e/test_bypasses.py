# SPDX-License-Identifier: Apache-2.0
"""Ways around the queue: what an earlier connection left behind, marks, data in the SYN. None leads to accept()."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address

import pytest

from enforcer_daemon.handshake.frames import is_frame
from enforcer_daemon.marks import FORGET, INDEX_MASK, NODE, OWN_MASK, RELEASED, UNTRACKED, released_mark
from enforcer_daemon.packet.tcp import ACK, PSH, SYN, walk_options
from enforcer_daemon.reasons import Reason
from tests.e2e.attack import (
    DB,
    FAMILIES,
    SERVED_PORT,
    SETTLE_S,
    Attack,
    attack_from,
    attacking,
    captured_syn,
    pods,
    versions,
)
from tests.e2e.attackers import SYN_OPTIONS, Listener, RawClient, Wire, await_denial, read_authority, silenced, stripped
from trireme_lab import Lab, Outcome
from trireme_lab.netns import write_sysctls

pytestmark = pytest.mark.kernel

MARKS = (UNTRACKED, RELEASED, NODE, FORGET, RELEASED | NODE, released_mark(7), INDEX_MASK, OWN_MASK, 0xFFFF_FFFF)
MSG_FASTOPEN = 0x2000_0000
TCP_FASTOPEN = 23
FAST_OPEN_WITHOUT_COOKIE = 0x607  # net.ipv4.tcp_fastopen: client, server, and neither asks for a cookie
COOKIE = bytes((34, 10)) + bytes(8)
EXPERIMENTAL_COOKIE = bytes((254, 12)) + b"\xf9\x89" + bytes(8)


# With what an earlier connection left behind.


@pods
@versions
def test_a_reused_connection_after_a_reset(world: Lab, port: int, pod: str, version: int) -> None:
    """The first is allowed, and ends by RST with unread data; the second has the same ports, and no frame."""
    with attack_from(world, pod, port, version) as attack:
        with reusable_socket(attack, pod, version) as first:
            first.settimeout(3)
            first.connect(attack.dialed)
            attack.listener.accept().send(b"never read")
            first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with stripped(world, pod), reusable_socket(attack, pod, version) as second:
            second.settimeout(0.3)
            with pytest.raises(TimeoutError):
                second.connect(attack.dialed)
            attack.refused_for(Reason.UNIDENTIFIED_PEER)
        with reusable_socket(attack, pod, version) as third:  # the control: the ports are as good as any
            third.settimeout(3)
            third.connect(attack.dialed)
            attack.listener.accept()


@pods
def test_a_reused_connection_after_the_servers_reset(world: Lab, port: int, pod: str) -> None:
    with attack_from(world, pod, port) as attack:
        with reusable_socket(attack, pod, 4) as first:
            first.settimeout(3)
            first.connect(attack.dialed)
            first.send(b"never read")
            with attack.listener.accept() as served:
                served.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with pytest.raises(ConnectionResetError):
                first.recv(1)
        with stripped(world, pod), reusable_socket(attack, pod, 4) as second:
            second.settimeout(1.5)  # a RST goes in place of the first SYN; the kernel repeats it after 1 s
            with pytest.raises(TimeoutError):
                second.connect(attack.dialed)
            attack.refused_for(Reason.UNIDENTIFIED_PEER)


def reusable_socket(attack: Attack, pod: str, version: int) -> socket.socket:
    client = attack.lab.open_socket(pod, FAMILIES[version])
    try:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind((str(attack.wire.ip), 33_333))
    except OSError:
        client.close()
        raise
    return client


# With the marks that release a flow.


@versions
def test_marks_of_a_process_let_no_connection_out(world: Lab, port: int, version: int) -> None:
    with Listener(world, "host:near", port, version) as listener, ExitStack() as clients:
        for mark in MARKS:
            client = clients.enter_context(marked_socket(world, "shop/caged", mark, version))
            client.setblocking(False)
            client.connect_ex((str(listener.ip), port))
        await_denial(world, "shop/caged", Reason.EGRESS_DENIED, port)
        time.sleep(SETTLE_S)
        assert listener.accepted() == []


@versions
def test_marks_of_a_process_let_no_datagram_out(world: Lab, port: int, version: int) -> None:
    with Listener(world, "host:near", port, version, socket.SOCK_DGRAM) as listener:
        for mark in MARKS:
            with marked_socket(world, "shop/caged", mark, version, socket.SOCK_DGRAM) as client:
                client.sendto(b"let me out", (str(listener.ip), port))
        await_denial(world, "shop/caged", Reason.EGRESS_DENIED, port)
        time.sleep(SETTLE_S)
        assert listener.received() == []


@pytest.mark.parametrize("mark", MARKS, ids=hex)
def test_marks_of_a_server_let_no_connection_in(world: Lab, port: int, mark: int) -> None:
    """The server's own packets carry the mark: its SYN-ACK must not release the flow."""
    with attack_from(world, "host:near", port) as attack:
        attack.listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", mark))
        RawClient(attack.wire, *attack.target).send_syn()
        attack.refused_for(Reason.UNIDENTIFIED_PEER)
        client = attack.framed(attack.pod_token())
        client.send_framed_syn()
        client.await_answer()
        client.send_ack()
        client.send_ack(b"let me in")
        attack.refused_for(Reason.PROOF_MISSING)


@attacking
def test_marks_of_a_sender_let_no_datagram_in(world: Lab, port: int, host: str) -> None:
    with attack_from(world, host, port) as attack, Listener(world, DB, port, kind=socket.SOCK_DGRAM) as listener:
        for mark in MARKS:
            listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", mark))
            with marked_socket(world, host, mark, kind=socket.SOCK_DGRAM) as client:
                client.sendto(b"let me in", attack.dialed)
        attack.refused_for(Reason.UNIDENTIFIED_PEER)
        assert listener.received() == []


def marked_socket(lab: Lab, place: str, mark: int, version: int = 4, kind: int = socket.SOCK_STREAM) -> socket.socket:
    client = lab.open_socket(place, FAMILIES[version], kind)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", mark))
    return client


# With data in the SYN.


@contextmanager
def fast_attack_from(lab: Lab, place: str, port: int) -> Iterator[Attack]:
    """Attack a server that takes data of anybody's SYN, with a cookie or without."""
    write_sysctls(lab.place(DB).netns, {"net/ipv4/tcp_fastopen": str(FAST_OPEN_WITHOUT_COOKIE)})
    with attack_from(lab, place, port) as attack:
        attack.listener.socket.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN, 16)
        yield attack


@attacking
def test_fast_open_without_a_frame(world: Lab, port: int, host: str) -> None:
    write_sysctls(world.place(host).netns, {"net/ipv4/tcp_fastopen": str(FAST_OPEN_WITHOUT_COOKIE)})
    with fast_attack_from(world, host, port) as attack, world.open_socket(host) as client:
        client.setblocking(False)
        client.sendto(b"let me in", MSG_FASTOPEN, attack.dialed)
        RawClient(attack.wire, *attack.target).send_syn(b"let me in", SYN_OPTIONS + COOKIE + b"\x01\x01")
        attack.refused_for(Reason.UNIDENTIFIED_PEER)


@attacking
@pytest.mark.parametrize("cookie", [COOKIE, bytes((34, 2)), EXPERIMENTAL_COOKIE, b""], ids=["34", "ask", "254", "none"])
def test_fast_open_with_a_frame(world: Lab, port: int, host: str, cookie: bytes) -> None:
    with fast_attack_from(world, host, port) as attack:
        client = attack.framed(attack.pod_token())
        client.send_framed_syn(SYN_OPTIONS + cookie + b"\x01" * (-len(cookie) % 4))
        answer = client.await_answer()
        assert 34 not in [kind for kind, _, _ in walk_options(answer.options)]
        assert attack.listener.accepted() == []
        client.send_ack()
        client.send_ack(b"let me in")
        attack.refused_for(Reason.PROOF_MISSING)
        client.send_ack(options=client.prove(answer, read_authority(world)))
        assert attack.listener.accept()


@pytest.mark.parametrize("pod", ["shop/web", "shop/far-web"])
def test_fast_open_between_pods_waits_for_the_proof(world: Lab, port: int, pod: str) -> None:
    """Data of the SYN comes after the handshake, once; no cookie is asked for or given on the way."""
    write_sysctls(world.place(pod).netns, {"net/ipv4/tcp_fastopen": str(FAST_OPEN_WITHOUT_COOKIE)})
    with fast_attack_from(world, pod, port) as attack, world.open_socket(pod) as client:
        client.settimeout(3)
        client.sendto(b"hello", MSG_FASTOPEN, attack.dialed)
        assert attack.listener.accept().recv(100) == b"hello"
        syn = attack.wire.await_segment(lambda found: found.flags == SYN and found.dport == port)
        assert is_frame(syn.payload)
        assert 34 not in [kind for kind, _, _ in walk_options(syn.options)]


# With a daemon that has forgotten.


def test_a_captured_syn_after_a_restart_still_lacks_the_proof(world: Lab, port: int) -> None:
    """Which frames it has seen, a new daemon does not know; the answer to one is of use to its sender alone."""
    with attack_from(world, "host:near", port) as attack:
        syn = captured_syn(world, "shop/far-web", attack.listener)
        world.node("a").restart()
        with silenced(world, "shop/far-web", 4), Wire(world, DB) as tap:
            victim = ip_address(syn.src)
            client = RawClient(tap, *attack.target, source=victim)
            client.ports, client.isn = (syn.sport, syn.dport), syn.seq
            attack.wire.send(syn.packet)
            client.await_answer()
            attack.wire.send(client.segment(ACK, offset=1))
            attack.wire.send(client.segment(ACK | PSH, b"let me in", offset=1))
            attack.refused_for(Reason.PROOF_MISSING, victim)


# And after all that.


def test_those_who_may_connect_still_can(world: Lab) -> None:
    for pod in ("shop/web", "shop/far-web"):
        for version in (4, 6):
            assert world.probe(pod, DB, SERVED_PORT, version).outcome is Outcome.CONNECTED
    for node in world.nodes.values():
        assert node.daemon.exit_status is None
        assert "internal" not in node.log_text()
