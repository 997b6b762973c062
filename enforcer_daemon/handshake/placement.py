# SPDX-License-Identifier: Apache-2.0
"""Whether tokens' pods are where their nodes say: claims to be looked up, and nodes that are believed no longer.

A node's key can sign for any pod. What the cluster knows of the pod tells a false claim from a true one, once for each
claim and after its first contact, which waits for nothing. A node that claims a pod of another node is denied with all
its tokens; so is one that claims several pods that the cluster does not have, since names can be made up. One such pod
is denied alone: it may have been deleted by force while its node was cut off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from enforcer_daemon.errors import TokenError
from enforcer_daemon.model import Identity, PodRef
from enforcer_daemon.reasons import Reason

MAX_CLAIMS = 16_384
"""Claims that are remembered; the oldest makes room, and is looked up again when it is made again."""
MAX_ABSENT = 5
"""Pods that a node may claim and the cluster does not have, before the node is denied."""


class Answer(Enum):
    """What the cluster says of a claim."""

    HERE = "here"
    ELSEWHERE = "elsewhere"
    """The very pod is on another node, or on none yet."""
    ABSENT = "absent"
    """There is no such pod, or another one of that name."""
    UNKNOWN = "unknown"
    """The cluster could not be asked."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a token says of its pod's place."""

    node: str
    pod: PodRef
    uid: str
    """Empty where the token states none."""


@dataclass(frozen=True, slots=True)
class Denial:
    """Why a node, or one claim, is believed no longer, and until when (monotonic seconds)."""

    why: str
    until: float


class Placement:
    """The claims of one trust domain's nodes, as one node sees them."""

    __slots__ = ("_absent", "_ask", "_claims", "_denial_s", "_own_node", "_trust_domain", "denied")

    def __init__(self, own_node: str, trust_domain: str, denial_s: float, ask: Callable[[Claim], bool]) -> None:
        """`ask` has a claim looked up, or returns False where it cannot now; `settle` takes the answer."""
        self._own_node = own_node
        self._trust_domain = trust_domain
        self._denial_s = denial_s
        self._ask = ask
        self._claims: dict[Claim, Denial | None] = {}
        self._absent: dict[str, dict[PodRef, float]] = {}
        self.denied: dict[str, Denial] = {}
        """Nodes that are denied, by name."""

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
        if known is not None and now < known.until:
            raise TokenError(Reason.MISPLACED_POD, known.why)
        if (known is not None or claim not in self._claims) and self._ask(claim):
            self._claims.pop(claim, None)
            self._remember(claim, None)

    def is_denied(self, identity: Identity, now: float) -> bool:
        """Tell whether established flows with a pod must end."""
        if identity.trust_domain != self._trust_domain:
            return False
        denial = self.denied.get(identity.node)
        return denial is not None and now < denial.until

    def settle(self, claim: Claim, answer: Answer, where: str, now: float) -> bool:
        """Take an answer over; tell whether the node is denied from now on. `where` says what was found instead."""
        match answer:
            case Answer.HERE:
                self._remember(claim, None)
            case Answer.UNKNOWN:
                self._claims.pop(claim, None)
            case Answer.ELSEWHERE:
                return self._deny(claim, f"it claims pod {_name(claim)}, which is {where}", now)
            case Answer.ABSENT:
                why = f"node {claim.node} claims pod {_name(claim)}, which is {where}"
                self._remember(claim, Denial(why, now + self._denial_s))
                absent = self._absent.setdefault(claim.node, {})
                absent[claim.pod] = now + self._denial_s
                absent = self._absent[claim.node] = {pod: until for pod, until in absent.items() if until > now}
                if len(absent) >= MAX_ABSENT:
                    return self._deny(claim, f"it claims {len(absent)} pods that the cluster does not have", now)
        return False

    def _deny(self, claim: Claim, why: str, now: float) -> bool:
        self._claims.pop(claim, None)
        is_new = claim.node not in self.denied
        self.denied[claim.node] = Denial(why, now + self._denial_s)
        return is_new

    def release(self, node: str) -> bool:
        """Believe a node again, and look its claims up anew; tell whether it was denied."""
        for claim in [claim for claim in self._claims if claim.node == node]:
            del self._claims[claim]
        self._absent.pop(node, None)
        return self.denied.pop(node, None) is not None

    def _remember(self, claim: Claim, denial: Denial | None) -> None:
        if len(self._claims) >= MAX_CLAIMS and claim not in self._claims:
            del self._claims[next(iter(self._claims))]
        self._claims[claim] = denial


def _name(claim: Claim) -> str:
    """Give a claim's pod for a log, cut: the name is the other node's word."""
    return f"{claim.pod!s:.160}"
