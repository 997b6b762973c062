# SPDX-License-Identifier: Apache-2.0
"""The rules against real packets: what passes in the kernel, what is queued, and that nothing skips the queue."""

from __future__ import annotations

import dataclasses
import errno
import functools
import socket
import struct
import threading
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from enforcer_daemon import marks
from enforcer_daemon.dataplane.backends import RulesBackend, choose_backend
from enforcer_daemon.dataplane.inject import Injector
from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.dataplane.tools import run_in
from enforcer_daemon.handshake.frames import MARKER_ID
from enforcer_daemon.model import Direction
from enforcer_daemon.packet.udp import build_udp, decode_udp, with_marker
from enforcer_daemon.settings import RulesBackend as BackendSetting
from enforcer_daemon.verdict import ACCEPT, DROP, Action, Settle, Verdict
from tests.netns.lab import (
    ACK,
    DENIED_S,
    EVERY_BACKEND,
    FAMILIES,
    NODE,
    POD,
    REMOTE,
    SYN,
    Lab,
    Recorder,
    is_syn,
    make_backend,
    open_lab,
    serve,
    tcp_flags,
    tcp_packet,
    wait_until,
)

pytestmark = pytest.mark.kernel

RELEASE = Verdict(Action.RELEASE, mark=marks.released_mark(5))


@pytest.fixture(params=EVERY_BACKEND)
def backend(request: pytest.FixtureRequest) -> RulesBackend:
    return make_backend(request.param)


@pytest.fixture(params=(4, 6), ids=("ipv4", "ipv6"))
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def lab(backend: RulesBackend) -> Iterator[Lab]:
    with open_lab() as lab:
        backend.apply(lab.pod, lab.rules())
        yield lab


def release_on_ack(packet: bytes, direction: Direction, mark: int) -> Verdict:
    return ACCEPT if tcp_flags(packet) & SYN else RELEASE


def test_without_an_enforcer_nothing_but_the_node_reaches_the_pod(lab: Lab, version: int) -> None:
    with lab.listen(lab.pod, version):
        assert not lab.connects(lab.remote, (POD[version], 8080), DENIED_S)
        assert lab.connects(lab.node, (POD[version], 8080))


def test_without_an_enforcer_the_pod_reaches_nobody_also_not_the_node(lab: Lab, version: int) -> None:
    with lab.listen(lab.remote, version), lab.listen(lab.node, version):
        assert not lab.connects(lab.pod, (REMOTE[version], 8080), DENIED_S)
        assert not lab.connects(lab.pod, (NODE[version], 8080), DENIED_S)


def test_a_probe_carries_data_both_ways_without_an_enforcer(lab: Lab, version: int) -> None:
    with lab.listen(lab.pod, version) as listener, lab.open_socket(lab.node, version) as probe:
        probe.connect((POD[version], 8080))
        accepted, _ = listener.accept()
        with accepted:
            probe.sendall(b"GET")
            assert accepted.recv(8) == b"GET"
            accepted.sendall(b"200" * 10_000)
            accepted.shutdown(socket.SHUT_WR)
            assert len(_read_all(probe)) == 30_000


def test_udp_of_the_node_and_its_answer_pass_and_other_udp_does_not(lab: Lab, version: int) -> None:
    with lab.open_socket(lab.pod, version, socket.SOCK_DGRAM) as service:
        service.bind((POD[version], 53))
        with (
            lab.open_socket(lab.remote, version, socket.SOCK_DGRAM) as remote,
            lab.open_socket(lab.node, version, socket.SOCK_DGRAM) as node,
        ):
            remote.sendto(b"remote", (POD[version], 53))
            node.sendto(b"node", (POD[version], 53))
            data, sender = service.recvfrom(16)
            assert data == b"node"
            service.sendto(b"answer", sender)
            assert node.recv(16) == b"answer"


