# SPDX-License-Identifier: Apache-2.0
"""Flows to a virtual address whose peer shows no identity: a rule may name the address behind it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from enforcer_daemon.marks import REPLY
from enforcer_daemon.model import Decision, Direction, Identity, IPAddress, Protocol, RuleRef
from enforcer_daemon.packet.ip import decode_ip
from enforcer_daemon.packet.tcp import ACK, SYN, build
from enforcer_daemon.packet.transport import is_init
from enforcer_daemon.packet.udp import build_udp
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import Action, Settle
from tests.unit.datapath.guarded import AUTHORITY
from tests.unit.datapath.pair import Endpoint, FakePolicy, Node, Rules, v4

FRONT, BEHIND = (v4("10.96.0.1"), 443), (v4("203.0.113.7"), 6_443)
DATA, INIT, INIT_ACK = 0, 1, 2
"""Types of SCTP chunks (RFC 9260, section 3.2)."""
ELSEWHERE = (v4("203.0.113.8"), 6_443)


@dataclass
class OneAddress(Rules):
    """Egress to one address and port alone."""

    allowed: tuple[bytes, int] = BEHIND

    @property
    def is_isolated(self) -> bool:
        return True

    def evaluate(
        self, peer: Identity | None, address: IPAddress, port: int | None, protocol: Protocol | None
    ) -> Decision:
        if peer is None and (address.packed, port) == self.allowed:
            return Decision(True, Reason.POLICY, Direction.EGRESS, (RuleRef("default", "api", 0),))
        return Decision(False, Reason.EGRESS_DENIED, Direction.EGRESS)

    def could_allow(self, address: IPAddress | None, port: int | None, protocol: Protocol) -> bool:
        return address is None or (address.packed, port) == self.allowed


def client(behind: tuple[bytes, int] | None = BEHIND, allowed: tuple[bytes, int] = BEHIND) -> Endpoint:
    node = Node("node-1", AUTHORITY)
    if behind is not None:
        node.true_destinations[FRONT] = behind
    return node.endpoint("pod", "10.1.0.2", "pod", FakePolicy(egress=OneAddress(allowed=allowed)))


def connect(pod: Endpoint) -> list[bytes]:
    """Dial the virtual address; return what the pod gets of the bare SYN-ACK."""
    (front, port) = FRONT
    assert pod.send(build(pod.address, front, (40_000, port), (1_000, 0), SYN, 64_240))
    return pod.receive(build(front, pod.address, (port, 40_000), (5_000, 1_001), SYN | ACK, 64_240))


def test_a_rule_for_the_address_behind_allows_the_connection() -> None:
    pod = client()
    assert connect(pod)
    (report,) = pod.take_reports()
    assert (report.is_allowed, report.remote, report.port) == (True, *BEHIND)


def test_a_rule_for_the_dialed_address_still_allows_it() -> None:
    pod = client(behind=ELSEWHERE, allowed=FRONT)
    assert connect(pod)
    (report,) = pod.take_reports()
    assert (report.is_allowed, report.remote, report.port) == (True, *FRONT)


@pytest.mark.parametrize(
    ("behind", "detail"), [(ELSEWHERE, "the node sends it to 203.0.113.8, port 6443"), (FRONT, ""), (None, "")]
)
def test_a_denial_names_what_is_behind(behind: tuple[bytes, int] | None, detail: str) -> None:
    pod = client(behind)
    assert not connect(pod)
    (report,) = pod.take_reports()
    assert (report.is_allowed, report.remote, report.detail) == (False, FRONT[0], detail)


def test_an_address_that_is_not_virtual_is_decided_as_dialed() -> None:
    pod = client()
    pod.node.true_destinations[ELSEWHERE] = BEHIND
    assert pod.send(build(pod.address, ELSEWHERE[0], (40_000, ELSEWHERE[1]), (1_000, 0), SYN, 64_240)) == []
    assert pod.reasons() == ["unidentified-peer"]


def left(pod: Endpoint, now: float) -> int:
    """Run the timers; return how many of the packets that waited leave."""
    effects = pod.expire(now)
    return sum(isinstance(effect, Settle) and effect.verdict.action is not Action.DROP for effect in effects)


def ask(pod: Endpoint) -> None:
    assert pod.send(build_udp(pod.address, FRONT[0], (40_000, FRONT[1]), b"query")) == []


def test_a_datagram_waits_until_the_node_knows_where_it_leads() -> None:
    pod = client()
    ask(pod)
    assert pod.flush_injected()  # The offer.
    assert pod.wake_at is not None
    assert left(pod, pod.wake_at) == 1
    reply = build_udp(FRONT[0], pod.address, (FRONT[1], 40_000), b"reply")
    assert pod.receive(reply, pod.wake_at or 1.3) == [reply]


def test_a_datagram_that_leads_to_no_allowed_address_never_leaves() -> None:
    pod = client(ELSEWHERE)
    ask(pod)
    for now in (1.2, 1.5, 2.5, 5.0):
        assert left(pod, now) == 0


def sctp(source: bytes, destination: bytes, ports: tuple[int, int], kind: int, length: int = 20) -> bytes:
    chunk = bytes([kind, 0]) + length.to_bytes(2, "big") + bytes(16)
    payload = ports[0].to_bytes(2, "big") + ports[1].to_bytes(2, "big") + bytes(8) + chunk
    head = bytes([0x45, 0]) + (20 + len(payload)).to_bytes(2, "big") + bytes(4) + bytes([64, 132, 0, 0])
    return head + source + destination + payload


@pytest.mark.parametrize(("behind", "then"), [(BEHIND, Action.RELEASE), (ELSEWHERE, Action.DROP), (None, Action.DROP)])
def test_an_association_goes_on_by_what_is_behind(behind: tuple[bytes, int] | None, then: Action) -> None:
    """Although anybody may open one to the pod."""
    pod, ports = client(behind), (40_000, FRONT[1])
    assert pod.verdict(sctp(pod.address, FRONT[0], ports, INIT), Direction.EGRESS).action is Action.ACCEPT
    answer = sctp(FRONT[0], pod.address, ports[::-1], INIT_ACK)
    assert pod.verdict(answer, Direction.INGRESS, mark=REPLY).action is then
    assert pod.verdict(sctp(pod.address, FRONT[0], ports, DATA), Direction.EGRESS).action is then


def test_an_init_to_an_address_that_no_rule_can_mean_does_not_leave() -> None:
    pod = client()
    packet = sctp(pod.address, ELSEWHERE[0], (40_000, 1), INIT)
    assert pod.verdict(packet, Direction.EGRESS).action is Action.DROP


@pytest.mark.parametrize(
    ("packet", "found"),
    [
        (sctp(bytes(4), bytes(4), (1, 2), INIT), True),
        (sctp(bytes(4), bytes(4), (1, 2), INIT_ACK), False),
        (sctp(bytes(4), bytes(4), (1, 2), INIT, length=8), False),
        (build_udp(bytes(4), bytes(4), (1, 2), bytes(20)), False),
    ],
)
def test_an_init_is_alone_in_its_packet(packet: bytes, found: bool) -> None:
    assert is_init(packet, decode_ip(packet)) is found
