# SPDX-License-Identifier: Apache-2.0
"""The attackers of docs/protocol.md, one by one, each with the reason that an operator reads."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from enforcer_daemon.handshake.frames import (
    MAGIC,
    SynFrame,
    decode_block,
    decode_syn,
    decode_syn_ack,
    encode_block,
    encode_syn,
    encode_syn_ack,
    find_proof,
    proof_option,
)
from enforcer_daemon.identity.authority import make_authority
from enforcer_daemon.model import PodRef
from enforcer_daemon.packet.tcp import ACK, SYN, build, with_payload
from tests.unit.datapath.guarded import AUTHORITY, clients_frame, framed_syn, guarded, refusal
from tests.unit.datapath.pair import (
    WALL,
    Connection,
    Node,
    segment,
    v4,
)


def test_a_relay_of_anothers_syn_from_its_own_address() -> None:
    client, server, attacker = guarded()
    stolen = clients_frame(client, attacker)  # The client talked to the attacker.
    assert refusal(server, framed_syn(attacker, server, stolen)) == "source-mismatch"


def test_a_relay_of_a_whole_handshake_is_refused_by_the_initiator() -> None:
    """The attacker, dialed by the client, has the server answer for it."""
    client, server, attacker = guarded()
    (syn,) = client.send(Connection(client, attacker).syn())
    to_server = Connection(client, server)
    server.receive(with_payload(segment(to_server.syn()), segment(syn).payload))
    (answer,) = server.send(to_server.syn_ack())
    relayed = with_payload(segment(Connection(client, attacker).syn_ack()), segment(answer).payload)
    assert refusal(client, relayed) == "responder-mismatch"


def test_a_responder_that_states_anothers_address() -> None:
    client, _, attacker = guarded()
    connection = Connection(client, attacker)
    (syn,) = client.send(connection.syn())
    attacker.receive(syn)
    (answer,) = attacker.send(connection.syn_ack())
    frame = decode_syn_ack(segment(answer).payload)
    lying = encode_syn_ack(frame._replace(address=v4("10.2.0.2")))
    assert refusal(client, with_payload(segment(answer), lying)) == "responder-mismatch"


@pytest.mark.parametrize("field", ["address", "port", "nonce"])
def test_behind_a_service_what_the_responder_states_is_covered_by_its_proof(field: str) -> None:
    client, server, _ = guarded()
    service = v4("10.96.0.1")
    outside = Connection(client, server)
    syn = build(client.address, service, (40_000, 80), (1_000, 0), SYN, 64_240)
    (framed,) = client.send(syn)
    server.receive(with_payload(segment(outside.syn()), segment(framed).payload))
    (answer,) = server.send(outside.syn_ack())
    back = with_payload(
        segment(build(service, client.address, (80, 40_000), (5_000, 1_001), SYN | ACK, 64_240)),
        segment(answer).payload,
    )
    frame = decode_syn_ack(segment(answer).payload)
    lies = {"port": frame._replace(port=81), "nonce": frame._replace(nonce=bytes(16))}
    if field in lies:
        lying = encode_syn_ack(lies[field])
        assert refusal(client, with_payload(segment(back), lying)) == "proof-invalid"
    (delivered,) = client.receive(back)
    assert segment(delivered).payload == b""


def test_a_reflection_of_the_pods_own_syn() -> None:
    client, _, attacker = guarded()
    own = clients_frame(client, attacker)
    assert refusal(client, framed_syn(attacker, client, own)) == "own-identity"
    # Also under the pod's own address.
    assert refusal(client, framed_syn(client, client, own)) == "own-identity"


def test_a_reflection_through_a_masquerade() -> None:
    client, _, attacker = guarded()
    own = clients_frame(client, attacker)
    client.context.node.networks.masquerade = frozenset({attacker.address})
    assert refusal(client, framed_syn(attacker, client, own)) == "own-identity"


def test_a_reflection_of_the_syn_as_its_answer() -> None:
    client, _, attacker = guarded()
    own = clients_frame(client, attacker)
    answer = with_payload(segment(Connection(client, attacker).syn_ack()), own)
    assert refusal(client, answer) == "malformed-frame"


def test_changed_labels() -> None:
    """Any changed byte of the identity is refused; the reason depends on where it lies."""
    _, server, attacker = guarded()
    frame = clients_frame(attacker, server)
    seen = set()
    for at in range(24, len(frame), 11):
        changed = frame[:at] + bytes((frame[at] ^ 1,)) + frame[at + 1 :]
        seen.add(refusal(server, framed_syn(attacker, server, changed)))
    assert {"credential-untrusted", "token-signature"} <= seen
    assert seen <= {
        "malformed-frame", "credential-invalid", "credential-untrusted", "credential-expired", "credential-mismatch",
        "token-malformed", "token-signature",
    }  # fmt: skip


def test_a_nonce_of_the_attackers_choice_gains_no_proof() -> None:
    """Frames are not signed as a whole: who changes the nonce gets a SYN in, and nothing after it."""
    client, server, _ = guarded()
    frame = decode_syn(clients_frame(client, server))
    changed = encode_syn(SynFrame(bytes(16), frame.block))
    assert len(server.receive(framed_syn(client, server, changed))) == 1
    (answer,) = server.send(Connection(client, server).syn_ack())
    assert refusal(client, answer) == "proof-invalid"


def test_an_unknown_authority() -> None:
    _, server, _ = guarded()
    strange = make_authority("cluster.local", datetime.fromtimestamp(WALL, UTC))
    attacker = Node("node-1", strange, 9).endpoint("client", "10.1.0.2", "client")
    assert refusal(server, framed_syn(attacker, server, clients_frame(attacker, server))) == "credential-untrusted"


def test_an_unknown_authority_at_the_responder() -> None:
    client, _, _ = guarded()
    strange = make_authority("cluster.local", datetime.fromtimestamp(WALL, UTC))
    attacker = Node("node-2", strange, 9).endpoint("server", "10.2.0.2", "server")
    attacker.context.node.verifier = client.context.node.verifier  # It trusts whom it likes.
    connection = Connection(client, attacker)
    attacker.receive(client.send(connection.syn())[0])
    (answer,) = attacker.send(connection.syn_ack())
    assert refusal(client, answer) == "credential-untrusted"


def test_an_expired_token() -> None:
    client, server, _ = guarded()
    frame = clients_frame(client, server)
    assert refusal(server, framed_syn(client, server, frame), now=700.0) == "token-expired"


def test_a_token_from_the_future() -> None:
    node = Node("node-1", AUTHORITY)
    client = node.endpoint("client", "10.1.0.2", "client")
    _, server, _ = guarded()
    client.context.local = node.token(client.identity, issued=WALL + 100)
    assert refusal(server, framed_syn(client, server, clients_frame(client, server))) == "token-not-yet-valid"


def test_an_outdated_token_of_our_own_is_not_shown() -> None:
    client, server, _ = guarded()
    client.context.withheld = client.context.local
    assert client.send(Connection(client, server).syn()) == []
    assert client.reasons() == ["token-expired"]
    fresh, server, _ = guarded()
    server.context.withheld = server.context.local
    assert refusal(server, framed_syn(fresh, server, clients_frame(fresh, server))) == "token-expired"


def test_a_token_under_another_nodes_credential() -> None:
    client, server, attacker = guarded()
    _, token = decode_block(decode_syn(clients_frame(client, server)).block)
    credential, _ = decode_block(decode_syn(clients_frame(attacker, server)).block)
    mixed = encode_syn(SynFrame(bytes(16), encode_block(credential, token)))
    assert refusal(server, framed_syn(client, server, mixed)) == "credential-mismatch"


def test_a_frame_of_another_version_or_type_and_one_that_is_cut() -> None:
    client, server, _ = guarded()
    frame = clients_frame(client, server)
    assert refusal(server, framed_syn(client, server, MAGIC + b"\x02" + frame[5:])) == "frame-version"
    assert refusal(server, framed_syn(client, server, MAGIC + b"\x01\x02" + frame[6:])) == "malformed-frame"
    for end in (4, 23, 24, 27, 200, len(frame) - 1):
        assert refusal(server, framed_syn(client, server, frame[:end])) == "malformed-frame"
    assert refusal(server, framed_syn(client, server, frame + b"\0")) == "malformed-frame"


def test_an_ack_without_a_proof() -> None:
    client, server, _ = guarded()
    connection = Connection(client, server)
    server.receive(client.send(connection.syn())[0])
    server.send(connection.syn_ack())
    assert refusal(server, connection.ack()) == "proof-missing"


@pytest.mark.parametrize("is_standalone", [False, True])
def test_an_ack_with_a_wrong_proof(is_standalone: bool) -> None:
    client, server, _ = guarded()
    connection = Connection(client, server)
    server.receive(client.send(connection.syn())[0])
    server.send(connection.syn_ack())
    forged = connection.ack(options=proof_option(bytes(16), is_standalone=is_standalone))
    assert refusal(server, forged) == "proof-invalid"
    assert refusal(server, connection.ack()) == "proof-missing"


def test_a_proof_of_another_connection_between_the_same_pods() -> None:
    client, server, _ = guarded()
    proofs = []
    for sport in (40_000, 40_001):
        connection = Connection(client, server, sport=sport)
        server.receive(client.send(connection.syn())[0])
        client.receive(server.send(connection.syn_ack())[0])
        proofs.append(client.send(connection.ack())[0])
    found = find_proof(segment(proofs[0]).options)
    assert found is not None
    crossed = Connection(client, server, sport=40_001).ack(options=proof_option(found.proof, is_standalone=False))
    assert refusal(server, crossed) == "proof-invalid"


def test_a_replayed_syn_on_another_connection() -> None:
    client, server, _ = guarded()
    frame = clients_frame(client, server)
    assert len(server.receive(framed_syn(client, server, frame))) == 1
    assert refusal(server, framed_syn(client, server, frame, isn=2_000)) == "replayed-nonce"
    other_port = build(client.address, server.address, (40_001, 80), (1_000, 0), SYN, 64_240)
    assert refusal(server, with_payload(segment(other_port), frame)) == "replayed-nonce"


def test_a_denied_peer_that_hides_its_identity_is_unidentified() -> None:
    _, server, attacker = guarded()
    assert refusal(server, framed_syn(attacker, server, clients_frame(attacker, server))) == "ingress-denied"
    assert refusal(server, framed_syn(attacker, server, b"")) == "unidentified-peer"
    assert refusal(server, framed_syn(attacker, server, b"GET / HTTP/1.1")) == "unidentified-peer"


def test_another_node_that_claims_the_name_of_the_pod_itself() -> None:
    client, server, _ = guarded()
    claimed = replace(client.identity, pod=PodRef("default", "server"))
    client.context.local = Node("node-1", AUTHORITY).token(claimed)
    assert refusal(server, framed_syn(client, server, clients_frame(client, server))) == "own-identity"
