# SPDX-License-Identifier: Apache-2.0
"""Numbers that stand for peers in the marks of released flows."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from enforcer_daemon.datapath import flowindex
from enforcer_daemon.datapath.flowindex import BY_ADDRESS, FIRST, UNKNOWN, FlowIndex
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.handshake.session import Grant
from enforcer_daemon.identity.tokens import Claims
from enforcer_daemon.marks import released_mark
from enforcer_daemon.model import Direction, EvaluatedFlow, Identity, NamedPort, PodRef, Protocol
from enforcer_daemon.verdict import Action, Verdict
from tests.unit.identity.certificates import authority, credential, new_key

ADDRESS = ip_address("10.0.0.9")
CREDENTIAL = credential(authority(), new_key())
WEB = Identity(PodRef("shop", "web"), (ADDRESS,), {"app": "web"}, {"team": "a"}, "node-b")


def number(index: FlowIndex, identity: Identity = WEB, port: int = 80, protocol: Protocol = Protocol.TCP) -> int:
    peer = Peer(Claims(identity, bytes(32), 0.0, 0.0), b"token", CREDENTIAL)
    return index.add(EvaluatedFlow(Direction.INGRESS, peer.identity, ADDRESS, port, protocol))


def test_numbers_begin_after_the_reserved_ones_and_are_given_once() -> None:
    index = FlowIndex()
    assert (UNKNOWN, BY_ADDRESS, number(index)) == (0, 1, FIRST)
    assert number(index, port=81) == FIRST + 1
    assert number(index) == FIRST
    assert len(index) == 2


def test_a_new_token_of_the_same_identity_finds_the_same_number() -> None:
    index = FlowIndex()
    assert number(index) == number(index, replace(WEB, labels=dict(WEB.labels)))


@pytest.mark.parametrize(
    "change",
    [
        {"labels": {"app": "db"}},
        {"namespace_labels": {}},
        {"pod": PodRef("shop", "other")},
        {"service_account": "robot"},
        {"trust_domain": "elsewhere"},
        {"named_ports": (NamedPort("http", 80, Protocol.TCP),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_policy_may_judge_by_makes_another_number(change: dict[str, object]) -> None:
    index = FlowIndex()
    assert number(index) != number(index, replace(WEB, **change))  # type: ignore[arg-type]
    assert number(index) != number(index, protocol=Protocol.UDP)


def test_fresh_entries_are_given_once() -> None:
    index = FlowIndex()
    assert not index.fresh
    first = number(index)
    assert index.fresh
    assert [found for found, _ in index.take_fresh()] == [first]
    number(index)
    assert index.take_fresh() == []


def test_an_index_goes_on_where_an_earlier_one_stopped() -> None:
    earlier = FlowIndex()
    old = number(earlier)
    later = FlowIndex(earlier)
    assert later.is_complete
    assert number(later) == old
    assert not later.fresh
    assert number(later, port=81) == old + 1


def test_a_number_that_the_kernel_still_bears_is_not_given_to_another_peer() -> None:
    index = FlowIndex(highest_in_use=41)
    assert not index.is_complete
    assert number(index) == 42


def test_a_full_table_gives_unknown_and_still_finds_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowindex, "MAX_INDEX", FIRST)
    index = FlowIndex()
    assert number(index) == FIRST
    assert index.is_complete
    assert number(index, port=81) == UNKNOWN
    assert not index.is_complete
    assert number(index) == FIRST
    assert index.get(UNKNOWN) is None


def test_flows_of_a_pod_are_found_by_its_address_name_and_uid() -> None:
    index = FlowIndex()
    first, second = number(index, replace(WEB, uid="1")), number(index, replace(WEB, pod=PodRef("shop", "later")))
    assert set(index.of_pod(WEB)) == {first}
    assert set(index.of_pod(replace(WEB, uid="1"))) == {first}
    assert index.of_pod(replace(WEB, uid="2")) == {}
    assert index.of_pod(replace(WEB, ips=(ip_address("10.0.0.10"),))) == {}
    assert set(index.of_strangers(WEB)) == {second}


def test_flows_follow_their_peers_identity() -> None:
    index = FlowIndex()
    one, other = number(index), number(index, port=81)
    relabelled = replace(WEB, labels={"app": "quarantine"})
    changed = index.replace_peer([one, other], relabelled)
    assert [(at, flow.peer) for at, flow in changed] == [(one, relabelled), (other, relabelled)]
    assert number(index, relabelled) == one
    assert number(index) not in (one, other)
    index.replace_peer(index.of_pod(relabelled), WEB)
    assert {flow.peer for _, flow in index} == {WEB}
    assert number(index, port=81) == other


def test_flows_that_ended_with_their_pod_are_not_found_until_their_number_is_used_again() -> None:
    index = FlowIndex()
    one = number(index)
    index.note_ended([one])
    assert (index.of_pod(WEB), index.of_strangers(replace(WEB, pod=PodRef("shop", "later")))) == ({}, {})
    assert number(index) == one
    assert set(index.of_pod(WEB)) == {one}


def test_one_peer_has_its_share_and_then_an_entry_for_all_ports_it_has_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowindex, "MAX_OF_ONE_PEER", 2)
    index = FlowIndex()
    own = [number(index, port=port) for port in range(1, 10)]
    assert own == [FIRST, FIRST + 1] + [FIRST + 2] * 7
    shared = index.get(FIRST + 2)
    assert shared is not None
    assert (shared.port, shared.peer) == (0, WEB)
    assert number(index, replace(WEB, pod=PodRef("shop", "other")), port=9) == FIRST + 3
    assert index.is_complete


def test_what_a_peers_changes_of_labels_add_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowindex, "MAX_OF_ONE_PEER", 2)
    index = FlowIndex()
    for n in range(200):
        number(index, replace(WEB, labels={"n": str(n)}), port=80 + n)
    assert len(index) == 2 + 64


def test_an_entry_that_no_flow_bears_for_two_looks_is_free_but_the_address_stays_known() -> None:
    index = FlowIndex()
    numbers = [number(index, port=80 + n) for n in range(4)]
    index.begin_look()
    index.free(index.unused(set()))
    assert len(index) == 4, "flows that were released just now may not be in the kernel yet"
    assert number(index, port=81) == numbers[1]
    index.begin_look()
    index.free(index.unused({numbers[3]}))
    assert {at for at, _ in index} == {numbers[1], numbers[3]}
    index.begin_look()
    index.begin_look()
    index.free(index.unused(set()))
    assert len(index) == 1
    assert index.knows(ADDRESS.packed)
    assert set(index.of_pod(WEB)) == {at for at, _ in index}
    assert {number(index, port=180 + n) for n in range(3)} <= set(numbers), "free numbers are given again"


def test_a_number_given_again_between_the_look_and_its_end_is_not_freed() -> None:
    index = FlowIndex()
    first, second = number(index), number(index, port=81)
    index.begin_look()
    index.begin_look()
    unused = index.unused(set())
    assert set(unused) == {first, second}
    assert number(index) == first
    index.free(unused)
    assert index.get(first) is not None
    assert index.get(second) is None


def test_an_index_with_gaps_is_complete_once_no_flow_bears_them() -> None:
    index = FlowIndex(highest_in_use=FIRST + 1)
    index.begin_look()
    index.unused({FIRST})
    assert not index.is_complete
    index.begin_look()
    index.unused(set())
    assert index.is_complete
    assert number(index) in (FIRST, FIRST + 1)


def test_a_flow_without_an_entry_keeps_the_index_incomplete_while_the_kernel_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flowindex, "MAX_INDEX", FIRST)
    index = FlowIndex()
    number(index)
    number(index, port=81)
    for in_use, is_complete in (({FIRST, UNKNOWN}, False), ({FIRST}, True)):
        index.begin_look()
        index.unused(in_use)
        assert index.is_complete is is_complete


def test_flows_of_one_grant_find_their_entry_again_while_it_stays_theirs() -> None:
    index = FlowIndex()
    grant = Grant(Verdict(Action.RELEASE), EvaluatedFlow(Direction.INGRESS, WEB, ADDRESS, 80, Protocol.TCP))
    first = index.release(grant)
    assert first.mark == released_mark(FIRST)
    assert index.release(grant) is first
    index.replace_peer([FIRST], replace(WEB, labels={"app": "other"}))
    assert index.release(grant).mark == released_mark(FIRST + 1)
    by_address = Grant(Verdict(Action.RELEASE, mark=released_mark(BY_ADDRESS)))
    assert index.release(by_address) is by_address.verdict


def test_a_grant_without_an_entry_of_its_own_is_looked_up_for_each_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowindex, "MAX_OF_ONE_PEER", 0)
    index = FlowIndex()
    grant = Grant(Verdict(Action.RELEASE), EvaluatedFlow(Direction.INGRESS, WEB, ADDRESS, 80, Protocol.TCP))
    assert index.release(grant).mark == released_mark(FIRST)  # That of all ports.
    assert grant.entry is None
    monkeypatch.setattr(flowindex, "MAX_OF_ONE_PEER", 10)
    assert index.release(grant).mark == released_mark(FIRST + 1)
