# SPDX-License-Identifier: Apache-2.0
"""The attackers of docs/protocol.md, one by one, each with the reason that an operator reads."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from enforcer_daemon.handshake.bounds import Bound
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
from enforcer_daemon.model import Direction, PodRef
from enforcer_daemon.packet.tcp import ACK, FIN, SYN, build, with_options_and_payload, with_payload
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings import DenyWith
from enforcer_daemon.verdict import Action, Inject
from tests.unit.datapath.pair import (
    TIMESTAMPS,
    WALL,
    Connection,
    Endpoint,
    FakePolicy,
    Node,
    Rules,
    make_pair,
    segment,
    v4,
)

AUTHORITY = make_authority("cluster.local", datetime.fromtimestamp(WALL, UTC))
CLIENTS_ONLY = FakePolicy(ingress=Rules(frozenset({"client"})))


def guarded() -> tuple[Endpoint, Endpoint, Endpoint]:
    """Make a client, a server that admits clients alone, and an attacker on a node of its own."""
    client = Node("node-1", AUTHORITY, 1).endpoint("client", "10.1.0.2", "client")
    server = Node("node-2", AUTHORITY, 2).endpoint("server", "10.2.0.2", "server", CLIENTS_ONLY)
    attacker = Node("node-3", AUTHORITY, 3).endpoint("attacker", "10.3.0.2", "attacker")
    return client, server, attacker


def framed_syn(source: Endpoint, server: Endpoint, frame: bytes, isn: int = 1_000) -> bytes:
    """Make a SYN from the source's address with any payload."""
    bare = build(source.address, server.address, (40_000, 80), (isn, 0), SYN, 64_240)
    return with_payload(segment(bare), frame)


def refusal(server: Endpoint, packet: bytes, now: float = 1.0) -> str:
    """Answer why the server's enforcer dropped a packet."""
    server.reasons()
    assert server.receive(packet, now) == []
    (reason,) = server.reasons()
    return reason


def clients_frame(client: Endpoint, server: Endpoint) -> bytes:
    (syn,) = client.send(Connection(client, server).syn())
    return segment(syn).payload


def test_a_relay_of_anothers_syn_from_its_own_address() -> None:
    client, server, attacker = guarded()
    stolen = clients_frame(client, attacker)  # The client talked to the attacker.
    assert refusal(server, framed_syn(attacker, server, stolen)) == "source-mismatch"


def test_a_relay_of_a_whole_handshake_is_refused_by_the_initiator() -> None:
    """The attacker, dialled by the client, has the server answer for it."""
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
    changed = {"address": frame.address, "port": 81, "nonce": bytes(16)}
    if field != "address":
        lying = encode_syn_ack(frame._replace(**{field: changed[field]}))
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
    client.context.local.expires_at = 0.0
    assert client.send(Connection(client, server).syn()) == []
    assert client.reasons() == ["token-expired"]
    fresh, server, _ = guarded()
    server.context.local.expires_at = 0.0
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


@pytest.mark.parametrize("is_lone", [False, True])
def test_an_ack_with_a_wrong_proof(is_lone: bool) -> None:
    client, server, _ = guarded()
    connection = Connection(client, server)
    server.receive(client.send(connection.syn())[0])
    server.send(connection.syn_ack())
    forged = connection.ack(options=proof_option(bytes(16), is_lone=is_lone))
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
    crossed = Connection(client, server, sport=40_001).ack(options=proof_option(found.proof, is_lone=False))
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


def test_a_strangers_plain_syn_does_not_end_a_handshake() -> None:
    client, server, _ = guarded()
    connection = Connection(client, server)
    server.receive(client.send(connection.syn())[0])
    client.receive(server.send(connection.syn_ack())[0])
    assert refusal(server, framed_syn(client, server, b"")) == "unidentified-peer"
    assert server.receive(client.send(connection.ack())[0]) == [connection.ack()]


def test_an_allowed_plain_syn_takes_the_place_of_a_handshake() -> None:
    connection = Connection(*make_pair())
    connection.server.receive(connection.client.send(connection.syn())[0])
    verdict = connection.server.verdict(connection.syn(), Direction.INGRESS)
    assert (verdict.action, verdict.payload) == (Action.RELEASE, None)
    assert connection.server.datapath.half_open_flows == 0


def test_a_flood_of_new_tokens_is_charged_to_its_source() -> None:
    client, server = make_pair(max_verifications_per_s=2.0)
    for n in range(5):  # The first makes its credential known, which ranks the others higher.
        block = encode_block(server.node.credential.der, b"%d" % n)
        server.receive(framed_syn(client, server, encode_syn(SynFrame(bytes(16), block))))
    assert server.reasons() == ["token-malformed"] * 3 + ["verify-rate"] * 2
    assert server.context.node.bound_hits[Bound.VERIFICATIONS_PER_SOURCE] == 2


