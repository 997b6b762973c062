# SPDX-License-Identifier: Apache-2.0
"""Attackers against a pod that admits others by label: nothing reaches the application, and the reason is told."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest

from enforcer_daemon.handshake.frames import decode_syn, encode_block, encode_syn, is_frame, proof_option
from enforcer_daemon.handshake.local import LocalToken
from enforcer_daemon.identity.authority import make_authority
from enforcer_daemon.marks import FORGET, INDEX_MASK, NODE, OWN_MASK, RELEASED, released_mark
from enforcer_daemon.model import IPAddress
from enforcer_daemon.packet.tcp import ACK, FIN, PSH, SYN, SYN_ACK, Segment, walk_options
from enforcer_daemon.reasons import Reason
from tests.e2e.attackers import (
    SYN_OPTIONS,
    TRUST_DOMAIN,
    FramedClient,
    Listener,
    RawClient,
    Signer,
    Wire,
    await_denial,
    identity,
    read_authority,
    silenced,
    stripped,
    with_changed_labels,
)
from tests.e2e.conftest import ATTACKING_HOSTS, SERVED_PORT
from triremectl.lab import Lab, Outcome
from triremectl.lab.netns import exec_prefix, run, write_sysctls

pytestmark = pytest.mark.kernel

DB = "shop/db"
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
MARKS = (RELEASED, NODE, FORGET, RELEASED | NODE, released_mark(7), INDEX_MASK, OWN_MASK, 0xFFFF_FFFF)
MSG_FASTOPEN = 0x2000_0000
TCP_FASTOPEN = 23
FAST_OPEN_WITHOUT_COOKIE = 0x607  # net.ipv4.tcp_fastopen: client, server, and neither asks for a cookie
COOKIE = bytes((34, 10)) + bytes(8)
EXPERIMENTAL_COOKIE = bytes((254, 12)) + b"\xf9\x89" + bytes(8)
SETTLE_S = 0.2
"""For packets that should not arrive to arrive, seconds."""
attacking = pytest.mark.parametrize("host", ATTACKING_HOSTS)
pods = pytest.mark.parametrize("pod", ["shop/web", "shop/far-web"])
versions = pytest.mark.parametrize("version", [4, 6])


@dataclass(frozen=True, slots=True)
class Attack:
    """An attacker's wire, and the application that must never hear of him."""

    lab: Lab
    wire: Wire
    listener: Listener

    @property
    def target(self) -> tuple[IPAddress, int]:
        return self.listener.ip, self.listener.port

    @property
    def dialled(self) -> tuple[str, int]:
        """Return the target as sockets take it."""
        return str(self.listener.ip), self.listener.port

    def refused_for(self, reason: Reason, address: IPAddress | None = None) -> None:
        """Wait for the reason in what the server's enforcer says, and look at the application's log."""
        seen_from = self.wire.ip if address is None else address
        await_denial(self.lab, DB, reason, self.listener.port, address=seen_from)
        assert self.listener.accepted() == []

    def framed(self, token: LocalToken) -> FramedClient:
        return FramedClient(self.wire, *self.target, token)

    def pod_token(self) -> LocalToken:
        """Make a token that the policy admits, as the holder of the cluster's authority can."""
        return Signer.make(read_authority(self.lab), "made-up").token(identity([self.wire.ip], "made-up"))


@contextmanager
def attack_from(lab: Lab, place: str, port: int, version: int = 4) -> Iterator[Attack]:
    with Wire(lab, place, version) as wire, Listener(lab, DB, port, version) as listener:
        yield Attack(lab, wire, listener)


def captured_syn(lab: Lab, source: str, listener: Listener, version: int = 4) -> Segment:
    """Let a pod connect that may, with a tap on the server's link; give its SYN with the frame. Nothing stays open."""
    with Wire(lab, DB, version) as tap, lab.open_socket(source, FAMILIES[version]) as client:
        client.settimeout(3)
        client.connect((str(listener.ip), listener.port))
        served = listener.accept()
        syn = tap.await_segment(lambda found: found.flags == SYN and found.dport == listener.port)
        client.close()  # the client first, so that the server keeps nothing, not even TIME_WAIT
        assert served.recv(1) == b""
        served.close()
        return syn


# Without an identity.


@attacking
@versions
def test_without_a_frame(world: Lab, port: int, host: str, version: int) -> None:
    with attack_from(world, host, port, version) as attack:
        with world.open_socket(host, FAMILIES[version]) as client:
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.connect(attack.dialled)
        attack.refused_for(Reason.UNIDENTIFIED_PEER)


