# SPDX-License-Identifier: Apache-2.0
"""Who is believed after which answers: claims, nodes, and for how long."""

from __future__ import annotations

from dataclasses import replace

import pytest

from enforcer_daemon.errors import TokenError
from enforcer_daemon.handshake.placement import MAX_ABSENT, MAX_CLAIMS, MAX_DOUBTED, Answer, Claim, Placement
from enforcer_daemon.model import Identity, PodRef
from enforcer_daemon.reasons import Reason

WEB = Identity(PodRef("shop", "web"), (), {}, {}, "node-b", uid="u-1")
DENIAL_S = 100.0


class Cluster:
    """What was asked for; it answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[Claim] = []
        self.has_room = True
        self.placement = Placement("node-a", "cluster.local", DENIAL_S, self._ask)

    def _ask(self, claim: Claim) -> bool:
        if self.has_room:
            self.asked.append(claim)
        return self.has_room

    def answer(self, answer: Answer, now: float = 0.0) -> bool:
        return self.placement.settle(self.asked[-1], answer, "elsewhere", now)

    def refusal(self, identity: Identity = WEB, now: float = 0.0) -> Reason | None:
        try:
            self.placement.require(identity, now)
        except TokenError as err:
            return err.reason
        return None


def pod(name: str) -> Identity:
    return replace(WEB, pod=PodRef("shop", name), uid=f"u-{name}")


def test_a_claim_is_looked_up_once_and_meanwhile_believed() -> None:
    cluster = Cluster()
    assert cluster.refusal() is None
    assert cluster.refusal() is None
    cluster.answer(Answer.HERE)
    assert cluster.refusal(now=1e6) is None
    assert cluster.asked == [Claim("node-b", PodRef("shop", "web"), "u-1")]


@pytest.mark.parametrize("identity", [replace(WEB, node="node-a"), replace(WEB, trust_domain="other.example")])
def test_own_pods_and_those_of_other_clusters_are_not_looked_up(identity: Identity) -> None:
    cluster = Cluster()
    assert cluster.refusal(identity) is None
    assert cluster.asked == []
    assert not cluster.placement.is_denied(identity, 0.0)


def test_a_node_that_claims_another_nodes_pod_is_denied_with_all_its_tokens_for_a_time() -> None:
    cluster = Cluster()
    cluster.refusal()
    assert cluster.answer(Answer.ELSEWHERE, now=10.0)
    for identity in (WEB, pod("other")):
        assert cluster.refusal(identity, now=109.0) is Reason.NODE_DENIED
        assert cluster.placement.is_denied(identity, 109.0)
    assert cluster.refusal(replace(WEB, node="node-c"), now=109.0) is None
    asked = len(cluster.asked)
    assert not cluster.placement.is_denied(WEB, 110.0)
    assert cluster.refusal(now=110.0) is None
    assert len(cluster.asked) == asked + 1  # Believed again, and looked up again.


def test_a_pod_that_is_not_there_is_denied_alone() -> None:
    cluster = Cluster()
    cluster.refusal()
    assert not cluster.answer(Answer.ABSENT)
    assert cluster.refusal(now=99.0) is Reason.MISPLACED_POD
    assert cluster.refusal(pod("other"), now=99.0) is None
    assert cluster.refusal(now=100.0) is None
    assert cluster.asked[-1].pod == WEB.pod


def test_another_uid_of_a_name_is_another_claim_and_counts_as_the_same_pod() -> None:
    cluster = Cluster()
    for number in range(2 * MAX_ABSENT):
        assert cluster.refusal(replace(WEB, uid=f"u-{number}")) is None
        assert not cluster.answer(Answer.ABSENT)
    assert len(cluster.asked) == 2 * MAX_ABSENT


def test_pods_that_are_not_there_never_deny_their_node() -> None:
    """Whoever may delete his pods by force makes as many as he likes; the processes live on and dial."""
    cluster = Cluster()
    assert cluster.refusal(pod("known")) is None
    cluster.answer(Answer.HERE)
    for number in range(20 * MAX_ABSENT):
        cluster.refusal(pod(f"p{number}"))
        assert not cluster.answer(Answer.ABSENT)
    assert cluster.placement.denied == {}
    assert cluster.refusal(pod("known")) is None
    assert cluster.refusal(replace(pod("new"), pod=PodRef("other", "new"))) is None
    assert cluster.refusal(replace(pod("new"), node="node-c")) is None


def test_after_several_that_are_not_there_pods_of_that_namespace_and_node_are_looked_up_first() -> None:
    """Made-up pods look the same as deleted ones: a fresh name for each contact must not pass each time."""
    cluster = Cluster()
    for number in range(MAX_ABSENT):
        assert cluster.refusal(pod(f"p{number}")) is None
        cluster.answer(Answer.ABSENT)
    for number in range(3):
        assert cluster.refusal(pod(f"made-up-{number}"), now=99.0) is Reason.UNCONFIRMED_POD
    assert cluster.refusal(pod("true"), now=99.0) is Reason.UNCONFIRMED_POD
    assert cluster.refusal(pod("true"), now=99.0) is Reason.UNCONFIRMED_POD
    assert [claim.pod.name for claim in cluster.asked[-1:]] == ["true"]  # Asked for once.
    cluster.answer(Answer.HERE)
    assert cluster.refusal(pod("true"), now=99.0) is None
    assert cluster.refusal(pod("later"), now=DENIAL_S) is None


def test_a_pod_of_a_namespace_that_the_cluster_does_not_have_is_looked_up_first() -> None:
    cluster = Cluster()
    cluster.placement.has_namespace = lambda name: name == "shop"
    assert cluster.refusal() is None
    made_up = replace(WEB, pod=PodRef("made-up", "web"))
    assert cluster.refusal(made_up) is Reason.UNCONFIRMED_POD
    cluster.answer(Answer.HERE)  # The namespace is new, and the watch behind.
    assert cluster.refusal(made_up) is None


def test_flows_with_a_pod_that_is_not_there_end_and_no_others() -> None:
    cluster = Cluster()
    cluster.refusal()
    cluster.answer(Answer.ABSENT)
    assert cluster.placement.is_denied(WEB, 99.0)
    assert not cluster.placement.is_denied(WEB, DENIAL_S)
    assert not cluster.placement.is_denied(pod("other"), 99.0)
    assert not cluster.placement.is_denied(replace(WEB, node="node-a"), 99.0)
    assert not cluster.placement.is_denied(replace(WEB, trust_domain="other.example"), 99.0)


def test_what_is_remembered_of_absent_pods_is_bounded() -> None:
    cluster = Cluster()
    for number in range(MAX_DOUBTED + 10):
        claim = Claim("node-b", PodRef(f"n{number}", "p"), "u")
        for name in ("p", "q") * 2:
            cluster.placement.settle(replace(claim, pod=PodRef(f"n{number}", name)), Answer.ABSENT, "away", 0.0)
    for number in range(3 * MAX_ABSENT):
        cluster.placement.settle(Claim("node-b", PodRef("x", f"p{number}"), "u"), Answer.ABSENT, "away", 0.0)
    assert len(cluster.placement._absent) == MAX_DOUBTED
    assert max(map(len, cluster.placement._absent.values())) == MAX_ABSENT


def test_one_nodes_claims_push_out_no_other_nodes() -> None:
    cluster = Cluster()
    other = replace(pod("good"), node="node-c")
    cluster.refusal(other)
    cluster.answer(Answer.HERE)
    for number in range(MAX_CLAIMS + 100):
        cluster.refusal(pod(f"p{number}"))
    asked = len(cluster.asked)
    assert cluster.refusal(other) is None
    assert len(cluster.asked) == asked


def test_what_the_queue_refuses_is_not_believed_and_asked_for_again() -> None:
    cluster = Cluster()

    def refuse(_: Claim) -> bool:
        raise TokenError(Reason.UNCONFIRMED_POD, "too many")

    cluster.placement._ask = refuse
    assert cluster.refusal() is Reason.UNCONFIRMED_POD
    cluster.placement._ask = cluster._ask
    assert cluster.refusal() is None
    assert len(cluster.asked) == 1


def test_pods_that_were_not_there_long_ago_do_not_count() -> None:
    cluster = Cluster()
    for number in range(3 * MAX_ABSENT):
        now = number * DENIAL_S
        assert cluster.refusal(pod(f"p{number}"), now) is None
        assert not cluster.answer(Answer.ABSENT, now)


def test_an_api_server_that_is_away_changes_nothing() -> None:
    cluster = Cluster()
    cluster.refusal()
    assert not cluster.answer(Answer.UNKNOWN)
    assert cluster.refusal() is None
    assert len(cluster.asked) == 2


def test_a_claim_that_cannot_be_asked_for_now_is_asked_for_later() -> None:
    cluster = Cluster()
    cluster.has_room = False
    assert cluster.refusal() is None
    cluster.has_room = True
    assert cluster.refusal() is None
    assert len(cluster.asked) == 1


def test_an_operator_releases_a_node_and_all_that_was_held_against_it() -> None:
    cluster = Cluster()
    cluster.refusal(pod("gone"))
    cluster.answer(Answer.ABSENT)
    cluster.refusal()
    cluster.answer(Answer.ELSEWHERE)
    assert cluster.placement.release("node-b")
    assert not cluster.placement.release("node-b")
    assert cluster.refusal() is None
    assert cluster.refusal(pod("gone")) is None


def test_claims_are_bounded_and_the_oldest_makes_room() -> None:
    cluster = Cluster()
    for number in range(MAX_CLAIMS + 1):
        cluster.refusal(pod(f"p{number}"))
    cluster.refusal(pod("p1"))
    assert len(cluster.asked) == MAX_CLAIMS + 1
    cluster.refusal(pod("p0"))
    assert len(cluster.asked) == MAX_CLAIMS + 2


def test_a_long_name_is_cut_in_what_is_told() -> None:
    cluster = Cluster()
    cluster.refusal(pod("x" * 5000))
    cluster.answer(Answer.ELSEWHERE)
    assert len(cluster.placement.denied["node-b"].why) < 250