@pytest.mark.parametrize("mark", [marks.RELEASED, marks.FORGET, marks.NODE, marks.OWN_MASK, marks.released_mark(9)])
def test_a_mark_that_a_process_sets_gains_it_nothing(lab: Lab, version: int, mark: int) -> None:
    evaluate = Recorder(lambda *_: DROP)
    with (
        serve(lab, evaluate),
        lab.open_socket(lab.pod, version) as stream,
        lab.open_socket(lab.pod, version, socket.SOCK_DGRAM) as datagrams,
    ):
        for sock in (stream, datagrams):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", mark))
        stream.setblocking(False)
        stream.connect_ex((REMOTE[version], 8080))
        datagrams.sendto(b"let me out", (REMOTE[version], 8080))
        protocol_at = 9 if version == 4 else 6
        assert wait_until(lambda: {packet[protocol_at] for packet, _, _ in evaluate.seen} == {6, 17})
    assert {seen & marks.OWN_MASK for _, _, seen in evaluate.seen} == {0}


def test_a_syn_that_answers_the_pods_own_shows_it(lab: Lab, version: int) -> None:
    silent = {4: "10.88.0.99", 6: "fd88::99"}[version]  # Nobody refuses the SYN.
    evaluate = Recorder(lambda _, direction, __: ACCEPT if direction is Direction.EGRESS else DROP)
    injector = Injector(lab.remote)
    try:
        with serve(lab, evaluate), lab.open_socket(lab.pod, version) as client:
            client.bind((POD[version], 4_000))
            client.setblocking(False)
            client.connect_ex((silent, 4_001))
            assert wait_until(lambda: bool(evaluate.seen))
            for port in (4_001, 4_002):
                assert injector.send(tcp_packet((silent, port), (POD[version], 4_000), SYN))
            assert wait_until(lambda: _arrived(evaluate) == {4_001: marks.REPLY, 4_002: 0})
    finally:
        injector.close()


def _arrived(evaluate: Recorder) -> dict[int, int]:
    """Give our bits of the marks of what arrived, by source port."""
    found = {}
    for packet, direction, mark in evaluate.seen:
        if direction is Direction.INGRESS:
            at = _transport_at(packet)
            found[int.from_bytes(packet[at : at + 2], "big")] = mark & marks.OWN_MASK
    return found


def _transport_at(packet: bytes) -> int:
    return 20 if packet[0] >> 4 == 4 else 40


def test_a_connections_mark_that_a_sidecar_restores_does_not_release_a_syn(lab: Lab) -> None:
    run_in(lab.pod, ("iptables", "-t", "mangle", "-A", "OUTPUT", "-j", "MARK", "--set-mark", f"{marks.RELEASED:#x}"))
    with lab.listen(lab.remote, 4):
        assert not lab.connects(lab.pod, (REMOTE[4], 8080), 0.3)


def test_a_syn_with_payload_is_queued_also_from_the_node(lab: Lab, version: int) -> None:
    evaluate = Recorder(lambda *_: DROP)
    injector = Injector(lab.node)
    try:
        with serve(lab, evaluate):
            assert injector.send(tcp_packet((NODE[version], 4000), (POD[version], 8080), SYN, b"f" * 300))
            assert wait_until(lambda: len(evaluate.seen) == 1)
    finally:
        injector.close()
    ((packet, direction, mark),) = evaluate.seen
    assert (packet[-300:], direction, mark) == (b"f" * 300, Direction.INGRESS, 0)


def test_an_unsolicited_packet_of_the_node_without_syn_is_queued(lab: Lab, version: int) -> None:
    evaluate = Recorder(lambda *_: DROP)
    injector = Injector(lab.node)
    try:
        with serve(lab, evaluate):
            injector.send(tcp_packet((NODE[version], 4000), (POD[version], 8080), ACK, b"data"))
            assert wait_until(lambda: len(evaluate.seen) == 1)
    finally:
        injector.close()


