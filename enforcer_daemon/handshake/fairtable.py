# SPDX-License-Identifier: Apache-2.0
"""Bounded tables that are shared fairly: whoever takes most makes room, so that one source cannot fill them.

Max-min fairness by dropping from the longest queue, after B. Suter et al., "Design considerations for supporting TCP
with per-flow queueing" (INFOCOM 1998). A newcomer is never refused: the entry that makes room is the oldest one of the
greediest source, which in an honest network has long been finished.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

from enforcer_daemon.enums import with_plain_members


@with_plain_members
class Limit(Enum):
    """What can be full; the value is the label `limit` of trireme_limit_reached_total."""

    HALF_OPEN_FLOWS = "half-open-flows"
    HALF_OPEN_FLOWS_PER_SOURCE = "half-open-flows-per-source"
    HELD_PACKETS_PER_FLOW = "held-packets-per-flow"
    HELD_PACKETS = "held-packets"
    HELD_PACKETS_PER_SOURCE = "held-packets-per-source"
    VERIFICATIONS = "verifications"
    VERIFICATIONS_PER_SOURCE = "verifications-per-source"
    VERIFICATION_SOURCES = "verification-sources"
    CACHED_PEERS = "cached-peers"
    CACHED_CREDENTIALS = "cached-credentials"
    REFUSED_IDENTITIES = "refused-identities"
    NONCES = "nonces"
    SETTLED_FLOWS = "settled-flows"
    REPORTS = "reports"
    REHANDSHAKES = "rehandshakes"
    OWN_PACKETS = "own-packets"
    LEASES = "leases"

    __hash__ = object.__hash__  # Members are single objects; Enum's own hash is in Python.


LimitHits = dict[Limit, int]
"""How often each bound cost somebody an entry, a packet or a verification."""


def no_hits() -> LimitHits:
    """Begin to count."""
    return dict.fromkeys(Limit, 0)


_V6_HOSTS_BYTES = 8


def source_of(address: bytes, *, is_pod: bool) -> bytes:
    """Give what an address is accounted to: a pod is one address, other hosts of IPv6 choose theirs freely in a /64.

    The guard holds the pods of enforced nodes to their own addresses, and one node's pods often share a /64.
    """
    return address if is_pod or len(address) == 4 else address[:_V6_HOSTS_BYTES]


_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class Evicted(NamedTuple, Generic[_Value]):
    """What made room for a newcomer."""

    value: _Value
    is_own: bool
    """Whether the newcomer's source had all that one source may have; else the whole table was full."""


class FairTable(Generic[_Key, _Value]):
    """A dictionary in order of insertion, bounded in all and for each source; every operation takes constant time."""

    __slots__ = ("_by_count", "_by_source", "_entries", "_most", "_per_source", "_total")

    def __init__(self, total: int, per_source: int) -> None:
        self._total = total
        self._per_source = per_source
        self._entries: dict[_Key, tuple[_Value, bytes]] = {}
        self._by_source: dict[bytes, OrderedDict[_Key, None]] = {}
        self._by_count: dict[int, OrderedDict[bytes, None]] = {}
        """Sources by the number of their entries; no empty ones."""
        self._most = 0
        """The highest number of entries of one source."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[_Value]:
        """Give the values, oldest first."""
        return (value for value, _ in self._entries.values())

    def get(self, key: _Key) -> _Value | None:
        """Find an entry."""
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    @property
    def most(self) -> int:
        """The highest number of entries of one source."""
        return self._most

    def count(self, source: bytes) -> int:
        """Return how many entries a source has."""
        return len(self._by_source.get(source, ()))

    def put(self, key: _Key, value: _Value, source: bytes) -> Evicted[_Value] | None:
        """Keep an entry as the newest one; give what had to make room for it, if anything.

        An entry under the same key is replaced, and makes room for nobody else.
        """
        if key in self._entries:
            self.pop(key)
        own = self._by_source.get(source)
        count = 0 if own is None else len(own)
        evicted: Evicted[_Value] | None = None
        if count >= self._per_source or len(self._entries) >= self._total:
            is_own = count >= self._per_source
            greediest = source if count and (is_own or count >= self._most) else next(iter(self._by_count[self._most]))
            evicted = Evicted(self._evict(greediest), is_own)
            own = self._by_source.get(source)
            count = 0 if own is None else len(own)
        if own is None:
            own = self._by_source[source] = OrderedDict()  # Finds its first entry in constant time; a dict does not.
        own[key] = None
        self._entries[key] = value, source
        self._recount(source, count, count + 1)
        return evicted

    def replace(self, key: _Key, value: _Value) -> None:
        """Change an entry's value in its place, if there is such an entry."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries[key] = value, entry[1]

    def pop(self, key: _Key) -> _Value | None:
        """Take an entry out."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        value, source = entry
        own = self._by_source[source]
        del own[key]
        if not own:
            del self._by_source[source]
        self._recount(source, len(own) + 1, len(own))
        return value

    def _evict(self, source: bytes) -> _Value:
        key = next(iter(self._by_source[source]))
        value = self._entries[key][0]
        self.pop(key)
        return value

    def _recount(self, source: bytes, before: int, after: int) -> None:
        """Move a source between counts that differ by one."""
        by_count = self._by_count
        if before:
            peers = by_count[before]
            if len(peers) == 1 and after and after not in by_count:  # Alone before and after: as a busy source is.
                del by_count[before]
                by_count[after] = peers
                if before == self._most:
                    self._most = after
                return
            del peers[source]
            if not peers:
                del by_count[before]
                if before == self._most:
                    self._most = after  # One less is where it goes; one more is set below.
        if after:
            by_count.setdefault(after, OrderedDict())[source] = None
            if after > self._most:
                self._most = after