@pytest.mark.parametrize(
    ("bounds", "bound"),
    [
        ({"max_half_open_flows": 2}, Bound.HALF_OPEN_FLOWS),
        ({"max_half_open_flows_per_source": 2}, Bound.HALF_OPEN_FLOWS_PER_SOURCE),
    ],
)
def test_the_tables_of_handshakes_are_bounded_and_the_oldest_one_is_given_up(
    bounds: dict[str, int], bound: Bound
) -> None:
    client, server = make_pair(**bounds)
    connections = [Connection(client, server, sport=sport) for sport in (1, 2, 3)]
    for connection in connections:
        for syn in client.send(connection.syn()):
            server.receive(syn)
        server.send(connection.syn_ack())
    reports = client.datapath.take_reports() + server.datapath.take_reports()
    given_up = [(report.direction, report.port) for report in reports if report.reason is Reason.FLOW_TABLE_FULL]
    assert given_up == [(Direction.EGRESS, 80), (Direction.INGRESS, 80)]
    assert [endpoint.datapath.half_open_flows for endpoint in (client, server)] == [2, 2]
    assert [endpoint.context.node.bound_hits[bound] for endpoint in (client, server)] == [1, 1]


def test_who_floods_with_handshakes_gives_up_his_own() -> None:
    honest_connections = 3
    node = Node("node-2", AUTHORITY, 2, max_half_open_flows=16)
    server = node.endpoint("server", "10.2.0.2", "server")
    honest = Node("node-1", AUTHORITY, 1).endpoint("client", "10.1.0.2", "client")
    flooder = Node("node-3", AUTHORITY, 3).endpoint("flooder", "10.3.0.2", "client")
    waiting = [Connection(honest, server, sport=sport) for sport in range(honest_connections)]
    flood = (Connection(flooder, server, sport=sport) for sport in range(1_000, 1_100))
    for connection in (*waiting, *flood):
        (syn,) = connection.client.send(connection.syn())
        assert len(server.receive(syn)) == 1  # Nobody is refused.
    assert server.datapath.half_open_flows == 16
    assert server.context.node.bound_hits[Bound.HALF_OPEN_FLOWS] == honest_connections + 100 - 16
    for connection in waiting:
        (answer,) = server.send(connection.syn_ack())
        assert len(honest.receive(answer)) == 1
        (proof,) = honest.send(connection.ack())
        assert len(server.receive(proof)) == 1


def test_a_pods_own_connection_comes_home_through_a_service() -> None:
    """The hairpin arrives from the node's address; conntrack says whose it is."""
    node = Node("node-1", AUTHORITY)
    pod = node.endpoint("pod", "10.1.0.2", "pod")
    gateway = v4("10.1.0.1")
    node.context.addresses = frozenset({gateway})
    node.true_sources[gateway] = pod.address
    syn = build(pod.address, v4("10.96.0.1"), (40_000, 80), (1_000, 0), SYN, 64_240)
    (framed,) = pod.send(syn)
    at_home = build(gateway, pod.address, (40_000, 8_080), (1_000, 0), SYN, 64_240)
    assert pod.receive(with_payload(segment(at_home), segment(framed).payload)) == [at_home]
    back = build(pod.address, gateway, (8_080, 40_000), (5_000, 1_001), SYN | ACK, 64_240)
    (answer,) = pod.send(back)
    translated = build(v4("10.96.0.1"), pod.address, (80, 40_000), (5_000, 1_001), SYN | ACK, 64_240)
    assert pod.receive(with_payload(segment(translated), segment(answer).payload)) == [translated]
    ack = build(pod.address, v4("10.96.0.1"), (40_000, 80), (1_001, 5_001), ACK, 502)
    (proven,) = pod.send(ack)
    home = build(gateway, pod.address, (40_000, 8_080), (1_001, 5_001), ACK, 502, segment(proven).options)
    (delivered,) = pod.receive(home)
    assert segment(delivered).options == b""
    assert pod.reasons().count("self") == 2


def test_a_masqueraded_peer_is_judged_under_its_tokens_address_where_the_operator_says_so() -> None:
    client, server, _ = guarded()
    frame = clients_frame(client, server)
    masquerade = build(v4("192.0.2.7"), server.address, (40_000, 80), (1_000, 0), SYN, 64_240)
    packet = with_payload(segment(masquerade), frame)
    assert refusal(server, packet) == "source-mismatch"
    server.context.node.networks.masquerade = frozenset({v4("192.0.2.7")})
    assert server.receive(packet) == [masquerade]