@pods
@versions
def test_a_pod_that_took_its_rules_away(world: Lab, port: int, pod: str, version: int) -> None:
    with attack_from(world, pod, port, version) as attack, stripped(world, pod):
        with world.open_socket(pod, FAMILIES[version]) as client:
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.connect(attack.dialled)
        attack.refused_for(Reason.UNIDENTIFIED_PEER)


@attacking
@versions
def test_segments_of_flows_that_nobody_judged(world: Lab, port: int, host: str, version: int) -> None:
    with attack_from(world, host, port, version) as attack:
        client = RawClient(attack.wire, *attack.target)
        attack.wire.send(client.segment(ACK | PSH, b"let me in", offset=1))
        client.await_reset()
        for flags in (ACK, FIN | ACK, SYN_ACK):
            attack.wire.send(RawClient(attack.wire, *attack.target).segment(flags))
        attack.refused_for(Reason.UNKNOWN_FLOW)


# With the frames of others.


@attacking
@versions
def test_frames_captured_and_sent_under_another_address(world: Lab, port: int, host: str, version: int) -> None:
    with attack_from(world, host, port, version) as attack:
        syn = captured_syn(world, "shop/web", attack.listener, version)
        RawClient(attack.wire, *attack.target).send_syn(syn.payload)
        attack.refused_for(Reason.SOURCE_MISMATCH)


@attacking
@versions
def test_frames_captured_and_sent_under_the_same_address(world: Lab, port: int, host: str, version: int) -> None:
    with attack_from(world, host, port, version) as attack:
        syn = captured_syn(world, "shop/web", attack.listener, version)
        victim = ip_address(syn.src)
        RawClient(attack.wire, *attack.target, source=victim).send_syn(syn.payload)
        attack.refused_for(Reason.REPLAYED_NONCE, victim)


@attacking
@versions
def test_a_captured_syn_repeated_byte_for_byte(world: Lab, port: int, host: str, version: int) -> None:
    """The pod is gone that sent it, and the attacker has its address and sees the answers; he lacks the keys alone."""
    with attack_from(world, host, port, version) as attack:
        syn = captured_syn(world, "shop/web", attack.listener, version)
        with silenced(world, "shop/web", version), Wire(world, DB, version) as tap:
            victim = ip_address(syn.src)
            client = RawClient(tap, *attack.target, source=victim)
            client.ports, client.isn = (syn.sport, syn.dport), syn.seq
            attack.wire.send(syn.packet)
            if client.find_answer(timeout_s=SETTLE_S) is not None:
                attack.wire.send(client.segment(ACK | PSH, b"let me in", offset=1))
                time.sleep(SETTLE_S)
        assert attack.listener.accepted() == []
        attack.refused_for(Reason.REPLAYED_NONCE, victim)


@attacking
def test_a_relay_of_frames_that_were_meant_for_it(world: Lab, port: int, host: str) -> None:
    with attack_from(world, host, port) as attack, world.open_socket("shop/web") as client:
        client.setblocking(False)
        client.connect_ex((str(attack.wire.ip), port))
        syn = attack.wire.await_segment(lambda found: found.flags == SYN and found.dport == port)
        assert is_frame(syn.payload)
        RawClient(attack.wire, *attack.target).send_syn(syn.payload)
        attack.refused_for(Reason.SOURCE_MISMATCH)


@attacking
@versions
def test_a_reflection_of_a_pods_own_frames(world: Lab, port: int, host: str, version: int) -> None:
    with attack_from(world, host, port, version) as attack, world.open_socket(DB, FAMILIES[version]) as client:
        client.setblocking(False)
        client.connect_ex((str(attack.wire.ip), port))
        syn = attack.wire.await_segment(lambda found: found.flags == SYN and found.dport == port)
        RawClient(attack.wire, *attack.target).send_syn(syn.payload)
        attack.refused_for(Reason.OWN_IDENTITY)


@versions
def test_another_pod_answers_at_the_dialled_address(world: Lab, port: int, version: int) -> None:
    """The address is one where a pod would have an enforcer; somebody on the way leads it elsewhere."""
    dialled = {4: "10.244.1.240", 6: "fd00:10:244:1::f0"}[version]
    family, target = ("ip", "{}:{}") if version == 4 else ("ip6", "[{}]:{}")
    with Listener(world, DB, port, version) as listener, world.open_socket("shop/far-web", FAMILIES[version]) as client:
        rules = (
            f"add table {family} detour",
            f"add chain {family} detour pre {{ type nat hook prerouting priority -100; }}",
            f"add rule {family} detour pre {family} daddr {dialled} meta l4proto tcp dnat to "
            + target.format(listener.ip, port),
        )
        run([*exec_prefix(world.place("node:b").netns), "nft", "-f", "-"], "\n".join(rules))
        try:
            client.settimeout(0.5)
            with pytest.raises(TimeoutError):
                client.connect((dialled, port))
        finally:
            world.run("node:b", "nft", "delete", "table", family, "detour")
        await_denial(world, "shop/far-web", Reason.RESPONDER_MISMATCH, None, address=ip_address(dialled))
        assert listener.accepted() == []


