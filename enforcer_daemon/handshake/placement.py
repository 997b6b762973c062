# SPDX-License-Identifier: Apache-2.0
"""Whether tokens' pods are where their nodes say: claims to be looked up, and nodes that are believed no longer.

A node's key can sign for any pod. What the cluster knows of the pod tells a false claim from a true one, once for each
claim and after its first contact, which waits for nothing.

Only what no user of a namespace can bring about counts against a node: that the API server has the very pod, by the UID
that it gave it, on another node. A pod that the cluster does not have counts against the claim alone, since whoever may
delete a pod by force leaves its processes running. Made-up pods look the same, so after several of one namespace on one
node, further pods of that namespace on that node must be looked up before they are believed; others need not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from enforcer_daemon.errors import TokenError
from enforcer_daemon.handshake.claims import Answer, Claim, Denial
from enforcer_daemon.handshake.fairtable import FairTable
from enforcer_daemon.model import Identity, PodRef
from enforcer_daemon.reasons import Reason

__all__ = ["MAX_ABSENT", "MAX_CLAIMS", "MAX_DOUBTED", "Answer", "Claim", "Denial", "Placement"]

MAX_CLAIMS = 16_384
"""Claims that are remembered. The oldest one of the node that has most makes room, and is looked up again when it is
made again; so no node's claims push out those of others."""
MAX_ABSENT = 5
"""Pods of one namespace that a node may claim and the cluster does not have, before others are looked up first."""
MAX_DOUBTED = 4_096
"""Namespaces of nodes of which absent pods are remembered; the oldest makes room."""


class _Known(NamedTuple):
    """What is known of a claim."""

    claim: Claim
    is_confirmed: bool = False
    """Whether the cluster has the pod there; else it was asked, or denies it."""
    denial: Denial | None = None


class Placement:
    """The claims of one trust domain's nodes, as one node sees them."""

    __slots__ = ("_absent", "_ask", "_claims", "_denial_s", "_own_node", "_trust_domain", "denied", "has_namespace")

    def __init__(self, own_node: str, trust_domain: str, denial_s: float, ask: Callable[[Claim], bool]) -> None:
        """`ask` has a claim looked up, or returns False where it cannot now; `settle` takes the answer.

        It raises TokenError where a claim that cannot be looked up must not be believed.
        """
        self._own_node = own_node
        self._trust_domain = trust_domain
        self._denial_s = denial_s
        self._ask = ask
        self._claims: FairTable[Claim, _Known] = FairTable(MAX_CLAIMS, MAX_CLAIMS)
        self._absent: dict[tuple[str, str], dict[PodRef, float]] = {}
        """Pods that the cluster does not have, by node and namespace, and until when they count."""
        self.denied: dict[str, Denial] = {}
        """Nodes that are denied, by name."""
        self.has_namespace: Callable[[str], bool] = lambda _: True
        """Tells whether the cluster has a namespace. Pods of one that it does not have, which only a node can make up,
        are looked up before they are believed."""

    def require(self, identity: Identity, now: float) -> None:
        """Raise TokenError where a verified token's pod, or its node, is denied; have a new claim looked up."""
        if identity.trust_domain != self._trust_domain or identity.node == self._own_node:
            return  # Another cluster's pods cannot be asked for; our own node signs for what it enforces.
        if (denial := self.denied.get(identity.node)) is not None:
            if now < denial.until:
                raise TokenError(Reason.NODE_DENIED, f"node {identity.node}: {denial.why}")
            self.release(identity.node)
        claim = Claim(identity.node, identity.pod, identity.uid)
        known = self._claims.get(claim)
        if known is not None and known.denial is not None:
            if now < known.denial.until:
                raise TokenError(Reason.MISPLACED_POD, known.denial.why)
            known = None
        if known is not None and known.is_confirmed:
            return
        if known is None and self._ask(claim):
            self._remember(_Known(claim))
        if self._is_doubted(claim, now):
            raise TokenError(Reason.UNCONFIRMED_POD, f"pod {_name(claim)} of node {claim.node}")

    def is_denied(self, identity: Identity, now: float) -> bool:
        """Tell whether established flows with a pod must end."""
        if identity.trust_domain != self._trust_domain or identity.node == self._own_node:
            return False
        denial = self.denied.get(identity.node)
        if denial is None:
            known = self._claims.get(Claim(identity.node, identity.pod, identity.uid))
            denial = None if known is None else known.denial
        return denial is not None and now < denial.until

    def settle(self, claim: Claim, answer: Answer, where: str, now: float) -> bool:
        """Take an answer over; tell whether the node is denied from now on. `where` says what was found instead."""
        match answer:
            case Answer.HERE:
                self._remember(_Known(claim, is_confirmed=True))
            case Answer.UNKNOWN:
                self.forget(claim)
            case Answer.ELSEWHERE:
                self._claims.pop(claim)
                is_new = claim.node not in self.denied
                why = f"it claims pod {_name(claim)}, which is {where}"
                self.denied[claim.node] = Denial(why, now + self._denial_s)
                return is_new
            case Answer.ABSENT:
                why = f"node {claim.node} claims pod {_name(claim)}, which is {where}"
                self._remember(_Known(claim, denial=Denial(why, now + self._denial_s)))
                self._note_absent(claim, now)
        return False

    def forget(self, claim: Claim) -> None:
        """Look a claim up anew when it is made again, as where it was not looked up after all."""
        self._claims.pop(claim)

    def release(self, node: str) -> bool:
        """Believe a node again, and look its claims up anew; tell whether it was denied."""
        for known in [known for known in self._claims if known.claim.node == node]:
            self._claims.pop(known.claim)
        for key in [key for key in self._absent if key[0] == node]:
            del self._absent[key]
        return self.denied.pop(node, None) is not None

    def _note_absent(self, claim: Claim, now: float) -> None:
        key = claim.node, claim.pod.namespace
        counted = {pod: until for pod, until in self._absent.pop(key, {}).items() if until > now}
        counted.pop(claim.pod, None)
        counted[claim.pod] = now + self._denial_s
        if len(counted) > MAX_ABSENT:
            del counted[next(iter(counted))]  # The oldest: as many are enough.
        if len(self._absent) >= MAX_DOUBTED:
            del self._absent[next(iter(self._absent))]
        self._absent[key] = counted

    def _is_doubted(self, claim: Claim, now: float) -> bool:
        """Tell whether a pod must be looked up before it is believed."""
        if not self.has_namespace(claim.pod.namespace):
            return True
        counted = self._absent.get((claim.node, claim.pod.namespace), {})
        return len(counted) >= MAX_ABSENT and sum(until > now for until in counted.values()) >= MAX_ABSENT

    def _remember(self, known: _Known) -> None:
        self._claims.put(known.claim, known, known.claim.node.encode())


def _name(claim: Claim) -> str:
    """Give a claim's pod for a log, cut: the name is the other node's word."""
    return f"{claim.pod!s:.160}"
