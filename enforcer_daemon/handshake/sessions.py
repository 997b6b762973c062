# SPDX-License-Identifier: Apache-2.0
"""The limited tables that sessions are kept in, and their timers. A session leaves its table by an event alone."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from enforcer_daemon.handshake.fairtable import Evicted, FairTable, Limit, LimitHits
from enforcer_daemon.handshake.flowkey import FlowKey, Role
from enforcer_daemon.handshake.session import NEVER, Session

Name = tuple[bytes, bytes, int, int | bytes]
"""A handshake by the remote end, the pod's address, and the offer's ISN or nonce: a sidecar may answer from another
port than was dialed."""
_MIN_TIMERS = 64


class SessionTable:
    """One endpoint's sessions of a protocol and role: unfinished up to limits, released ones while there is room."""

    def __init__(
        self, limits: tuple[int, int], max_settled: int, hits: LimitHits, names: dict[Name, Session] | None = None
    ) -> None:
        """`limits`: of unfinished sessions, in all and of one source. `hits` counts what evicts a released one.

        `names`: those of another table, if handshakes are to be found in either.
        """
        self._limits = limits
        self._unfinished: FairTable[Session, Session] = FairTable(*limits)
        self._max_settled = max_settled
        self._hits = hits
        self._settled: dict[Session, None] = {}
        self.by_key: dict[FlowKey, Session] = {}
        """Unfinished and released sessions."""
        self.get = self.by_key.get
        self.aliases: dict[FlowKey, Session] = {}
        """Sessions by the port from which a sidecar answers: what comes in for that port is no part of them."""
        self.names: dict[Name, Session] = {} if names is None else names

    def __len__(self) -> int:
        return len(self._unfinished)

    def add(self, session: Session) -> Evicted[Session] | None:
        """Keep an unfinished session under a free key; return one to evict, of its source or the greediest."""
        evicted = self._unfinished.put(session, session, session.source)
        key = session.key
        self.by_key[key] = session
        fresh = session.isn_i if session.facts.has_numbers else session.nonce_i
        if key.role is Role.RESPONDER and fresh != b"":
            session.name = key.remote, key.own, key.remote_port, fresh
            self.names[session.name] = session
        return evicted

    def named(self, key: FlowKey, fresh: int | bytes) -> Session | None:
        """Find the handshake with a peer's end by the offer's ISN or nonce, whichever of the pod's ports it is for."""
        return self.names.get((key.remote, key.own, key.remote_port, fresh))

    def __contains__(self, session: Session) -> bool:
        return self._unfinished.get(session) is not None

    def full(self, source: bytes) -> Limit | None:
        """Return the limit that leaves no room for one more unfinished session of a source, if there is none."""
        total, per_source = self._limits
        if self._unfinished.count(source) >= per_source:
            return Limit.HALF_OPEN_FLOWS_PER_SOURCE
        return Limit.HALF_OPEN_FLOWS if len(self._unfinished) >= total else None

    def add_alias(self, key: FlowKey, session: Session) -> None:
        """Let what the pod sends in a session be found under another key, if no other has it."""
        if self.aliases.setdefault(key, session) is session:
            session.alias = key

    def settle(self, session: Session) -> Session | None:
        """Count a session as unfinished no longer; return the released one that has to make room."""
        evicted = None
        if self._unfinished.pop(session) is not None:
            if len(self._settled) >= self._max_settled:
                self._hits[Limit.SETTLED_FLOWS] += 1
                evicted = next(iter(self._settled))
            self._settled[session] = None
        return evicted

    def remove(self, session: Session) -> None:
        """Take a session out."""
        if session in self._settled:
            del self._settled[session]
        else:
            self._unfinished.pop(session)
        if self.by_key.get(session.key) is session:
            del self.by_key[session.key]
        if session.alias is not None:
            del self.aliases[session.alias]
        if session.name is not None and self.names.get(session.name) is session:
            del self.names[session.name]

    def expired(self, now: float) -> Iterator[Session]:
        """Yield the unfinished sessions whose deadline has passed, oldest first; each must be taken out at once."""
        while (session := next(iter(self._unfinished), None)) is not None and session.deadline <= now:
            yield session

    def known(self) -> list[Session]:
        """Return all sessions."""
        return [*self._unfinished, *self._settled]


class Timers:
    """When sessions want to be woken. A session has one timer; to set it again replaces it."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Session]] = []
        self.is_set = False
        """Whether any session may want to be woken."""
        self._count = 0
        self._limit = _MIN_TIMERS

    def set(self, session: Session, at: float) -> None:
        """Wake a session at a time; NEVER cancels."""
        if at == session.wake_at:
            return
        session.wake_at = at
        if at == NEVER:
            return
        if len(self._due) >= self._limit:  # Most have been cancelled: the live ones are as many as unfinished sessions.
            self._due = [entry for entry in self._due if entry[2].wake_at == entry[0]]
            heapify(self._due)
            self._limit = max(_MIN_TIMERS, 2 * len(self._due))
        self._count += 1  # Sessions have no order among themselves.
        heappush(self._due, (at, self._count, session))
        self.is_set = True

    @property
    def next_at(self) -> float | None:
        """When the next session is due; None if none waits."""
        due = self._due
        while due:
            at, _, session = due[0]
            if session.wake_at == at:
                return at
            heappop(due)
        self.is_set = False
        return None

    def take(self, now: float) -> Iterator[Session]:
        """Yield the sessions that are due."""
        while (at := self.next_at) is not None and at <= now:
            session = heappop(self._due)[2]
            session.wake_at = NEVER
            yield session
