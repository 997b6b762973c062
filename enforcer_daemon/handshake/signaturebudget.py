# SPDX-License-Identifier: Apache-2.0
"""Who may cause the next signature check: an allowance for each source, and one for the node, the known first.

The node's allowance refills at a steady rate up to a burst. Who is unknown may only take from its upper half, who is
half known from the upper three quarters: what a flood of strangers leaves is always enough for those who rank higher.
A source address can be forged, and so can all that a stranger sends; a rank is earned by a token that was good.
"""

from __future__ import annotations

from collections import OrderedDict

from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.fairtable import Limit, LimitHits, source_of
from enforcer_daemon.handshake.limits import HandshakeLimits
from enforcer_daemon.ratelimiter import RateLimiter
from enforcer_daemon.reasons import Reason

_RESERVES = (0.5, 0.25, 0.0)
"""The part of the node's allowance that is kept for higher ranks, by rank."""
_LEAST_BURST = 4.0
"""So that the reserves leave something to every rank, whatever the rate."""


class TokenBucket:
    """So many of something a second, and as many at once; what is refused is counted."""

    __slots__ = ("_bound", "_hits", "_limiter")

    def __init__(self, rate: float, hits: LimitHits, bound: Limit) -> None:
        self._hits = hits
        self._bound = bound
        self._limiter = RateLimiter(rate)

    def take(self, now: float) -> bool:
        """Take one; tell whether there was one."""
        if self._limiter.take(now):
            return True
        self._hits[self._bound] += 1
        return False


class SignatureBudget:
    """The signature checks that a node will still make, for whom."""

    __slots__ = ("_hits", "_node", "_rate", "_source_rate", "_sources", "_sources_bound", "_trusted", "_trusted_bound")

    def __init__(self, settings: HandshakeLimits, hits: LimitHits) -> None:
        self._source_rate = settings.max_verifications_per_s
        self._rate = settings.max_total_verifications_per_s
        self._trusted_bound = settings.max_cached_peers
        self._sources_bound = settings.max_verification_sources
        self._hits = hits
        self._node = RateLimiter(self._rate, max(_LEAST_BURST, self._rate))
        self._sources: tuple[OrderedDict[bytes, RateLimiter], ...] = tuple(OrderedDict() for _ in _RESERVES)
        """By rank, so that forged packets of strangers do not use up what a source is granted for better ones."""
        self._trusted: OrderedDict[bytes, None] = OrderedDict()

    def trust(self, address: bytes) -> None:
        """Remember an address that a good token named, and came from: its next token will rank higher."""
        self._trusted[address] = None
        self._trusted.move_to_end(address)
        if len(self._trusted) > self._trusted_bound:
            self._trusted.popitem(last=False)
            self._hits[Limit.CACHED_PEERS] += 1

    def take(self, address: bytes, *, is_pod: bool, is_credential_known: bool, now: float) -> None:
        """Count one verification; raise PeerError where the source, or all of its rank, had as many as they may.

        A rank is 0 to 2: one for an address that is trusted, one for a node's credential that was verified before.
        """
        rank = (address in self._trusted) + is_credential_known
        source = source_of(address, is_pod=is_pod)
        of_rank = self._sources[rank]
        own = of_rank.pop(source, None) or RateLimiter(self._source_rate, now=now)
        of_rank[source] = own
        if not own.take(now):
            self._refuse(Limit.VERIFICATIONS_PER_SOURCE, f"more than {self._source_rate:g} new tokens a second")
        is_spent = not self._node.take(now, self._node.burst * _RESERVES[rank])
        if is_spent:
            own.give_back()
        if len(of_rank) > self._sources_bound:
            of_rank.popitem(last=False)  # The one that was asked for longest ago.
            self._hits[Limit.VERIFICATION_SOURCES] += 1
        if is_spent:
            self._refuse(Limit.VERIFICATIONS, f"the node makes {self._rate:g} a second; peers of rank {rank} wait")

    def _refuse(self, bound: Limit, detail: str) -> None:
        self._hits[bound] += 1
        raise PeerError(Reason.VERIFY_RATE, detail)
