# SPDX-License-Identifier: Apache-2.0
"""Attackers against a pod that admits others by label: nothing reaches the application, and the reason is told."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest

from enforcer_daemon.handshake.frames import decode_syn, encode_block, encode_syn, is_frame, proof_option
from enforcer_daemon.identity.authority import make_authority
from enforcer_daemon.packet.tcp import ACK, FIN, PSH, SYN, SYN_ACK
from enforcer_daemon.reasons import Reason
from tests.e2e.attack import (
    DB,
    FAMILIES,
    SETTLE_S,
    attack_from,
    attacking,
    captured_syn,
    pods,
    versions,
)
from tests.e2e.attackers import (
    TRUST_DOMAIN,
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
from trireme_lab import Lab
from trireme_lab.netns import exec_prefix, run

pytestmark = pytest.mark.kernel


# Without an identity.


@attacking
@versions
def test_without_a_frame(world: Lab, port: int, host: str, version: int) -> None:
    with attack_from(world, host, port, version) as attack:
        with world.open_socket(host, FAMILIES[version]) as client:
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.connect(attack.dialed)
        attack.refused_for(Reason.UNIDENTIFIED_PEER)


@pods
@versions
def test_a_pod_that_took_its_rules_away(world: Lab, port: int, pod: str, version: int) -> None:
    with attack_from(world, pod, port, version) as attack, stripped(world, pod):
        with world.open_socket(pod, FAMILIES[version]) as client:
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.connect(attack.dialed)
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


@versions
def test_frames_captured_and_sent_under_the_same_address(world: Lab, port: int, version: int) -> None:
    """Of a pod of another node: under the address of one of its own, the node lets nothing in from elsewhere."""
    with attack_from(world, "host:near", port, version) as attack:
        syn = captured_syn(world, "shop/far-web", attack.listener, version)
        victim = ip_address(syn.src)
        RawClient(attack.wire, *attack.target, source=victim).send_syn(syn.payload)
        attack.refused_for(Reason.REPLAYED_NONCE, victim)


@versions
def test_a_captured_syn_repeated_byte_for_byte(world: Lab, port: int, version: int) -> None:
    """The pod is gone that sent it, and the attacker has its address and sees the answers; he lacks the keys alone."""
    with attack_from(world, "host:near", port, version) as attack:
        syn = captured_syn(world, "shop/far-web", attack.listener, version)
        with silenced(world, "shop/far-web", version), Wire(world, DB, version) as tap:
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
    dialed = {4: "10.244.1.240", 6: "fd00:10:244:1::f0"}[version]
    family, target = ("ip", "{}:{}") if version == 4 else ("ip6", "[{}]:{}")
    with Listener(world, DB, port, version) as listener, world.open_socket("shop/far-web", FAMILIES[version]) as client:
        rules = (
            f"add table {family} detour",
            f"add chain {family} detour pre {{ type nat hook prerouting priority -100; }}",
            f"add rule {family} detour pre {family} daddr {dialed} meta l4proto tcp dnat to "
            + target.format(listener.ip, port),
        )
        run([*exec_prefix(world.place("node:b").netns), "nft", "-f", "-"], "\n".join(rules))
        try:
            client.settimeout(0.5)
            with pytest.raises(TimeoutError):
                client.connect((dialed, port))
        finally:
            world.run("node:b", "nft", "delete", "table", family, "detour")
        await_denial(world, "shop/far-web", Reason.RESPONDER_MISMATCH, None, address=ip_address(dialed))
        assert listener.accepted() == []


# With forged frames.


@attacking
@versions
def test_changed_labels(world: Lab, port: int, host: str, version: int) -> None:
    with attack_from(world, host, port, version) as attack:
        authority = read_authority(world)
        rogue = Signer.make(authority, "made-up").token(identity([attack.wire.ip], "made-up", "shop/rogue", "rogue"))
        client = attack.framed(rogue)
        client.send_syn(encode_syn(decode_syn(client.session.frame)._replace(
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
        # At a time when the authority was valid already: else that would be what is wrong.
        ages = timedelta(minutes=3), timedelta(minutes=1)
        signer = Signer.make(read_authority(world), "made-up", *ages)
        attack.framed(signer.token(identity([attack.wire.ip], "made-up"))).send_framed_syn()
        attack.refused_for(Reason.CREDENTIAL_EXPIRED)


@attacking
def test_a_token_under_another_nodes_credential(world: Lab, port: int, host: str) -> None:
    with attack_from(world, host, port) as attack:
        authority = read_authority(world)
        one, other = Signer.make(authority, "one"), Signer.make(authority, "other")
        client = attack.framed(one.token(identity([attack.wire.ip], "one")))
        frame = decode_syn(client.session.frame)
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
        for is_standalone in (False, True):
            client.send_ack(options=proof_option(os.urandom(16), is_standalone=is_standalone))
            client.send_ack(b"let me in", proof_option(bytes(16), is_standalone=is_standalone))
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
