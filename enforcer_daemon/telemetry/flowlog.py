# SPDX-License-Identifier: Apache-2.0
"""Decisions as log lines and as a short memory of denials; what a peer can trigger is written once, then counted."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address

from enforcer_daemon.datapath.context import FlowReport
from enforcer_daemon.model import Direction, PodRef, protocol_name
from enforcer_daemon.reasons import Reason
from enforcer_daemon.telemetry.logs import Logger
from enforcer_daemon.telemetry.metrics import DecisionKind, Metrics

QUIET_S = 10.0
"""A denial that repeats is written again after this time, with the number of those in between, seconds."""
_MAX_TRACKED = 256
"""Different denials of one endpoint that are told apart, and so the most lines in QUIET_S."""
_MAX_RECENT = 50
"""Denials of one endpoint that `triremectl endpoints` can show."""

_Kind = tuple[Direction, bytes, int | None, int, Reason]


@dataclass(slots=True)
class _Repetition:
    written_at: float
    count: int = 0


@dataclass(frozen=True, slots=True)
class Denial:
    """A denial as operators see it."""

    when: float
    """Unix seconds."""
    direction: str
    peer: str
    address: str
    port: int | None
    protocol: int
    reason: str
    rules: tuple[str, ...]
    detail: str

    def as_json(self) -> dict[str, object]:
        """Return the fields for the admin socket."""
        return {
            "when": datetime.fromtimestamp(self.when, UTC).isoformat(),
            "direction": self.direction,
            "peer": self.peer,
            "address": self.address,
            "port": self.port,
            "protocol": self.protocol,
            "reason": self.reason,
            "rules": list(self.rules),
            "detail": self.detail,
        }


class FlowLog:
    """The decisions of one endpoint."""

    def __init__(
        self,
        pod: PodRef,
        log: Logger,
        metrics: Metrics,
        wall_clock: Callable[[], float],
        on_denial: Callable[[FlowReport], None] | None = None,
    ) -> None:
        """`on_denial` is told of every denial, as often as packets come; it must not wait."""
        self._on_denial = on_denial
        self._pod = str(pod)
        self._log = log
        self._metrics = metrics
        self._wall_clock = wall_clock
        self._repetitions: dict[_Kind, _Repetition] = {}
        self._unwritten = 0
        self._recent: deque[tuple[FlowReport, float]] = deque(maxlen=_MAX_RECENT)
        self._counts: dict[DecisionKind, int] = {}
        self._is_debug = log.is_enabled_for(logging.DEBUG)

    @property
    def recent(self) -> list[Denial]:
        """The last denials, oldest first; written out only when somebody asks, since a flood is many of them."""
        return [_denial(report, when) for report, when in self._recent]

    def counts(self) -> dict[str, int]:
        """Return the number of decisions by reason."""
        totals: dict[str, int] = {}
        for (_, _, reason), count in self._counts.items():
            totals[reason.value] = totals.get(reason.value, 0) + count
        return totals

    def take(self, reports: Iterable[FlowReport]) -> None:
        """Count, remember and write decisions."""
        own, all_decisions = self._counts, self._metrics.decisions
        for report in reports:
            kind = (report.direction, report.is_allowed, report.reason)
            own[kind] = own.get(kind, 0) + 1
            all_decisions[kind] = all_decisions.get(kind, 0) + 1
            if not report.is_allowed:
                self._take_denial(report)
            elif self._is_debug:
                self._log.debug("flow allowed", **self._fields(report))

    def _take_denial(self, report: FlowReport) -> None:
        now = self._wall_clock()
        self._recent.append((report, now))
        if self._on_denial is not None:
            self._on_denial(report)
        kind = (report.direction, report.remote, report.port, report.protocol, report.reason)
        repetition = self._repetitions.get(kind)
        if repetition is not None and now - repetition.written_at < QUIET_S:
            repetition.count += 1
            return
        if not self._make_room(kind, now):
            self._unwritten += 1
            return
        extra = {} if repetition is None or not repetition.count else {"repeated": repetition.count}
        if self._unwritten:
            extra["unwritten"], self._unwritten = self._unwritten, 0
        self._repetitions[kind] = _Repetition(now)
        write = self._log.error if report.reason is Reason.INTERNAL_ERROR else self._log.info
        write("flow denied", **self._fields(report), **extra)

    def _make_room(self, kind: _Kind, now: float) -> bool:
        """Take a kind out to be put last again; False where as many were written of late as may be.

        Without that bound a scan of ports, or of forged sources, would be a line for each packet.
        """
        if self._repetitions.pop(kind, None) is not None or len(self._repetitions) < _MAX_TRACKED:
            return True
        oldest = next(iter(self._repetitions))
        if 0 <= now - self._repetitions[oldest].written_at < QUIET_S:
            return False
        del self._repetitions[oldest]
        return True

    def _fields(self, report: FlowReport) -> dict[str, object]:
        denial = _denial(report, 0.0)
        fields: dict[str, object] = {
            "pod": self._pod,
            "direction": denial.direction,
            "address": denial.address,
            "port": denial.port,
            "protocol": protocol_name(denial.protocol),
            "reason": denial.reason,
            "rules": list(denial.rules),
        }
        if denial.peer:
            fields["peer"] = denial.peer
        if denial.detail:
            fields["detail"] = denial.detail
        return fields


def _denial(report: FlowReport, when: float) -> Denial:
    return Denial(
        when=when,
        direction=report.direction.value,
        peer="" if report.peer is None else str(report.peer.pod),
        address=str(ip_address(report.remote)) if len(report.remote) in (4, 16) else "",
        port=report.port,
        protocol=report.protocol,
        reason=report.reason.value,
        rules=tuple(str(rule) for rule in report.rules),
        detail=report.detail,
    )