def test_a_released_flow_stays_in_the_kernel(lab: Lab, version: int) -> None:
    evaluate = Recorder(release_on_ack)
    with serve(lab, evaluate), lab.listen(lab.pod, version) as listener, lab.open_socket(lab.remote, version) as client:
        client.connect((POD[version], 8080))
        accepted, _ = listener.accept()
        with accepted:
            sender = threading.Thread(target=_send_all, args=(client, bytes(1 << 20)))
            sender.start()
            assert len(_read_all(accepted)) == 1 << 20
            sender.join()
    assert len(evaluate.seen) == 3  # SYN, SYN-ACK, ACK
    assert [direction for _, direction, _ in evaluate.seen] == [Direction.INGRESS, Direction.EGRESS, Direction.INGRESS]


def test_a_released_flow_goes_on_when_the_enforcer_is_gone(lab: Lab, version: int) -> None:
    with lab.listen(lab.pod, version) as listener, lab.open_socket(lab.remote, version) as client:
        with serve(lab, release_on_ack):
            client.connect((POD[version], 8080))
            accepted, _ = listener.accept()
        with accepted:
            client.sendall(b"still here")
            assert accepted.recv(16) == b"still here"


def test_the_connections_mark_keeps_the_bits_of_others(lab: Lab) -> None:
    run_in(lab.pod, ("iptables", "-t", "raw", "-A", "OUTPUT", "-j", "MARK", "--or-mark", "0x539"))
    run_in(lab.pod, ("iptables", "-t", "mangle", "-A", "OUTPUT", "-j", "CONNMARK", "--set-xmark", "0x539/0xfff"))
    with serve(lab, release_on_ack), lab.listen(lab.remote, 4), lab.open_socket(lab.pod, 4) as client:
        client.connect((REMOTE[4], 8080))
        expected = f"mark={marks.released_mark(5) | 0x539}"
        assert wait_until(lambda: expected in run_in(lab.pod, ("conntrack", "-L", "-p", "tcp")))


def test_a_reused_tuple_with_a_stale_release_is_queued_and_shows_it(lab: Lab, version: int) -> None:
    evaluate = Recorder(release_on_ack)
    with serve(lab, evaluate), lab.listen(lab.pod, version) as listener:
        for _ in range(2):
            with lab.open_socket(lab.remote, version) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                # Close by RST, the case in which conntrack keeps the old entry.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.bind((REMOTE[version], 5555))
                client.connect((POD[version], 8080))
                accepted, _ = listener.accept()
                accepted.close()
        syns = [mark & marks.OWN_MASK for packet, _, mark in evaluate.seen if is_syn(packet)]
    assert len(syns) == 2
    assert syns[0] == 0
    assert syns[1] in (0, marks.released_mark(5))


def test_forget_takes_a_release_back(lab: Lab, version: int) -> None:
    evaluate = Recorder(release_on_ack)
    injector = Injector(lab.remote)
    try:
        with (
            serve(lab, evaluate),
            lab.listen(lab.pod, version) as listener,
            lab.open_socket(lab.remote, version) as client,
        ):
            client.bind((REMOTE[version], 5556))
            client.connect((POD[version], 8080))
            accepted, _ = listener.accept()
            with accepted:
                evaluate.seen.clear()
                evaluate.answer = lambda packet, *_: Verdict(Action.FORGET) if is_syn(packet) else DROP
                injector.send(tcp_packet((REMOTE[version], 5556), (POD[version], 8080), SYN, seq=77))
                assert wait_until(lambda: any(is_syn(packet) for packet, _, _ in evaluate.seen))
                assert evaluate.seen[0][2] == marks.released_mark(5)
                client.sendall(b"unreleased")
                accepted.settimeout(0.4)
                with pytest.raises(TimeoutError):
                    accepted.recv(16)
    finally:
        injector.close()


