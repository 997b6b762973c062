# SPDX-License-Identifier: Apache-2.0
"""The claims that wait to be looked up, in fair turns: of nodes, and of the namespaces of a node.

Names and UIDs cost nothing: a node that was taken over makes up as many as it likes, and a user of a namespace makes
and deletes pods. Each waits behind its own alone. Where a share is full, a claim is refused, since it would else pass
without ever being looked up; where the whole queue is, the one that would have most gives way.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from enum import Enum
from typing import NamedTuple

from enforcer_daemon.handshake.claims import Claim

MAX_WAITING = 1_024
"""Claims that wait. At ten look-ups a second, somewhat less than two minutes' worth."""
MAX_WAITING_OF_NODE = 256
"""Of one node; kubelet runs 110 pods by default, and hardly ever more than 250."""
MAX_WAITING_OF_NAMESPACE = 128
"""Of one node and one namespace, so that a tenant never fills its node's share."""


class Admission(Enum):
    """What became of a claim."""

    TAKEN = "taken"
    SHARE_IS_FULL = "share is full"
    """As many of its node, or of its node and namespace, wait as may."""
    QUEUE_IS_FULL = "queue is full"
    """And no other node has more in it."""


class Admitted(NamedTuple):
    """The answer to a claim, and the claim that it took the place of."""

    admission: Admission
    evicted: Claim | None = None


class LookupQueue:
    """First in, first out for each namespace of a node; namespaces of a node by turns, nodes by turns."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[str, OrderedDict[str, deque[Claim]]] = OrderedDict()
        self._waiting: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._waiting.total()

    def put(self, claim: Claim) -> Admitted:
        """Let a claim wait, where there is room for it."""
        node, namespace = claim.node, claim.pod.namespace
        own = self._nodes.get(node, OrderedDict())
        of_namespace = len(own.get(namespace, ()))
        if of_namespace >= MAX_WAITING_OF_NAMESPACE:
            return Admitted(Admission.SHARE_IS_FULL)
        evicted = None
        if self._waiting[node] >= MAX_WAITING_OF_NODE:
            greediest = max(own, key=lambda other: len(own[other]))
            if len(own[greediest]) <= of_namespace + 1:
                return Admitted(Admission.SHARE_IS_FULL)
            evicted = self._drop_newest(node, greediest)
        elif len(self) >= MAX_WAITING:
            most = max(self._waiting, key=lambda other: self._waiting[other])
            if self._waiting[most] <= self._waiting[node] + 1:
                return Admitted(Admission.QUEUE_IS_FULL)
            other = self._nodes[most]
            evicted = self._drop_newest(most, max(other, key=lambda name: len(other[name])))
        self._nodes.setdefault(node, OrderedDict()).setdefault(namespace, deque()).append(claim)
        self._waiting[node] += 1
        return Admitted(Admission.TAKEN, evicted)

    def take(self) -> Claim | None:
        """Take out the claim whose turn it is; None: none waits."""
        if not self._nodes:
            return None
        node, namespaces = next(iter(self._nodes.items()))
        namespace, waiting = next(iter(namespaces.items()))
        claim = waiting.popleft()
        namespaces.move_to_end(namespace)
        self._nodes.move_to_end(node)
        self._tidy(node, namespace)
        return claim

    def _drop_newest(self, node: str, namespace: str) -> Claim:
        claim = self._nodes[node][namespace].pop()
        self._tidy(node, namespace)
        return claim

    def _tidy(self, node: str, namespace: str) -> None:
        self._waiting[node] -= 1
        namespaces = self._nodes[node]
        if not namespaces[namespace]:
            del namespaces[namespace]
        if not namespaces:
            del self._nodes[node]
            del self._waiting[node]
