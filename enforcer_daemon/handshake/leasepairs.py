# SPDX-License-Identifier: Apache-2.0
"""The pairs of pods that one endpoint has leases with: what is known of each, and the limited table of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from enforcer_daemon.handshake.fairtable import Limit, LimitHits
from enforcer_daemon.handshake.lapse import TCP_LAPSE_S, UDP_LAPSE_S
from enforcer_daemon.handshake.leaseframes import NO_ID, NO_NONCE, token_id
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.model import Identity, PodRef, Protocol

MAX_PAIRS = 4_096
"""Pairs of one endpoint; the flows of further ones have no lease."""
_RECENT_NONCES = 8
ANSWER_S = 0.1
"""The least time between two answers to one pair, seconds."""

PairKey = tuple[str, PodRef, bytes]
"""Trust domain, peer pod, and its packed address."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """The times of leases, seconds. Constants: nobody but a test chooses others."""

    lease_s: float = 30.0
    """Between two messages of one side."""
    silent_s: float = 60.0
    """Silence after which the peer is probed."""
    probe_s: float = 5.0
    """Between two such probes."""
    udp_lapse_s: float = UDP_LAPSE_S
    tcp_lapse_s: float = TCP_LAPSE_S
    suspicion_s: float = 1.0
    """How long a peer has to answer where another pod shows itself at its address."""


class Lapse(NamedTuple):
    """Flows that nobody stands for any longer."""

    peer: Identity
    address: bytes
    """Packed address of the peer."""
    protocols: frozenset[Protocol]


class Replaced(NamedTuple):
    """A peer pod that has presented another identity than its flows were evaluated by."""

    old: Identity
    new: Identity


LeaseEvent = Lapse | Replaced


class Pair:
    """What is known of one pair. For `Leases` alone."""

    __slots__ = ("answered_at", "candidate", "cleared_until", "heard", "heard_at", "identity", "key", "next_at",
                 "noted_at", "offered", "own", "peer", "protocols", "sent", "shown", "suspect_until", "tries",
                 "udp_lapsed", "worked")  # fmt: skip

    def __init__(self, key: PairKey, identity: Identity, own: bytes, now: float) -> None:
        self.key = key
        self.identity = identity
        """The one that its flows were evaluated by last."""
        self.own = own
        self.peer: Peer | None = None
        self.candidate: Peer | None = None
        """Whom a block showed that nothing has proven yet."""
        self.protocols: frozenset[Protocol] = frozenset()
        """Those with released flows."""
        self.noted_at = now
        """When a flow was released last, or found in the kernel."""
        self.sent: deque[tuple[bytes, float]] = deque(maxlen=_RECENT_NONCES)
        self.offered: deque[tuple[bytes, float]] = deque(maxlen=_RECENT_NONCES)
        """Likewise those in answers to what proved nothing: no flood of it may push out the others."""
        self.heard = NO_NONCE
        self.heard_at = now
        """Up to when the peer is known to have lived."""
        self.answered_at = -ANSWER_S
        self.worked = False
        """Whether a message of the pair ever came through."""
        self.shown = NO_ID
        """The id of the own token that the peer is known to know."""
        self.tries = 0
        """Messages since the last sign of life or confirmation."""
        self.next_at = now
        self.suspect_until: float | None = None
        """When it is decided whether the peer still has its address; None: nothing speaks against it."""
        self.cleared_until = 0.0
        """Until when an answer to such probes counts."""
        self.udp_lapsed = False
        """Whether the UDP flows have lapsed since the last sign of life."""

    @property
    def remote(self) -> bytes:
        return self.key[2]


class PairTable:
    """The pairs of one endpoint, by key and by the peer's address. One without released flows makes room."""

    __slots__ = ("_at", "_hits", "_pairs")

    def __init__(self, hits: LimitHits) -> None:
        self._hits = hits
        self._pairs: dict[PairKey, Pair] = {}
        self._at: dict[bytes, dict[PairKey, Pair]] = {}

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs.values())

    def get(self, key: PairKey) -> Pair | None:
        """Find a pair."""
        return self._pairs.get(key)

    def at(self, address: bytes) -> list[Pair]:
        """Return the pairs with pods that have, or had, an address."""
        siblings = self._at.get(address)
        return [] if siblings is None else list(siblings.values())

    def open(self, key: PairKey, identity: Identity, own: bytes, now: float) -> Pair | None:
        """Add a pair; None if all pairs that there may be have released flows."""
        if len(self._pairs) >= MAX_PAIRS:
            unused = next((pair for pair in self._pairs.values() if not pair.protocols), None)
            self._hits[Limit.LEASES] += 1
            if unused is None:
                return None
            self.close(unused)
        pair = Pair(key, identity, own, now)
        self._pairs[key] = pair
        self._at.setdefault(key[2], {})[key] = pair
        return pair

    def close(self, pair: Pair) -> None:
        """Forget a pair."""
        pair.next_at = -1.0
        del self._pairs[pair.key]
        siblings = self._at[pair.remote]
        del siblings[pair.key]
        if not siblings:
            del self._at[pair.remote]

    def peer(self, address: bytes, wanted: bytes) -> Peer | None:
        """Find the peer at an address whose token has an id."""
        for pair in self._at.get(address, {}).values():
            for peer in (pair.peer, pair.candidate):
                if peer is not None and token_id(peer.token_hash) == wanted:
                    return peer
        return None


def is_same_pod(one: Identity, other: Identity) -> bool:
    """Tell whether two identities are of one pod: by name, and by UID if both state one."""
    if (one.pod, one.trust_domain) != (other.pod, other.trust_domain):
        return False
    return one.uid == other.uid or not one.uid or not other.uid


def states_the_same(one: Identity, other: Identity) -> bool:
    """Tell whether two identities of a pod are the same to every policy."""
    return (one.labels, one.namespace_labels, one.service_account, one.named_ports) == (
        other.labels,
        other.namespace_labels,
        other.service_account,
        other.named_ports,
    )