def test_a_marked_datagram_of_a_released_flow_is_queued_and_shows_the_release(lab: Lab, version: int) -> None:
    """A message behind its data is for the enforcer; nft cannot find it there."""
    evaluate = Recorder(lambda *_: Verdict(Action.RELEASE, mark=marks.released_mark(7)))
    with (
        serve(lab, evaluate),
        lab.open_socket(lab.pod, version, socket.SOCK_DGRAM) as server,
        lab.open_socket(lab.remote, version, socket.SOCK_DGRAM) as client,
        open_in(lab.remote, lambda: socket.socket(FAMILIES[version], socket.SOCK_RAW, socket.IPPROTO_RAW)) as raw,
    ):
        server.bind((POD[version], 5353))
        client.bind((REMOTE[version], 4444))
        client.sendto(b"first", (POD[version], 5353))
        assert server.recv(100) == b"first"
        client.sendto(b"in the kernel", (POD[version], 5353))
        assert server.recv(100) == b"in the kernel"
        assert len(evaluate.seen) == 1
        evaluate.answer = lambda *_: ACCEPT
        ends = ip_address(REMOTE[version]).packed, ip_address(POD[version]).packed
        marked = with_marker(decode_udp(build_udp(*ends, (4444, 5353), b"marked")), MARKER_ID)
        raw.sendto(marked, (POD[version], 0))
        assert server.recv(100) == b"marked"
        ((packet, *seen),) = evaluate.seen[1:]
        assert (decode_udp(packet).payload, seen) == (b"marked", [Direction.INGRESS, marks.released_mark(7)])
        client.sendto(b"still in the kernel", (POD[version], 5353))
        assert server.recv(100) == b"still in the kernel"
        assert len(evaluate.seen) == 2


def test_icmp_passes_without_an_enforcer(lab: Lab, version: int) -> None:
    for place, target in ((lab.remote, POD), (lab.pod, REMOTE)):
        family, protocol = ((socket.AF_INET, 1), (socket.AF_INET6, 58))[version == 6]
        with open_in(place, functools.partial(socket.socket, family, socket.SOCK_RAW, protocol)) as sock:
            sock.settimeout(3)
            request, reply, checksum = (8, 0, 0xF6FD) if version == 4 else (128, 129, 0)  # IPv6: the kernel's
            sock.sendto(
                struct.pack("!BBHHH", request, 0, checksum, 0x0102 if version == 4 else 1, 0), (target[version], 0)
            )
            while sock.recv(256)[20 if version == 4 else 0] != reply:
                pass


def test_duplicate_address_detection_works_under_the_rules(lab: Lab) -> None:
    run_in(lab.pod, ("sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=1"))
    run_in(lab.pod, ("ip", "addr", "add", f"{NODE[6]}/64", "dev", "eth0"))  # the node has it
    run_in(lab.pod, ("ip", "addr", "add", "fd77::99/64", "dev", "eth0"))
    listing = ("ip", "-6", "addr", "show", "dev", "eth0")
    assert wait_until(
        lambda: run_in(lab.pod, listing).count("tentative") == run_in(lab.pod, listing).count("dadfailed"), 5
    )
    lines = run_in(lab.pod, listing).splitlines()
    assert [f"{NODE[6]}/64" in line for line in lines if "dadfailed" in line] == [True]


def test_loopback_is_left_alone(lab: Lab, version: int) -> None:
    with lab.listen(lab.pod, version):
        assert lab.connects(lab.pod, ("127.0.0.1" if version == 4 else "::1", 8080))
        assert lab.connects(lab.pod, (POD[version], 8080))