# With forged frames.


@attacking
@versions
def test_changed_labels(world: Lab, port: int, host: str, version: int) -> None:
    with attack_from(world, host, port, version) as attack:
        authority = read_authority(world)
        rogue = Signer.make(authority, "made-up").token(identity([attack.wire.ip], "made-up", "shop/rogue", "rogue"))
        client = attack.framed(rogue)
        client.send_syn(encode_syn(decode_syn(client.flow.frame)._replace(
            block=with_changed_labels(rogue.block, b'"app":"rogue"', b'"app":"web"')
        )))  # fmt: skip
        attack.refused_for(Reason.TOKEN_SIGNATURE)


@attacking
@versions
def test_a_node_of_an_unknown_authority(world: Lab, port: int, host: str, version: int) -> None:
    with attack_from(world, host, port, version) as attack:
        stranger = make_authority(TRUST_DOMAIN, datetime.now(UTC))
        token = Signer.make(stranger, "a").token(identity([attack.wire.ip], "a"))
        attack.framed(token).send_framed_syn()
        attack.refused_for(Reason.CREDENTIAL_UNTRUSTED)


@attacking
def test_an_expired_token(world: Lab, port: int, host: str) -> None:
    with attack_from(world, host, port) as attack:
        signer = Signer.make(read_authority(world), "made-up")
        attack.framed(signer.token(identity([attack.wire.ip], "made-up"), age_s=1000)).send_framed_syn()
        attack.refused_for(Reason.TOKEN_EXPIRED)


def test_a_token_from_the_future(world: Lab, port: int) -> None:
    with attack_from(world, "host:near", port) as attack:
        signer = Signer.make(read_authority(world), "made-up")
        attack.framed(signer.token(identity([attack.wire.ip], "made-up"), age_s=-1000)).send_framed_syn()
        attack.refused_for(Reason.TOKEN_NOT_YET_VALID)


@attacking
def test_an_expired_credential(world: Lab, port: int, host: str) -> None:
    with attack_from(world, host, port) as attack:
        signer = Signer.make(read_authority(world), "made-up", age=timedelta(hours=2))
        attack.framed(signer.token(identity([attack.wire.ip], "made-up"))).send_framed_syn()
        attack.refused_for(Reason.CREDENTIAL_EXPIRED)


@attacking
def test_a_token_under_another_nodes_credential(world: Lab, port: int, host: str) -> None:
    with attack_from(world, host, port) as attack:
        authority = read_authority(world)
        one, other = Signer.make(authority, "one"), Signer.make(authority, "other")
        client = attack.framed(one.token(identity([attack.wire.ip], "one")))
        frame = decode_syn(client.flow.frame)
        token = frame.block[4 + len(one.credential.der) :]
        client.send_syn(encode_syn(frame._replace(block=encode_block(other.credential.der, token))))
        attack.refused_for(Reason.CREDENTIAL_MISMATCH)


def test_a_node_that_signs_for_another(world: Lab, port: int) -> None:
    with attack_from(world, "host:near", port) as attack:
        signer = Signer.make(read_authority(world), "made-up")
        attack.framed(signer.token(identity([attack.wire.ip], "b"))).send_framed_syn()
        attack.refused_for(Reason.CREDENTIAL_MISMATCH)


def test_a_node_that_signs_for_addresses_of_others(world: Lab, port: int) -> None:
    with attack_from(world, "host:near", port) as attack:
        signer = Signer.make(read_authority(world), "made-up")
        elsewhere = world.place("shop/web").address()
        attack.framed(signer.token(identity([elsewhere], "made-up"))).send_framed_syn()
        attack.refused_for(Reason.SOURCE_MISMATCH)


def test_a_true_identity_that_no_rule_admits(world: Lab, port: int) -> None:
    with attack_from(world, "host:near", port) as attack:
        signer = Signer.make(read_authority(world), "made-up")
        attack.framed(signer.token(identity([attack.wire.ip], "made-up", app="rogue"))).send_framed_syn()
        attack.refused_for(Reason.INGRESS_DENIED)


