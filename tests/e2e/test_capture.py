# SPDX-License-Identifier: Apache-2.0
"""What is on the wire between two nodes: a frame in SYN and SYN-ACK, a proof in the ACK, and then nothing of ours."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from enforcer_daemon.handshake.frames import decode_block, decode_syn, decode_syn_ack, find_proof, is_frame
from enforcer_daemon.identity.credential import decode_credential
from enforcer_daemon.packet.tcp import ACK, PSH, SYN, SYN_ACK, Segment
from tests.e2e.operation_world import (
    NODES,
    connection,
    pod,
    queue_rule_hits,
    queued_packets,
    read_all,
    segments,
    transfer,
)
from trireme_lab import Lab, LabSpec, Tools

pytestmark = pytest.mark.kernel

PODS = ("x/client", "x/server")
MAX_LEASE_MESSAGES = 8
"""Of both directions, while a transfer of some thousand segments lasts."""


def queued_segments(lab: Lab, name: str) -> int:
    """Return how many packets but messages met a rule that queues."""
    return sum(hits for rule, hits in queue_rule_hits(lab, name).items() if "MESSAGE" not in rule)


def settled_segments(lab: Lab) -> int:
    """Return the sum for all pods once it has stood for half a second."""
    count, since = -1, time.monotonic()
    while time.monotonic() - since < 0.5:
        if (now := sum(queued_segments(lab, name) for name in PODS)) != count:
            count, since = now, time.monotonic()
        time.sleep(0.05)
    return count


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    with Lab(LabSpec(NODES, pods=(pod("client", "a"), pod("server", "b"))), Tools(plugin=plugin)) as lab:
        yield lab


def _captured(lab: Lab, version: int, payload: bytes) -> list[Segment]:
    with lab.capture("node:a") as capture:
        with connection(lab, "x/client", "x/server", version) as (client, server):
            port = server.getsockname()[1]
            client.sendall(payload)
            assert read_all(server, len(payload)) == payload
            time.sleep(0.05)  # so that the acknowledgement of the data is not merged with the end
        return segments(capture.close(), port)


@pytest.mark.parametrize("version", [4, 6])
def test_identities_ride_on_the_three_packets_of_the_handshake(lab: Lab, version: int) -> None:
    payload = os.urandom(1000)
    syn, syn_ack, ack, data, *rest = _captured(lab, version, payload)
    assert [s.flags for s in (syn, syn_ack, ack, data)] == [SYN, SYN_ACK, ACK, ACK | PSH]
    asked, answered = decode_syn(syn.payload), decode_syn_ack(syn_ack.payload)
    assert decode_credential(decode_block(asked.block)[0]).node == "a"
    assert decode_credential(decode_block(answered.block)[0]).node == "b"
    assert (answered.address, answered.port) == (syn.dst, syn.dport)
    proof = find_proof(ack.options)
    assert proof is not None
    assert not proof.is_standalone
    assert ack.payload == b""
    assert data.payload == payload
    assert [find_proof(s.options) for s in (data, *rest)] == [None] * (1 + len(rest))


@pytest.mark.parametrize("version", [4, 6])
def test_numbers_are_those_of_the_kernels(lab: Lab, version: int) -> None:
    syn, syn_ack, ack, data, *_ = _captured(lab, version, b"hello")
    assert (syn_ack.ack, ack.seq, data.seq) == ((syn.seq + 1) & 0xFFFF_FFFF,) * 3
    assert (ack.ack, data.ack) == ((syn_ack.seq + 1) & 0xFFFF_FFFF,) * 2


def test_nothing_of_ours_reaches_the_application_or_its_kernel(lab: Lab) -> None:
    with connection(lab, "x/client", "x/server") as (client, server):
        client.sendall(b"question")
        server.sendall(b"answer")
        assert (client.recv(100), server.recv(100)) == (b"answer", b"question")
        for name in PODS:
            statistics = lab.run(name, "nstat", "-asz", "TcpInErrs")
            assert " 0 " in next(line for line in statistics.splitlines() if line.startswith("TcpInErrs"))


@pytest.mark.parametrize("version", [4, 6])
def test_a_repeated_connection_shows_other_nonces_and_other_proofs(lab: Lab, version: int) -> None:
    first, second = (_captured(lab, version, b"hello") for _ in range(2))
    assert decode_syn(first[0].payload).nonce != decode_syn(second[0].payload).nonce
    assert decode_syn_ack(first[1].payload).nonce != decode_syn_ack(second[1].payload).nonce
    assert find_proof(first[2].options) != find_proof(second[2].options)


@pytest.mark.parametrize("version", [4, 6])
def test_a_released_flow_is_not_queued_any_more(lab: Lab, version: int) -> None:
    """Nothing of it is; the lease of the pair sends a few messages of its own, however much the flow carries."""
    with connection(lab, "x/client", "x/server", version) as (client, server):
        transfer(client, server, 1)
        queued = {name: queued_packets(lab, name) for name in PODS}
        hits = {name: queue_rule_hits(lab, name) for name in PODS}
        transfer(client, server, 100)
        transfer(server, client, 1)
        for name in PODS:
            assert queued_packets(lab, name) - queued[name] <= MAX_LEASE_MESSAGES
            assert sum(queue_rule_hits(lab, name).values()) - sum(hits[name].values()) <= MAX_LEASE_MESSAGES


def test_a_connection_takes_six_queued_packets(lab: Lab) -> None:
    """Of a pair that has met before: at its first connection it makes a lease too, by datagrams."""
    with connection(lab, "x/client", "x/server"):
        pass
    before = settled_segments(lab)
    with connection(lab, "x/client", "x/server"):
        pass
    assert settled_segments(lab) - before == 6


def test_frames_never_travel_in_other_segments(lab: Lab) -> None:
    for segment in _captured(lab, 4, b"hello"):
        assert is_frame(segment.payload) == bool(segment.flags & SYN)
