# SPDX-License-Identifier: Apache-2.0
"""SYNs for the ports of a connection that is under way or released: the pod's kernel decides between the two.

A SYN proves nothing, whatever identity it shows, so it ends nothing. It is delivered. To a live connection the pod's
kernel answers with a challenge ACK (RFC 5961, section 4), and all stays as it is. Its SYN-ACK shows that the earlier
connection is gone; the number that it acknowledges names the SYN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.bounds import Bound, BoundHits, FairTable
from enforcer_daemon.handshake.flows import ResponderFlow
from enforcer_daemon.handshake.machine import State
from enforcer_daemon.packet.tcp import Segment
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import DROP, Verdict

MAX_RIVALS, MAX_RIVALS_PER_SOURCE = 1_024, 64
"""SYNs of one endpoint that wait for its kernel's choice, in all and of one peer. Beyond them a SYN is dropped: a rival
that was evicted could be answered unseen, under the release of the earlier connection."""
RIVAL_S = 5.0
"""How long a SYN is kept, seconds. A kernel that answers a SYN does so at once."""
_NUMBERS = 0xFFFF_FFFF


class PlainRival(NamedTuple):
    """A SYN without an identity that policy allows, or one that it allows no longer."""

    key: bytes
    release: Verdict
    judged: None = None


Rival = ResponderFlow | PlainRival


class _Kept(NamedTuple):
    name: bytes
    until: float
    source: bytes
    rival: Rival


class Rivals:
    """The rivals of one endpoint, by remote end and ISN: a sidecar may answer from another port than was dialled."""

    __slots__ = ("_hits", "_table")

    def __init__(self, hits: BoundHits) -> None:
        self._hits = hits
        self._table: FairTable[bytes, _Kept] = FairTable(MAX_RIVALS, MAX_RIVALS_PER_SOURCE)

    def __len__(self) -> int:
        return len(self._table)

    def add(self, segment: Segment, rival: Rival, source: bytes, now: float) -> None:
        """Keep a SYN, accounted to the peer's address; raise PeerError if there is no room."""
        while (oldest := next(iter(self._table), None)) is not None and oldest.until <= now:
            self._table.pop(oldest.name)
        is_own = self._table.count(source) >= MAX_RIVALS_PER_SOURCE
        if is_own or len(self._table) >= MAX_RIVALS:
            bound = Bound.HALF_OPEN_FLOWS_PER_SOURCE if is_own else Bound.HALF_OPEN_FLOWS
            self._hits[bound] += 1
            raise PeerError(Reason.FLOW_TABLE_FULL, "SYNs for ports of released connections")
        name = _name(rival.key, segment.seq)
        self._table.put(name, _Kept(name, now + RIVAL_S, source, rival), source)

    def has(self, key: bytes, segment: Segment, syn_hash: bytes) -> bool:
        """Tell whether this very SYN is known: it is a retransmission."""
        kept = self._table.get(_name(key, segment.seq))
        rival = None if kept is None else kept.rival
        return isinstance(rival, ResponderFlow) and rival.key == key and rival.offer.syn_hash == syn_hash

    def take(self, key: bytes, segment: Segment) -> Rival | None:
        """Take out the SYN that the pod's SYN-ACK answers."""
        kept = self._table.pop(_name(key, segment.ack - 1))
        return None if kept is None else kept.rival

    def known(self) -> list[Rival]:
        """Return all that wait for the kernel's choice."""
        return [kept.rival for kept in self._table]

    def refuse(self, is_denied: Callable[[Rival], bool]) -> None:
        """Let the pod's answer to a SYN that policy no longer allows not leave."""
        for kept in [kept for kept in self._table if is_denied(kept.rival)]:
            self._table.put(kept.name, kept._replace(rival=PlainRival(kept.rival.key, DROP)), kept.source)


def is_same_attempt(flow: ResponderFlow, segment: Segment) -> bool:
    """Tell whether a SYN is that of a handshake under way with another frame: the peer's enforcer has restarted."""
    return flow.offer.isn == segment.seq and flow.state is not State.RELEASED


def answers(flow: ResponderFlow, segment: Segment) -> bool:
    """Tell whether a SYN-ACK belongs to a handshake, by its numbers."""
    is_proven = flow.state in (State.PROVEN, State.RELEASED)
    return segment.ack == (flow.offer.isn + 1) & _NUMBERS and (not is_proven or segment.seq == flow.isn_r)


def _name(key: bytes, isn: int) -> bytes:
    return key[:-2] + (isn & _NUMBERS).to_bytes(4, "big")
