# SPDX-License-Identifier: Apache-2.0
"""A SYN that answers the pod's own: its kernel takes that for a simultaneous open, so egress is evaluated as well."""

from __future__ import annotations

import pytest

from enforcer_daemon.marks import RELEASED, REPLY
from enforcer_daemon.model import Direction
from enforcer_daemon.packet.tcp import SYN, build
from enforcer_daemon.verdict import Action
from tests.unit.datapath.pair import Connection, Endpoint, FakePolicy, Rules, make_pair

BY_IDENTITY = frozenset({"server"})
BY_ANOTHERS = frozenset({"other"})


def meeting(apps: frozenset[str], *, addresses: bool = False) -> tuple[Connection, Connection]:
    """Give the connection of a client that may reach these alone, and the server's to the same ports."""
    egress = Rules(apps, addresses, Direction.EGRESS)
    client, server = make_pair(FakePolicy(egress=egress))
    return Connection(client, server), Connection(server, client, sport=80, dport=40_000, isn_i=5_000)


def plain(back: Connection) -> bytes:
    ports = back.sport, back.dport
    return build(back.client.address, back.server.address, ports, (back.isn_i, 0), SYN, 64_240)


def evaluated(pod: Endpoint, syn: bytes, mark: int = 0) -> tuple[bool, str]:
    """Give whether a SYN gets in, and why."""
    pod.take_reports()
    is_in = pod.receive(syn, mark=mark) != []
    (report,) = pod.take_reports()
    return is_in, f"{report.direction.value} {report.port} {report.reason.value}"


def test_without_an_identity_it_must_be_an_address_that_the_pod_may_reach() -> None:
    there, back = meeting(BY_IDENTITY)
    there.client.send(there.syn())
    assert evaluated(there.client, plain(back)) == (False, "egress 80 unidentified-peer")
    assert there.client.datapath.half_open_flows == 1  # A stranger's SYN ends nobody's handshake.
    there, back = meeting(BY_IDENTITY, addresses=True)
    there.client.send(there.syn())
    assert evaluated(there.client, plain(back)) == (True, "ingress 40000 not-isolated")


@pytest.mark.parametrize(
    ("apps", "expected"),
    [(BY_IDENTITY, (True, "ingress 40000 not-isolated")), (BY_ANOTHERS, (False, "egress 80 egress-denied"))],
)
def test_with_an_identity_it_must_be_one_that_the_pod_may_reach(
    apps: frozenset[str], expected: tuple[bool, str]
) -> None:
    there, back = meeting(apps)
    there.client.send(there.syn())
    (framed,) = back.client.send(back.syn())
    assert evaluated(there.client, framed) == expected


@pytest.mark.parametrize(("mark", "is_in"), [(0, True), (REPLY, False), (REPLY | RELEASED, False)])
def test_conntrack_knows_a_syn_that_the_enforcer_remembers_no_more(mark: int, *, is_in: bool) -> None:
    there, back = meeting(BY_IDENTITY)
    assert evaluated(there.client, plain(back), mark)[0] is is_in


def test_the_direction_alone_takes_no_release_back() -> None:
    there, back = meeting(BY_IDENTITY)
    (framed,) = back.client.send(back.syn())
    assert there.client.verdict(framed, Direction.INGRESS, mark=REPLY).action is Action.ACCEPT
