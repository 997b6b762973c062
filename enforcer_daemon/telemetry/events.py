# SPDX-License-Identifier: Apache-2.0
"""What is to be seen beside an object of the cluster: the same thing again is a count, and all of it is bounded.

Whoever notes something pays for a look-up and never waits; `kube/events.py` takes what is due and tells the API server.
A series is the same thing about the same object, as Kubernetes' own recorders have it: told when it begins, then at
most every so often with its count, and over after a silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import ip_address
from itertools import chain, zip_longest

from enforcer_daemon.datapath.context import FlowReport
from enforcer_daemon.handshake.fairtable import FairTable
from enforcer_daemon.model import Direction, protocol_name
from enforcer_daemon.ratelimiter import RateLimiter

END_S = 360.0
"""A series is over after so long a silence, seconds; that of Kubernetes' own recorders."""
MAX_SERIES = 1_024
"""Series of the node at a time. In a full table the namespace that has most gives one up to a namespace with fewer, so
that no tenant's denials hide another's."""
MAX_SERIES_PER_SUBJECT = 16
"""Series of one object, so that a scan or forged sources do not fill the table for all."""
_MAX_POLICIES = 10
"""Policies that a note names."""


class EventKind(Enum):
    """What Events are about: their `reason` and `action`."""

    FLOW_DENIED = ("FlowDenied", "Deny")
    POLICY_REFUSED = ("PolicyRefused", "Refuse")
    SERVICE_REFUSED = ("ServiceRefused", "Refuse")
    ADDRESS_NOT_VIRTUAL = ("AddressNotVirtual", "Ignore")
    IDENTITY_TOO_LARGE = ("IdentityTooLarge", "SignToken")
    POLICY_LIMIT_EXCEEDED = ("PolicyLimitExceeded", "Isolate")
    NOT_ENFORCED = ("NotEnforced", "Start")
    INTERFACE_TAKEN = ("InterfaceTaken", "Close")
    NODE_DENIED = ("NodeDenied", "Deny")

    def __init__(self, reason: str, action: str) -> None:
        self.reason = reason
        self.action = action


@dataclass(frozen=True, slots=True)
class Subject:
    """The object that an Event regards."""

    api_version: str
    kind: str
    namespace: str
    """Empty for what has none."""
    name: str
    uid: str
    """As `kubectl describe` asks for it: of a static pod its hash."""


@dataclass(frozen=True, slots=True)
class Notice:
    """One thing that is told."""

    subject: Subject
    kind: EventKind
    note: str
    is_shared: bool = False
    """Whether every node sees the same, so that one Event is enough for all."""


@dataclass(slots=True)
class Series:
    """A notice with its repetitions. The times are those of the book's clock."""

    notice: Notice
    what: Hashable
    """Tells the series of one subject apart."""
    first_at: float
    last_at: float
    due_at: float
    count: int = 1
    reported: int = 0
    """The count when the API server was last told, or could not be."""
    name: str = ""
    """The Event's, once there is one."""


@dataclass(frozen=True, slots=True)
class EventLimits:
    """How much the API server is told. Code and tests construct other values."""

    max_per_minute: float = 12.0
    """Requests about Events that the node makes in a minute (burst: the same number); more are counted only. Low,
    since all nodes of a cluster send theirs at once when a policy denies what all need."""
    max_per_minute_per_object: float = 4.0
    """The same about one pod or policy."""
    update_interval_s: float = 60.0
    """The shortest time between two updates of one Event's count, seconds."""


def _per_minute(rate: float, now: float) -> RateLimiter:
    return RateLimiter(rate / 60.0, max(1.0, rate), now)


