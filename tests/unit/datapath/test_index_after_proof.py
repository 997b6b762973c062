# SPDX-License-Identifier: Apache-2.0
"""A flow has an entry in the index only once it is proven; until then it carries what it was evaluated by."""

from __future__ import annotations

from dataclasses import replace

import pytest

from enforcer_daemon.datapath.flowindex import FIRST
from enforcer_daemon.marks import INDEX_MASK, INDEX_SHIFT
from enforcer_daemon.model import Direction, EvaluatedFlow
from enforcer_daemon.packet.udp import build_udp
from tests.unit.datapath.pair import Connection, Endpoint, FakePolicy, Rules, make_pair

ADMITTING = FakePolicy(ingress=Rules(frozenset({"client"})))
PORTS = 40_000, 53


def entries(endpoint: Endpoint) -> list[EvaluatedFlow]:
    return [flow for _, flow in endpoint.index]


def test_an_offer_makes_no_entry_and_its_proof_makes_one() -> None:
    client, server = make_pair(None, ADMITTING)
    (framed,) = client.send(build_udp(client.address, server.address, PORTS, b"query"))
    server.receive(framed)
    assert entries(server) == []
    (unfinished,) = server.datapath.evaluated_by()
    assert isinstance(unfinished, EvaluatedFlow)
    assert (unfinished.direction, unfinished.peer.pod, unfinished.port) == (
        Direction.INGRESS, client.identity.pod, 53,
    )  # fmt: skip
    client.receive(server.flush_injected()[0])
    assert len(entries(client)) == 1
    for proof in client.flush_injected():
        server.receive(proof)
    assert entries(server) == [unfinished]
    assert server.datapath.evaluated_by() == {FIRST}


def test_a_syn_makes_no_entry_and_its_proof_makes_one() -> None:
    client, server = make_pair(None, ADMITTING)
    connection = Connection(client, server)
    server.receive(client.send(connection.syn())[0])
    answer = server.send(connection.syn_ack())[0]
    assert entries(server) == []
    client.receive(answer)
    assert entries(client) == []
    (proof,) = client.send(connection.ack())
    assert len(entries(client)) == 1
    verdict = server.verdict(proof, Direction.INGRESS)
    assert (verdict.mark & INDEX_MASK) >> INDEX_SHIFT == FIRST
    assert len(entries(server)) == 1


@pytest.mark.parametrize("is_denied", [False, True])
def test_a_handshake_under_way_follows_its_peers_identity_or_is_given_up(is_denied: bool) -> None:
    client, server = make_pair(None, ADMITTING)
    (framed,) = client.send(build_udp(client.address, server.address, PORTS, b"query"))
    server.receive(framed)
    relabelled = replace(client.identity, labels={"app": "other"})
    server.end_denied(lambda evaluated: is_denied and isinstance(evaluated, EvaluatedFlow))
    server.datapath.replace_peers(lambda evaluated: replace(evaluated, peer=relabelled))
    client.receive(server.flush_injected()[0])
    for proof in client.flush_injected():
        server.receive(proof)
    assert [flow.peer for flow in entries(server)] == ([] if is_denied else [relabelled])
