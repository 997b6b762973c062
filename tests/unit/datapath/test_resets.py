# SPDX-License-Identifier: Apache-2.0
"""RSTs in a handshake: a refusal and an end pass, blind ones and the data in them do not."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from enforcer_daemon.packet.tcp import ACK, RST, SYN, SYN_ACK, build, with_payload
from tests.unit.datapath.pair import SYN_OPTIONS, TIMESTAMPS, Connection, connect, make_pair, segment

CROWDED = TIMESTAMPS * 2
"""Options that leave no room for a proof."""


def test_a_refusal_that_was_lost_is_given_again() -> None:
    """The server's kernel refuses the port; its RST is lost, and the client's kernel sends the same SYN once more."""
    connection = Connection(*make_pair())
    (syn,) = connection.client.send(connection.syn())
    connection.server.receive(syn)
    ports = connection.dport, connection.sport
    refusal = build(connection.server.address, connection.client.address, ports, (0, 1001), RST | ACK, 0)
    assert connection.server.send(refusal) == [refusal]
    assert connection.server.datapath.half_open_flows == 0
    assert connection.server.receive(syn, now=2.0) == [connection.syn()]
    assert connection.server.send(refusal) == [refusal]
    assert connection.client.receive(refusal) == [refusal]
    assert connection.client.datapath.half_open_flows == 0


@pytest.mark.parametrize("flags", [RST, RST | ACK])
def test_a_rst_of_the_client_ends_the_servers_flow_if_it_is_in_sequence(flags: int) -> None:
    connection = Connection(*make_pair())
    connect(connection)
    connection.server.receive(connection.ack(b"data"))
    ports = connection.sport, connection.dport
    blind = build(connection.client.address, connection.server.address, ports, (77, 0), flags, 0)
    assert connection.server.receive(blind) == []
    right = build(connection.client.address, connection.server.address, ports, (1001, 0), flags, 0)
    (delivered,) = connection.server.receive(right)
    assert delivered == right
    assert connection.server.held == {}
    assert connection.server.datapath.half_open_flows == 0


def test_a_rst_of_the_client_leaves_and_ends_its_own_flow() -> None:
    connection = Connection(*make_pair())
    connect(connection)
    connection.client.send(connection.ack(b"data", CROWDED))
    ports = connection.sport, connection.dport
    reset = build(connection.client.address, connection.server.address, ports, (1001, 0), RST, 0)
    assert connection.client.send(reset) == [reset]
    assert connection.client.held == {}
    assert connection.client.datapath.half_open_flows == 0


def test_a_rst_carries_no_data_before_the_proof() -> None:
    connection = Connection(*make_pair())
    connection.client.send(connection.syn())
    ports = connection.sport, connection.dport
    bare = build(connection.client.address, connection.server.address, ports, (1001, 0), RST, 0)
    loaded = _with_payload(bare, b"secret")
    assert connection.client.send(loaded) == [bare]
    (syn,) = connection.client.send(connection.syn())
    connection.server.receive(syn)
    assert connection.server.receive(loaded) == [bare]
    connection.server.receive(connection.client.send(connection.syn())[0])
    back = connection.dport, connection.sport
    refusal = build(connection.server.address, connection.client.address, back, (0, 1001), RST | ACK, 0)
    assert connection.server.send(_with_payload(refusal, b"secret")) == [refusal]
    assert connection.client.receive(_with_payload(refusal, b"secret")) == [refusal]


def _with_payload(packet: bytes, payload: bytes) -> bytes:
    return with_payload(segment(packet), payload)


def test_a_blind_refusal_does_not_end_the_clients_attempt() -> None:
    connection = Connection(*make_pair())
    connection.client.send(connection.syn())
    back = connection.dport, connection.sport
    blind = build(connection.server.address, connection.client.address, back, (0, 77), RST | ACK, 0)
    assert connection.client.receive(blind) == []
    assert connection.client.datapath.half_open_flows == 1


@pytest.mark.parametrize(("address", "remote"), [("10.1.0.2", "10.2.0.9"), ("fd00::2", "fd00:2::9")])
def test_a_refusal_that_acknowledges_the_frame_too_reaches_the_kernel_as_one_of_its_own_syn(
    address: str, remote: str
) -> None:
    """The refusing kernel has no enforcer: to it the frame was data of the SYN."""
    client, far = make_pair()[0].node.endpoint("other", address, "client"), ip_address(remote).packed
    syn = segment(build(client.address, far, (40_000, 81), (0xFFFF_FFFF, 0), SYN, 64_240, SYN_OPTIONS))
    (framed,) = client.send(syn.packet)
    for acknowledged, delivered in ((segment(framed).payload, True), (b"x", False)):
        ack = len(acknowledged)  # ISN + 1 + the frame's length, where ISN + 1 is 0
        received = client.receive(build(far, client.address, (81, 40_000), (0, ack), RST | ACK, 0))
        expected = build(far, client.address, (81, 40_000), (0, 0), RST | ACK, 0)
        assert received == ([expected] if delivered else [])
        assert client.datapath.half_open_flows == 0


def test_after_an_answer_that_takes_the_frame_for_data_the_syn_leaves_without_it() -> None:
    """Fast Open without a cookie: the connection that got the frame is reset, and the next one is the pod's own."""
    connection = Connection(*make_pair())
    client, remote = connection.client, connection.server.address
    (framed,) = client.send(connection.syn())
    back, end = (connection.dport, connection.sport), 1001 + len(segment(framed).payload)
    assert client.receive(build(remote, client.address, back, (5000, end), SYN_ACK, 65_160, SYN_OPTIONS)) == []
    (reset,) = client.flush_injected()
    assert (segment(reset).flags, segment(reset).seq) == (RST, end)
    (bare,) = client.send(connection.syn(), now=2.0)
    assert (segment(bare).payload, segment(bare).seq) == (b"", 1000)
    answer = build(remote, client.address, back, (6000, 1001), SYN_ACK, 65_160, SYN_OPTIONS)
    assert client.receive(answer, now=2.0) == [answer]
    assert client.datapath.half_open_flows == 0