def test_beside_a_sidecar_only_the_port_of_the_answer_differs_from_the_remotes_view(lab: Lab, version: int) -> None:
    """The un-NAT of an answer's source port comes after mangle POSTROUTING: the flow is known by the rest."""
    redirect = {"PREROUTING": ("8080", "15006"), "OUTPUT": ("9090", "15001")}
    for chain, (port, sidecar) in redirect.items():
        rule = f"-t nat -A {chain} -p tcp --dport {port} -j REDIRECT --to-ports {sidecar}"
        run_in(lab.pod, ("iptables" if version == 4 else "ip6tables", *rule.split()))
    evaluate = Recorder(release_on_ack)
    with serve(lab, evaluate), lab.listen(lab.pod, version, 15006), lab.listen(lab.pod, version, 15001):
        assert lab.connects(lab.remote, (POD[version], 8080))
        assert lab.connects(lab.pod, (REMOTE[version], 9090))  # ends at the sidecar, over lo
    offset = 20 if version == 4 else 40
    handshake = evaluate.seen[:3]  # a FIN may be queued before the ACK's release is carried out
    syn, syn_ack, ack = (struct.unpack_from("!HHII", packet, offset) for packet, _, _ in handshake)
    client_port, isn = syn[0], syn[2]
    assert (syn[1], ack[:2]) == (8080, (client_port, 8080))
    assert syn_ack[:2] == (15006, client_port)
    assert syn_ack[3] == (isn + 1) & 0xFFFF_FFFF


def test_packets_that_wait_survive_new_rules(lab: Lab, backend: RulesBackend, version: int) -> None:
    """No retransmission of the SYN passes, so that the connection shows what became of the first."""
    hold = Verdict(Action.HOLD, hold_id=1)

    def hold_the_first_syn(packet: bytes, *_: object) -> Verdict:
        if not is_syn(packet):
            return ACCEPT
        return hold if len(evaluate.seen) == 1 else DROP

    evaluate = Recorder(hold_the_first_syn)
    with serve(lab, evaluate) as queue, lab.listen(lab.pod, version), lab.open_socket(lab.remote, version) as client:
        client.setblocking(False)
        client.connect_ex((POD[version], 8080))
        assert wait_until(lambda: queue.held_packets == 1)
        changed = dataclasses.replace(lab.rules(), ifnames=("eth0", "net1"))
        backend.apply(lab.pod, changed)
        backend.update_node_addresses(lab.pod, changed.node_addresses)
        backend.apply(lab.pod, lab.rules())
        queue.apply((Settle(1, ACCEPT),))
        assert wait_until(lambda: client.connect_ex((POD[version], 8080)) in (0, errno.EISCONN))


def test_a_new_address_of_the_node_is_let_through_and_an_old_one_no_longer(
    lab: Lab, backend: RulesBackend, version: int
) -> None:
    other = frozenset({ip_address(REMOTE[version])})
    backend.update_node_addresses(lab.pod, other)
    with lab.listen(lab.pod, version):
        assert lab.connects(lab.remote, (POD[version], 8080))
        assert not lab.connects(lab.node, (POD[version], 8080), 0.3)
    assert backend.is_intact(lab.pod, dataclasses.replace(lab.rules(), node_addresses=other))


def test_a_fragment_that_a_process_makes_is_dropped(lab: Lab) -> None:
    ip_nodefrag = 22  # linux/in.h
    evaluate = Recorder()
    raw = open_in(lab.pod, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))
    with raw, serve(lab, evaluate):
        raw.setsockopt(socket.IPPROTO_IP, ip_nodefrag, 1)
        packet = bytearray(tcp_packet((POD[4], 1), (REMOTE[4], 2), ACK, b"x" * 64))
        packet[6:8] = b"\x00\x05"  # offset 40
        with pytest.raises(PermissionError):  # what a dropped packet looks like to its sender
            raw.sendto(bytes(packet), (REMOTE[4], 0))
    assert evaluate.seen == []


@pytest.mark.stock_kernel
def test_the_backend_is_chosen_by_what_works_here() -> None:
    assert choose_backend(BackendSetting.AUTO).name in ("nft", "iptables-nft", "iptables-legacy")
    assert choose_backend(BackendSetting.IPTABLES).name in ("iptables-nft", "iptables-legacy")


def _read_all(sock: socket.socket) -> bytes:
    chunks: list[bytes] = []
    while chunk := sock.recv(1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)


def _send_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
