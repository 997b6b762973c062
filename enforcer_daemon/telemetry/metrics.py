# SPDX-License-Identifier: Apache-2.0
"""The daemon's counters, in one object that is passed to those who count. Label sets are closed: never a pod's name."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from enforcer_daemon.model import Direction
from enforcer_daemon.reasons import Reason

_LATENCY_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)


class Metrics:
    """Everything that is counted, with a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        decisions = Counter(
            "enforcer_decisions",
            "Decisions on flows and packets, by direction, verdict and reason (docs/reasons.md).",
            ("direction", "verdict", "reason"),
            registry=self.registry,
        )
        self._decisions = {
            (direction, is_allowed, reason): decisions.labels(
                direction.value, "allow" if is_allowed else "deny", reason.value
            )
            for direction in Direction
            for is_allowed in (False, True)
            for reason in Reason
        }
        self.denials: dict[str, int] = {}
        """Denials by reason, for the status."""
        self.overruns = Counter(
            "enforcer_queue_overruns", "Times a queue's socket buffer was full (ENOBUFS).", registry=self.registry
        )
        self.endpoints = Gauge("enforcer_endpoints", "Pods enforced on this node.", registry=self.registry)
        self.snapshot_generation = Gauge(
            "enforcer_snapshot_generation", "Policy snapshots since the start.", registry=self.registry
        )
        self.refused_objects = Gauge(
            "enforcer_refused_objects", "Objects whose present version is refused.", registry=self.registry
        )
        self.update_seconds = Histogram(
            "enforcer_policy_update_seconds",
            "From a change's arrival to its being in force on all endpoints.",
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.registration_seconds = Histogram(
            "enforcer_registration_seconds", "Time to enforce a new endpoint.", buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )  # fmt: skip

    def count(self, direction: Direction, *, is_allowed: bool, reason: Reason) -> None:
        """Count one decision."""
        self._decisions[(direction, is_allowed, reason)].inc()
        if not is_allowed:
            self.denials[reason.value] = self.denials.get(reason.value, 0) + 1

    def render(self) -> str:
        """Give all metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()