@dataclass(slots=True)
class EventBook:
    """All series of the node. For the event loop's thread alone."""

    limits: EventLimits
    clock: Callable[[], float]
    """Monotonic seconds."""
    limited: int = 0
    """Things that were not told because there were too many others."""
    _series: FairTable[tuple[Subject, Hashable], Series] = field(
        default_factory=lambda: FairTable(MAX_SERIES, MAX_SERIES)
    )
    """By namespace."""
    _told_at: dict[str, float] = field(default_factory=dict)
    """When a series of a namespace was told last."""
    _counts: Counter[Subject] = field(default_factory=Counter)
    _by_subject: dict[Subject, RateLimiter] = field(default_factory=dict)
    _all: RateLimiter = field(init=False)

    def __post_init__(self) -> None:
        self._all = _per_minute(self.limits.max_per_minute, self.clock())

    def __len__(self) -> int:
        return len(self._series)

    def note(self, subject: Subject, what: Hashable, compose: Callable[[], Notice]) -> None:
        """Count something that happened; the notice is composed where it is the first of its series."""
        series = self._series.get((subject, what))
        if series is None:
            self._begin(subject, what, compose)
        else:
            series.count += 1
            series.last_at = self.clock()

    def note_state(self, subject: Subject, what: Hashable, compose: Callable[[], Notice]) -> None:
        """Take note of what still is so, which is no repetition."""
        series = self._series.get((subject, what))
        if series is None:
            self._begin(subject, what, compose)
        else:
            series.last_at = self.clock()

    def _begin(self, subject: Subject, what: Hashable, compose: Callable[[], Notice]) -> None:
        namespace = subject.namespace.encode()
        is_full = len(self._series) >= MAX_SERIES and self._series.count(namespace) + 1 >= self._series.most
        if is_full or self._counts[subject] >= MAX_SERIES_PER_SUBJECT:
            self.limited += 1
            return
        now = self.clock()
        evicted = self._series.put((subject, what), Series(compose(), what, now, now, now), namespace)
        self._counts[subject] += 1
        if evicted is not None:
            self.limited += evicted.value.reported < evicted.value.count
            self._uncount(evicted.value.notice.subject)

    def take_due(self) -> list[Series]:
        """Return what is to be told now, as many as the limits allow; it counts as told.

        Namespaces take turns, the one that was told least recently first.
        """
        now = self.clock()
        self._forget_ended(now)
        waiting: dict[str, list[Series]] = {}
        for series in self._series:
            if series.count > series.reported and series.due_at <= now:
                waiting.setdefault(series.notice.subject.namespace, []).append(series)
        turns = sorted(waiting, key=lambda namespace: self._told_at.get(namespace, float("-inf")))
        due = []
        for series in chain.from_iterable(zip_longest(*(waiting[namespace] for namespace in turns))):
            if series is not None and self._is_granted(series.notice.subject, now):
                series.reported, series.due_at = series.count, now + self.limits.update_interval_s
                self._told_at[series.notice.subject.namespace] = now
                due.append(series)
        return due

    def _is_granted(self, subject: Subject, now: float) -> bool:
        """Ask the object's limiter first: what it lacks must cost the others nothing."""
        own = self._by_subject.get(subject)
        if own is None:
            own = self._by_subject[subject] = _per_minute(self.limits.max_per_minute_per_object, now)
        if not own.take(now):
            return False
        if self._all.take(now):
            return True
        own.give_back()
        return False

    def _forget_ended(self, now: float) -> None:
        for series in list(self._series):
            if now - series.last_at < END_S:
                continue
            if series.reported < series.count:
                if now - series.last_at < 2 * END_S:
                    continue  # Its turn may still come.
                self.limited += 1
            subject = series.notice.subject
            self._series.pop((subject, series.what))
            self._uncount(subject)
            if not self._series.count(subject.namespace.encode()):
                self._told_at.pop(subject.namespace, None)

    def _uncount(self, subject: Subject) -> None:
        self._counts[subject] -= 1
        if not self._counts[subject]:
            del self._counts[subject]
            self._by_subject.pop(subject, None)


def note_denial(book: EventBook, subject: Subject, report: FlowReport) -> None:
    """Count a denied flow: of a pod, with one peer, in one direction, for one reason."""
    peer = report.remote if report.peer is None else report.peer.pod
    what = (report.direction, report.reason, peer)
    book.note(subject, what, lambda: Notice(subject, EventKind.FLOW_DENIED, denial_note(report)))


def denial_note(report: FlowReport) -> str:
    """Say of a denied flow who, where, why, and by which policies."""
    address = str(ip_address(report.remote)) if len(report.remote) in (4, 16) else "an unreadable address"
    peer = address if report.peer is None else f"{report.peer.pod} ({address})"
    protocol = protocol_name(report.protocol)
    port = "" if report.port is None else f" port {report.port}"
    way = "from" if report.direction is Direction.INGRESS else "to"
    policies = list(dict.fromkeys(f"{rule.namespace}/{rule.policy}" for rule in report.rules))
    more = f" and {len(policies) - _MAX_POLICIES} more" if len(policies) > _MAX_POLICIES else ""
    decided = f"; decided by {', '.join(policies[:_MAX_POLICIES])}{more}" if policies else ""
    detail = f"; {report.detail}" if report.detail else ""
    return f"{report.reason.value}: {report.direction.value} {way} {peer}, {protocol}{port}, denied{decided}{detail}"