# With a true frame, and without the keys.


@attacking
@versions
def test_the_right_proof_is_what_lets_in(world: Lab, port: int, host: str, version: int) -> None:
    """The control of the tests below: the same client with the proof is a pod like any other."""
    with attack_from(world, host, port, version) as attack:
        client = attack.framed(attack.pod_token())
        client.send_framed_syn()
        option = client.prove(client.await_answer(), read_authority(world))
        client.send_ack(options=option)
        client.send_ack(b"hello")
        assert attack.listener.accept().recv(100) == b"hello"


@attacking
@versions
def test_no_proof(world: Lab, port: int, host: str, version: int) -> None:
    with attack_from(world, host, port, version) as attack:
        client = attack.framed(attack.pod_token())
        client.send_framed_syn()
        client.await_answer()
        client.send_ack()
        client.send_ack(b"let me in")
        attack.refused_for(Reason.PROOF_MISSING)


@attacking
@versions
def test_a_wrong_proof(world: Lab, port: int, host: str, version: int) -> None:
    with attack_from(world, host, port, version) as attack:
        client = attack.framed(attack.pod_token())
        client.send_framed_syn()
        client.await_answer()
        for is_lone in (False, True):
            client.send_ack(options=proof_option(os.urandom(16), is_lone=is_lone))
            client.send_ack(b"let me in", proof_option(bytes(16), is_lone=is_lone))
        attack.refused_for(Reason.PROOF_INVALID)


def test_the_proof_of_another_connection(world: Lab, port: int) -> None:
    with attack_from(world, "host:near", port) as attack:
        token, authority = attack.pod_token(), read_authority(world)
        one, other = attack.framed(token), attack.framed(token)
        one.send_framed_syn()
        option = one.prove(one.await_answer(), authority)
        other.send_framed_syn()
        other.await_answer()
        other.send_ack(b"let me in", option)
        attack.refused_for(Reason.PROOF_INVALID)


# With what an earlier connection left behind.


@pods
@versions
def test_a_reused_connection_after_a_reset(world: Lab, port: int, pod: str, version: int) -> None:
    """The first is allowed, and ends by RST with unread data; the second has the same ports, and no frame."""
    with attack_from(world, pod, port, version) as attack:
        with reusable_socket(attack, pod, version) as first:
            first.settimeout(3)
            first.connect(attack.dialled)
            attack.listener.accept().send(b"never read")
            first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with stripped(world, pod), reusable_socket(attack, pod, version) as second:
            second.settimeout(0.3)
            with pytest.raises(TimeoutError):
                second.connect(attack.dialled)
            attack.refused_for(Reason.UNIDENTIFIED_PEER)
        with reusable_socket(attack, pod, version) as third:  # the control: the ports are as good as any
            third.settimeout(3)
            third.connect(attack.dialled)
            attack.listener.accept()


@pods
def test_a_reused_connection_after_the_servers_reset(world: Lab, port: int, pod: str) -> None:
    with attack_from(world, pod, port) as attack:
        with reusable_socket(attack, pod, 4) as first:
            first.settimeout(3)
            first.connect(attack.dialled)
            first.send(b"never read")
            with attack.listener.accept() as served:
                served.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with pytest.raises(ConnectionResetError):
                first.recv(1)
        with stripped(world, pod), reusable_socket(attack, pod, 4) as second:
            second.settimeout(0.3)
            with pytest.raises(TimeoutError):
                second.connect(attack.dialled)
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
        await_denial(world, "shop/caged", Reason.PROTOCOL_NOT_AUTHENTICATED, port)
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
                client.sendto(b"let me in", attack.dialled)
        attack.refused_for(Reason.PROTOCOL_NOT_AUTHENTICATED)
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
        client.sendto(b"let me in", MSG_FASTOPEN, attack.dialled)
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
        client.sendto(b"hello", MSG_FASTOPEN, attack.dialled)
        assert attack.listener.accept().recv(100) == b"hello"
        syn = attack.wire.await_segment(lambda found: found.flags == SYN and found.dport == port)
        assert is_frame(syn.payload)
        assert 34 not in [kind for kind, _, _ in walk_options(syn.options)]


# And after all that.


def test_those_who_may_connect_still_can(world: Lab) -> None:
    for pod in ("shop/web", "shop/far-web"):
        for version in (4, 6):
            assert world.probe(pod, DB, SERVED_PORT, version).outcome is Outcome.CONNECTED
    for node in world.nodes.values():
        assert node.daemon.exit_status is None
        assert "internal" not in node.log_text()
