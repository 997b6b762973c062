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

from enforcer_daemon.datapath.context import FlowReport
from enforcer_daemon.model import Direction, protocol_name
from enforcer_daemon.settings import EventSettings

END_S = 360.0
"""A series is over after so long a silence, seconds; that of Kubernetes' own recorders."""
MAX_SERIES = 1_024
"""Series of the node at a time."""
MAX_SERIES_PER_SUBJECT = 16
"""Series of one object, so that a scan or forged sources do not fill the table for all."""
_MAX_POLICIES = 10
"""Policies that a note names."""


class EventKind(Enum):
    """What Events are about: their `reason` and `action`."""

    FLOW_DENIED = ("FlowDenied", "Deny")
    POLICY_REFUSED = ("PolicyRefused", "Refuse")
    IDENTITY_TOO_LARGE = ("IdentityTooLarge", "SignToken")
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
    first_at: float
    last_at: float
    due_at: float
    count: int = 1
    told: int = 0
    """The count when the API server was last told, or could not be."""
    name: str = ""
    """The Event's, once there is one."""


@dataclass(slots=True)
class _Allowance:
    left: float
    since: float

    def take(self, per_minute: float, now: float) -> bool:
        burst = max(1.0, per_minute)
        self.left = min(burst, self.left + (now - self.since) * per_minute / 60.0)
        self.since = now
        if self.left < 1.0:
            return False
        self.left -= 1.0
        return True


@dataclass(slots=True)
class EventBook:
    """All series of the node. For the event loop's thread alone."""

    settings: EventSettings
    clock: Callable[[], float]
    """Monotonic seconds."""
    limited: int = 0
    """Things that were not told because there were too many others."""
    _series: dict[tuple[Subject, Hashable], Series] = field(default_factory=dict)
    _counts: Counter[Subject] = field(default_factory=Counter)
    _allowances: dict[Subject, _Allowance] = field(default_factory=dict)
    _allowance: _Allowance = field(default_factory=lambda: _Allowance(float("inf"), 0.0))

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
        if len(self._series) >= MAX_SERIES or self._counts[subject] >= MAX_SERIES_PER_SUBJECT:
            self.limited += 1
            return
        now = self.clock()
        self._series[subject, what] = Series(compose(), now, now, now)
        self._counts[subject] += 1

    def take_due(self) -> list[Series]:
        """Give what is to be told now, as many as may be; it counts as told."""
        now = self.clock()
        self._forget_ended(now)
        due = []
        for series in self._series.values():
            if series.count > series.told and series.due_at <= now and self._is_granted(series.notice.subject, now):
                series.told, series.due_at = series.count, now + self.settings.repeat_s
                due.append(series)
        return due

    def _is_granted(self, subject: Subject, now: float) -> bool:
        """Ask the object's allowance first: what it lacks must cost the others nothing."""
        own = self._allowances.setdefault(subject, _Allowance(float("inf"), now))
        if not own.take(self.settings.max_per_minute_per_object, now):
            return False
        if self._allowance.take(self.settings.max_per_minute, now):
            return True
        own.left += 1.0
        return False

    def _forget_ended(self, now: float) -> None:
        for key, series in list(self._series.items()):
            if now - series.last_at < END_S:
                continue
            if series.told < series.count:
                if now - series.last_at < 2 * END_S:
                    continue  # Its turn may still come.
                self.limited += 1
            del self._series[key]
            self._counts[key[0]] -= 1
            if not self._counts[key[0]]:
                del self._counts[key[0]]
                self._allowances.pop(key[0], None)


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