def test_a_challenge_ack_of_the_last_connection_reaches_the_kernel() -> None:
    """TIME_WAIT at the server: its ACK makes the client's kernel send a RST and its SYN again (RFC 5961)."""
    connection = Connection(*make_pair())
    connection.client.send(connection.syn())
    back = connection.dport, connection.sport
    challenge = build(connection.server.address, connection.client.address, back, (900, 800), ACK, 502)
    assert connection.client.receive(challenge) == [challenge]
    ports = connection.sport, connection.dport
    reset = build(connection.client.address, connection.server.address, ports, (800, 0), RST, 0)
    assert connection.client.send(reset) == [reset]
    (syn,) = connection.client.send(connection.syn(), now=2.0)
    assert connection.server.receive(syn, now=2.0) == [connection.syn()]


def test_a_rst_that_ends_the_last_connection_of_these_ports_reaches_the_servers_kernel() -> None:
    """The server's kernel still has that one, and answers a SYN by a challenge ACK; only the RST makes it give way."""
    connection = Connection(*make_pair())
    client, server = connection.client, connection.server
    (syn,) = client.send(connection.syn())
    assert len(server.receive(syn)) == 1
    ports = 40_000, 80
    challenge = build(server.address, client.address, ports[::-1], (900, 800), ACK, 502)
    (delivered,) = server.send(challenge)
    assert client.receive(delivered) == [challenge]
    reset = build(client.address, server.address, ports, (800, 0), RST, 0)
    (answer,) = client.send(reset)
    assert server.receive(answer) == [reset]
    assert server.reasons() == ["not-isolated"]
    (again,) = client.send(connection.syn(), now=2.0)
    assert server.receive(again, now=2.0) == [connection.syn()]
    (syn_ack,) = server.send(connection.syn_ack(), now=2.0)
    assert client.receive(syn_ack, now=2.0) == [connection.syn_ack()]