def test_a_source_that_conntrack_knows_is_not_excused_by_a_masquerade() -> None:
    """The attacker dials through a node port, so that the client's stolen frame comes from the node's address."""
    client, _, attacker = guarded()
    node = Node("node-2", AUTHORITY)
    server = node.endpoint("server", "10.2.0.2", "server")
    gateway = v4("10.2.0.1")
    node.context.addresses = frozenset({gateway})
    node.true_sources[gateway] = attacker.address
    node.context.networks.masquerade = frozenset({gateway})
    packet = build(gateway, server.address, (40_000, 80), (1_000, 0), SYN, 64_240)
    assert refusal(server, with_payload(segment(packet), clients_frame(client, attacker))) == "source-mismatch"


def test_a_plain_syn_through_a_node_port_is_judged_by_its_true_source() -> None:
    node = Node("node-2", AUTHORITY)
    server = node.endpoint("server", "10.2.0.2", "server", CLIENTS_ONLY)
    gateway, outside = v4("10.2.0.1"), v4("198.51.100.9")
    node.context.addresses = frozenset({gateway})
    packet = build(gateway, server.address, (40_000, 80), (1_000, 0), SYN, 64_240)
    node.true_sources[gateway] = outside
    server.receive(packet)
    (report,) = server.datapath.take_reports()
    assert (report.reason.value, report.remote) == ("unidentified-peer", outside)
    node.true_sources[gateway] = gateway  # The node's own: a probe.
    assert server.receive(packet) == [packet]
    assert server.reasons() == ["node"]
    del node.true_sources[gateway]  # Unknown to conntrack: an ordinary address.
    assert refusal(server, packet) == "unidentified-peer"


@pytest.mark.parametrize("direction", list(Direction))
def test_unknown_data_is_ended_at_both_sides(direction: Direction) -> None:
    client, server = make_pair()
    data = Connection(client, server).ack(b"data")
    endpoint = client if direction is Direction.EGRESS else server
    verdict = endpoint.verdict(data, direction)
    onward = segment(verdict.payload or b"")
    assert (onward.payload, onward.seq, onward.flags, onward.sport) == (b"", 1_001, 0x14, 40_000)
    (effect,) = verdict.effects
    assert isinstance(effect, Inject)
    back = segment(effect.packet)
    assert (back.src, back.dst, back.seq, back.flags) == (server.address, client.address, 5_001, 0x04)
    assert endpoint.reasons() == ["unknown-flow"]


def test_our_own_reset_passes_the_queue_once_and_carries_nothing() -> None:
    client, server = make_pair()
    server.receive(Connection(client, server).ack(b"data"))
    (reset,) = server.injected
    loaded = with_payload(segment(reset), b"secret")
    assert server.send(loaded) == []
    assert server.flush_injected() == [reset]
    assert server.send(reset) == []


def test_unknown_data_is_no_way_out_for_a_pod_that_may_reach_nobody() -> None:
    nobody = FakePolicy(egress=Rules(frozenset(), direction=Direction.EGRESS))
    client, server = make_pair(client_policy=nobody)
    for destination in (server.address, v4("198.51.100.9")):
        bare = build(client.address, destination, (40_000, 80), (1_001, 5_001), ACK, 502)
        verdict = client.verdict(with_payload(segment(bare), b"secret"), Direction.EGRESS)
        assert verdict.action is Action.DROP
        assert len(verdict.effects) == 1  # The pod's own kernel is told.


@pytest.mark.parametrize("flags", [FIN | ACK, ACK, 0x04])
@pytest.mark.parametrize("direction", list(Direction))
def test_stray_segments_without_data_are_dropped(flags: int, direction: Direction) -> None:
    client, server = make_pair()
    packet = build(client.address, server.address, (40_000, 80), (1_001, 5_001), flags, 502)
    endpoint = client if direction is Direction.EGRESS else server
    assert endpoint.verdict(packet, direction).action is Action.DROP
    assert endpoint.reasons() == ["unknown-flow"]


@pytest.mark.parametrize("flags", [SYN | FIN, SYN | 0x04, SYN | ACK | FIN])
def test_impossible_flags_are_malformed(flags: int) -> None:
    client, server = make_pair()
    assert refusal(server, build(client.address, server.address, (1, 2), (1, 2), flags, 0)) == "malformed-packet"


def test_denials_are_told_by_reset_where_so_configured() -> None:
    client, server, attacker = guarded()
    for endpoint in (client, server, attacker):
        endpoint.context.node.deny_with = DenyWith.RESET
    frame = clients_frame(attacker, server)
    server.receive(framed_syn(attacker, server, frame))
    (refused,) = server.flush_injected()
    found = segment(refused)
    assert (found.dst, found.dport, found.seq, found.ack, found.flags) == (attacker.address, 40_000, 0, 1_001, 0x14)
    assert attacker.receive(refused) == [refused]


