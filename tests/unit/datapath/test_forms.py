# SPDX-License-Identifier: Apache-2.0
"""The handshake in its other forms: options, IPv6, budgets, Services, externals, and what is not TCP."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.sctp import SCTP

from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.fairtable import Limit
from enforcer_daemon.handshake.frames import find_proof, is_frame
from enforcer_daemon.identity.authority import make_authority
from enforcer_daemon.marks import NODE, RELEASED
from enforcer_daemon.model import Direction
from enforcer_daemon.packet.tcp import SYN, SYN_ACK, build, with_options_and_payload, with_payload
from enforcer_daemon.verdict import Action
from tests.unit.datapath.pair import (
    ACCEPTED,
    SYN_OPTIONS,
    WALL,
    Connection,
    FakePolicy,
    Node,
    Rules,
    make_pair,
    segment,
    v4,
)

AUTHORITY = make_authority("cluster.local", datetime.fromtimestamp(WALL, UTC))
COOKIES = [b"\x22\x0acookie!!\x01\x01", b"\xfe\x0c\xf9\x89cookie!!", b"\x22\x02\x01\x01"]
NOBODY = FakePolicy(Rules(frozenset()), Rules(frozenset(), direction=Direction.EGRESS))


@pytest.mark.parametrize("cookie", COOKIES)
def test_fast_open_is_taken_off_at_each_of_four_places(cookie: bytes) -> None:
    connection = Connection(*make_pair())
    client, server = connection.client, connection.server
    eager = with_options_and_payload(segment(connection.syn()), cookie, b"early data")
    (syn,) = client.send(eager)
    assert segment(syn).options == b"\x01" * len(cookie)
    assert is_frame(segment(syn).payload)
    # An enforcer that leaves it in, at the other end.
    (delivered,) = server.receive(with_options_and_payload(segment(syn), cookie, segment(syn).payload))
    assert (segment(delivered).options, segment(delivered).payload) == (b"\x01" * len(cookie), b"")
    (answer,) = server.send(with_options_and_payload(segment(connection.syn_ack()), cookie, b""))
    assert segment(answer).options == b"\x01" * len(cookie)
    (delivered,) = client.receive(with_options_and_payload(segment(answer), cookie, segment(answer).payload))
    assert (segment(delivered).options, segment(delivered).payload) == (b"\x01" * len(cookie), b"")


@pytest.mark.parametrize("options", [b"", b"\x08\x0a" + bytes(8) + b"\0\0", b"\x01\x01\x05\x12" + bytes(16)])
def test_a_proof_rides_beside_the_options_of_any_kernel(options: bytes) -> None:
    """Padding with end markers (kind 0) hides what follows it, so the proof comes first."""
    connection = Connection(*make_pair())
    connection.server.receive(connection.client.send(connection.syn())[0])
    connection.client.receive(connection.server.send(connection.syn_ack())[0])
    ack = connection.ack(options=options)
    (proven,) = connection.client.send(ack)
    assert find_proof(segment(proven).options) is not None
    assert connection.server.receive(proven) == [ack]


def test_mptcp_leaves_no_room_and_its_third_ack_follows_untouched() -> None:
    connection = Connection(*make_pair())
    connection.server.receive(connection.client.send(connection.syn())[0])
    connection.client.receive(connection.server.send(connection.syn_ack())[0])
    mptcp = b"\x01\x01\x08\x0a" + bytes(8) + b"\x1e\x14\x01\x00" + bytes(16)
    assert connection.client.send(connection.ack(options=mptcp)) == []
    proof, ack = connection.client.flush_injected()
    assert ack == connection.ack(options=mptcp)
    assert connection.server.receive(proof) == []
    assert connection.server.receive(ack) == [ack]


def test_a_burst_before_any_pure_ack_follows_the_standalone_proof_whole() -> None:
    connection = Connection(*make_pair())
    connection.server.receive(connection.client.send(connection.syn())[0])
    connection.client.receive(connection.server.send(connection.syn_ack())[0])
    burst = [connection.ack(bytes(9_000), offset=n * 9_000) for n in range(3)]
    assert [connection.client.send(packet) for packet in burst] == [[], [], []]
    proof, *rest = connection.client.flush_injected()
    assert rest == burst
    assert connection.server.receive(proof) == []
    assert [connection.server.receive(packet) for packet in burst] == [[packet] for packet in burst]


def test_ipv6_also_behind_extension_headers() -> None:
    client = Node("node-1", AUTHORITY, 1).endpoint("client", "fd00::1", "client")
    server = Node("node-2", AUTHORITY, 2).endpoint("server", "fd00::2", "server")
    connection = Connection(client, server)
    plain = connection.syn()
    headers = IPv6(src="fd00::1", dst="fd00::2") / IPv6ExtHdrDestOpt()
    extended = bytes(headers / plain[40:])
    extended = extended[:40] + b"\x06" + extended[41:]
    (syn,) = client.send(extended)
    assert server.receive(syn) == [extended]
    (answer,) = server.send(connection.syn_ack())
    assert client.receive(answer) == [connection.syn_ack()]
    (ack,) = client.send(connection.ack())
    assert server.receive(ack) == [connection.ack()]


def test_a_service_is_dialled_and_its_pod_answers() -> None:
    client, server = make_pair()
    service = v4("10.96.0.1")
    syn = build(client.address, service, (40_000, 443), (1_000, 0), SYN, 64_240, SYN_OPTIONS)
    (framed,) = client.send(syn)
    inside = Connection(client, server, dport=8_443)
    assert server.receive(with_payload(segment(inside.syn()), segment(framed).payload)) == [inside.syn()]
    (answer,) = server.send(inside.syn_ack())
    translated = build(service, client.address, (443, 40_000), (5_000, 1_001), SYN_ACK, 64_240, SYN_OPTIONS)
    assert client.receive(with_payload(segment(translated), segment(answer).payload)) == [translated]
    (report,) = client.take_reports()
    assert (report.remote, report.port, report.reason.value) == (server.address, 8_443, "not-isolated")


def test_outside_the_enforced_networks_a_syn_goes_clean_and_is_judged_by_address() -> None:
    client, _ = make_pair()
    syn = build(client.address, v4("198.51.100.1"), (1, 2), (3, 0), SYN, 64_240)
    verdict = client.verdict(syn, Direction.EGRESS)
    assert (verdict.action, verdict.payload) == (Action.RELEASE, None)
    isolated, _ = make_pair(client_policy=NOBODY)
    assert isolated.send(syn) == []
    assert isolated.reasons() == ["unidentified-peer"]


@pytest.mark.parametrize("mark", [RELEASED, NODE])
def test_answers_of_flows_that_the_kernel_released_pass(mark: int) -> None:
    client, server = make_pair()
    connection = Connection(client, server)
    assert server.verdict(connection.syn_ack(), Direction.EGRESS, mark=mark) == ACCEPTED
    client_verdict = client.verdict(connection.syn_ack(), Direction.INGRESS, mark=RELEASED)
    assert client_verdict == ACCEPTED


def test_an_identity_that_does_not_fit_the_interface_is_told() -> None:
    connection = Connection(*make_pair())
    connection.client.context.mtu = 500
    assert connection.client.send(connection.syn()) == []
    assert connection.client.reasons() == ["identity-too-large"]
    connection.client.context.mtu = 1_500
    connection.server.receive(connection.client.send(connection.syn())[0])
    connection.server.context.mtu = 500
    assert connection.server.send(connection.syn_ack()) == []
    assert connection.server.reasons()[-1] == "identity-too-large"


def test_an_answer_that_does_not_fit_the_initiators_mss_is_told_at_the_syn() -> None:
    connection = Connection(*make_pair())
    (syn,) = connection.client.send(connection.syn())
    small = with_options_and_payload(segment(syn), b"\x02\x04\x01\xf4", segment(syn).payload)
    assert connection.server.receive(small) == []
    assert connection.server.reasons() == ["identity-too-large"]
    unknown = with_options_and_payload(segment(syn), b"", segment(syn).payload)
    assert len(connection.server.receive(unknown)) == 1


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("transport", [SCTP(sport=5, dport=53), ICMP()], ids=["sctp", "icmp"])
def test_what_carries_no_identity_is_judged_by_address(direction: Direction, transport: SCTP | ICMP) -> None:
    packet = bytes(IP(src="10.1.0.2", dst="10.2.0.2") / transport)
    open_client, open_server = make_pair()
    closed_client, closed_server = make_pair(NOBODY, NOBODY)
    for is_allowed, pair in ((True, (open_client, open_server)), (False, (closed_client, closed_server))):
        endpoint = pair[0] if direction is Direction.EGRESS else pair[1]
        verdict = endpoint.verdict(packet, direction)
        assert verdict.action is (Action.RELEASE if is_allowed else Action.DROP)
        (report,) = endpoint.take_reports()
        assert report.port == (53 if isinstance(transport, SCTP) else None)
        assert report.reason.value == ("not-isolated" if is_allowed else "protocol-not-authenticated")


@pytest.mark.parametrize("transport", [SCTP(sport=5, dport=53), UDP(sport=5, dport=53)], ids=["sctp", "udp"])
@pytest.mark.parametrize("target", ["224.0.0.1", "10.2.0.255"])
def test_what_a_bridge_reflects_to_its_sender_releases_nothing(transport: SCTP | UDP, target: str) -> None:
    """It would release the flow from the pod to the group, and what the pod sends there next would meet no policy."""
    _, server = make_pair()
    assert server.verdict(bytes(IP(src="10.2.0.2", dst=target) / transport), Direction.INGRESS).action is Action.DROP
    assert server.reasons() == ["spoofed-source"]
    # What the pod sends to itself through a Service is none. What another sends to the group comes in packet by packet.
    for source, to, action in (("10.2.0.2", "10.2.0.2", Action.RELEASE), ("10.2.0.9", target, Action.ACCEPT)):
        assert server.verdict(bytes(IP(src=source, dst=to) / transport), Direction.INGRESS).action is action


def test_the_nodes_own_datagram_is_let_in_and_one_that_it_masquerades_is_judged() -> None:
    _, server = make_pair(server_policy=NOBODY)
    node = server.context.node
    gateway, outside = v4("10.2.0.1"), v4("198.51.100.9")
    node.addresses = frozenset({gateway})
    packet = bytes(IP(src="10.2.0.1", dst="10.2.0.2") / UDP(sport=5, dport=53))
    for true_source, reason in (
        (gateway, "node"),
        (outside, "unidentified-peer"),
        (None, "unidentified-peer"),
    ):
        node.true_source = lambda *_, found=true_source: found
        verdict = server.verdict(packet, Direction.INGRESS)
        assert (verdict.action is Action.RELEASE) == (reason == "node")
        assert server.reasons() == [reason]


def test_other_rules_count_at_once() -> None:
    client, server = make_pair()
    connection = Connection(client, server)
    assert len(server.receive(client.send(connection.syn())[0])) == 1
    for endpoint in (client, server):
        endpoint.context.policy.replace_rules(NOBODY)
    other = Connection(client, server, sport=40_001)
    assert client.send(other.syn()) == []
    assert client.reasons()[-1] == "egress-denied"


def test_memory_of_nonces_and_reports_is_bounded() -> None:
    client, server = make_pair(max_nonces=100, max_reports=20)
    node = server.context.node
    for n in range(110):
        node.use_nonce(n.to_bytes(16, "big"), 1, b"pod")
    assert len(node._nonces) == 100
    assert node.limit_hits[Limit.NONCES] == 10
    with pytest.raises(PeerError):
        node.use_nonce((100).to_bytes(16, "big"), 2, b"pod")
    for port in range(30):
        server.receive(client.send(Connection(client, server, port).syn())[0])
    server.reasons()
    server.expire(1_000.0)  # All at once.
    assert server.reasons() == ["handshake-timeout"] * 20
    assert node.limit_hits[Limit.REPORTS] == 10