def test_an_egress_denial_at_the_syn_resets_the_pod_where_so_configured() -> None:
    nobody = FakePolicy(egress=Rules(frozenset(), direction=Direction.EGRESS))
    client, server = make_pair(client_policy=nobody)
    connection = Connection(client, server)
    assert client.send(connection.syn()) == []
    assert client.reasons() == ["egress-denied"]
    assert client.injected == []
    client.context.node.deny_with = DenyWith.RESET
    assert client.send(connection.syn()) == []
    found = segment(client.injected[0])
    assert (found.src, found.dst, found.seq, found.ack) == (server.address, client.address, 0, 1_001)


def test_an_egress_denial_at_the_syn_ack_resets_the_pod_where_so_configured() -> None:
    others = FakePolicy(egress=Rules(frozenset({"other"}), direction=Direction.EGRESS))
    connection = Connection(*make_pair(client_policy=others))
    connection.client.context.node.deny_with = DenyWith.RESET
    connection.server.receive(connection.client.send(connection.syn())[0])
    (refused,) = connection.client.receive(connection.server.send(connection.syn_ack())[0])
    found = segment(refused)
    assert (found.src, found.seq, found.ack, found.flags) == (connection.server.address, 0, 1_001, 0x14)
    (reset,) = connection.client.flush_injected()
    assert segment(reset).seq == 1_001
    assert connection.server.receive(reset) == [reset]


def test_another_node_that_claims_the_name_of_the_pod_itself() -> None:
    client, server, _ = guarded()
    claimed = replace(client.identity, pod=PodRef("default", "server"))
    client.context.local = Node("node-1", AUTHORITY).token(claimed)
    assert refusal(server, framed_syn(client, server, clients_frame(client, server))) == "own-identity"


def test_a_syn_ack_that_nobody_asked_for() -> None:
    client, server, _ = guarded()
    connection = Connection(client, server)
    assert refusal(client, connection.syn_ack()) == "unknown-flow"
    client.send(connection.syn())
    assert refusal(client, Connection(client, server, isn_i=77).syn_ack()) == "unknown-flow"
    assert server.send(connection.syn_ack()) == []
    assert server.reasons() == ["unknown-flow"]


def test_a_syn_ack_of_the_pod_for_another_syn() -> None:
    client, server, _ = guarded()
    server.receive(client.send(Connection(client, server).syn())[0])
    server.reasons()
    assert server.send(Connection(client, server, isn_i=77).syn_ack()) == []
    assert server.reasons() == ["unknown-flow"]


def test_a_plain_syn_ack_is_judged_by_its_address() -> None:
    connection = Connection(*make_pair())
    connection.client.send(connection.syn())
    verdict = connection.client.verdict(connection.syn_ack(), Direction.INGRESS)
    assert verdict.action is Action.RELEASE
    only_servers = FakePolicy(egress=Rules(frozenset({"server"}), direction=Direction.EGRESS))
    denied = Connection(*make_pair(client_policy=only_servers))
    denied.client.send(denied.syn())
    assert denied.client.receive(denied.syn_ack()) == []
    assert denied.client.reasons() == ["unidentified-peer"]


def test_a_plain_syn_ack_after_one_with_identity_is_refused() -> None:
    connection = Connection(*make_pair())
    connection.server.receive(connection.client.send(connection.syn())[0])
    connection.client.receive(connection.server.send(connection.syn_ack())[0])
    assert refusal_last(connection.client, connection.syn_ack()) == "unknown-flow"


def refusal_last(endpoint: Endpoint, packet: bytes) -> str:
    assert endpoint.receive(packet) == []
    return endpoint.reasons()[-1]


def test_data_before_any_answer_stays_in() -> None:
    connection = Connection(*make_pair())
    connection.client.send(connection.syn())
    assert connection.client.send(connection.ack(b"data")) == []
    assert connection.client.reasons() == ["unknown-flow"]


def test_data_of_the_server_before_the_proof_stays_in_and_is_not_let_in() -> None:
    connection = Connection(*make_pair())
    client, server = connection.client, connection.server
    server.receive(client.send(connection.syn())[0])
    client.receive(server.send(connection.syn_ack())[0])
    back = build(server.address, client.address, (80, 40_000), (5_001, 1_001), ACK, 502, TIMESTAMPS)
    assert server.send(back) == [back]
    data = with_options_and_payload(segment(back), TIMESTAMPS, b"banner")
    assert server.send(data) == []
    assert client.receive(data) == []
    assert "unknown-flow" in client.reasons()
