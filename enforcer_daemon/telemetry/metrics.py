# SPDX-License-Identifier: Apache-2.0
"""The daemon's metrics, in one object that is passed to those who count. Label sets are closed: never a pod's name.

Names follow https://prometheus.io/docs/practices/naming/: the prefix `trireme_`, base units, `_total` for counters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

from enforcer_daemon.handshake.fairtable import Limit
from enforcer_daemon.model import Direction
from enforcer_daemon.reasons import Reason

LOST_CAUSES = {"queue": "queue-full", "buffer": "buffer-full", "limit": "packet-rate"}
"""The label `cause` of each field of LostPackets."""
_LATENCY_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)


DecisionKind = tuple[Direction, bool, Reason]


class _DecisionCollector(Collector):
    """Turns the plain numbers into a metric when somebody asks."""

    def __init__(self, decisions: dict[DecisionKind, int]) -> None:
        self._decisions = decisions

    def collect(self) -> Iterator[CounterMetricFamily]:
        metric = CounterMetricFamily(
            "trireme_decisions",
            "Decisions on flows and packets, by reason (triremectl reasons).",
            labels=("direction", "decision", "reason"),
        )
        for (direction, is_allowed, reason), count in self._decisions.items():
            metric.add_metric((direction.value, "allow" if is_allowed else "deny", reason.value), count)
        yield metric


class _LimitCollector(Collector):
    """Likewise for limits that were reached."""

    def __init__(self, hits: Mapping[Limit, int]) -> None:
        self._hits = hits

    def collect(self) -> Iterator[CounterMetricFamily]:
        metric = CounterMetricFamily(
            "trireme_limit_reached",
            "Times that a limit evicted an entry, dropped a packet or refused a verification.",
            labels=("limit",),
        )
        for limit, count in self._hits.items():
            metric.add_metric((limit.value,), count)
        yield metric


class _GuardCollector(Collector):
    """Likewise for what the guard counts in the kernel."""

    def __init__(self, drops: Mapping[str, int]) -> None:
        self._drops = drops

    def collect(self) -> Iterator[CounterMetricFamily]:
        metric = CounterMetricFamily(
            "trireme_guard_dropped_packets",
            "Packets that the host rules (guard) dropped since they were applied.",
            labels=("reason",),
        )
        for reason, count in self._drops.items():
            metric.add_metric((reason,), count)
        yield metric


class Metrics:
    """Everything that is counted, with a registry of its own."""

    def __init__(self, limit_hits: Mapping[Limit, int] = MappingProxyType({})) -> None:
        """Expose, with the metrics that are kept here, what the datapath counts itself."""
        # Else each counter has a second series. The library has only this global switch.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.limit_hits = limit_hits
        self.registry.register(_LimitCollector(limit_hits))
        self.decisions: dict[DecisionKind, int] = {}
        """Decisions by direction, whether allowed, and reason. Plain numbers: two are counted in every connection."""
        self.registry.register(_DecisionCollector(self.decisions))
        self.lost_packets = Counter(
            "trireme_queue_dropped_packets",
            "Packets that the kernel dropped before the enforcer read them.",
            labelnames=("cause",),
            registry=self.registry,
        )
        for cause in LOST_CAUSES.values():
            self.lost_packets.labels(cause)
        self.ended_flows = Counter(
            "trireme_ended_flows",
            "Established flows that a change of policy or labels no longer allows.",
            registry=self.registry,
        )
        self.half_open_flows = Gauge(
            "trireme_half_open_flows", "Unfinished handshakes of all pods.", registry=self.registry
        )
        self.held_packets = Gauge(
            "trireme_held_packets", "Packets of all pods that wait for a proof.", registry=self.registry
        )
        self.repaired_rules = Counter(
            "trireme_repaired_rules",
            "Times that rules were repaired that another program had changed or removed.",
            ("place",),
            registry=self.registry,
        )
        for place in ("node", "pod"):
            self.repaired_rules.labels(place)
        self.endpoints = Gauge("trireme_endpoints", "Pods enforced on this node.", registry=self.registry)
        self.unenforced_pods = Gauge(
            "trireme_unenforced_pods",
            "Pods of this node that have an address and never registered: from before the enforcer, or past it.",
            ["started"],
            registry=self.registry,
        )
        for started in ("before", "past"):
            self.unenforced_pods.labels(started)
        self.closed_endpoints = Gauge(
            "trireme_closed_endpoints",
            "Pods that nothing passes to or from, since something takes their interface from their IP stack.",
            registry=self.registry,
        )
        self.snapshot_generation = Gauge(
            "trireme_snapshot_generation",
            "Number of the policy snapshot in force, counted from the start.",
            registry=self.registry,
        )
        self.refused_objects = Gauge(
            "trireme_refused_objects",
            "Problems with refused objects, by which version is in force instead.",
            ("in_force",),
            registry=self.registry,
        )
        self.count_refused(0, 0)
        self.guard_drops: dict[str, int] = {}
        """Packets that the guard dropped, by reason, as of the last look at the kernel."""
        self.registry.register(_GuardCollector(self.guard_drops))
        self.update_seconds = Histogram(
            "trireme_policy_update_duration_seconds",
            "Time from the arrival of a change until it is in force on all endpoints.",
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.registration_seconds = Histogram(
            "trireme_registration_duration_seconds",
            "Time to enforce a new endpoint (CNI ADD).",
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._open_of_leases()
        self._open_of_cluster()

    def _open_of_leases(self) -> None:
        """Expose what became of the leases of pairs of pods."""
        self.lapsed_flows = Counter(
            "trireme_lapsed_flows",
            "Established flows that ended because their peer's enforcer fell silent (leases).",
            registry=self.registry,
        )
        self.unanswered_leases = Gauge(
            "trireme_unanswered_leases",
            "Pairs of pods with flows whose lease messages never came through; silence does not end their flows.",
            registry=self.registry,
        )

    def _open_of_cluster(self) -> None:
        """Expose what only a node of a cluster has."""
        self.events = Counter(
            "trireme_kubernetes_events",
            "Events for the API server, by result.",
            ("result",),
            registry=self.registry,
        )
        for result in ("sent", "failed", "limited"):
            self.events.labels(result)
        self.placement = Counter(
            "trireme_placement_checks",
            "Look-ups of pods that other nodes' tokens name, by result.",
            ("result",),
            registry=self.registry,
        )
        for result in ("here", "elsewhere", "absent", "unknown", "skipped", "refused"):
            self.placement.labels(result)
        self.denied_nodes = Gauge(
            "trireme_denied_nodes", "Nodes that are denied for false claims.", registry=self.registry
        )
        self._watch_up = Gauge(
            "trireme_watch_up", "Whether a kind is watched at the API server.", ("resource",), registry=self.registry
        )
        self._watch_silence = Gauge(
            "trireme_watch_silence_seconds",
            "Time since the last message of the API server about a kind, bookmarks included.",
            ("resource",),
            registry=self.registry,
        )

    def watch(self, resource: str, is_up: Callable[[], bool], silence_s: Callable[[], float]) -> None:
        """Expose a watch; both functions are called at each scrape."""
        self._watch_up.labels(resource).set_function(is_up)
        self._watch_silence.labels(resource).set_function(silence_s)

    def count_refused(self, earlier: int, none: int) -> None:
        """Take over how many problems there are with objects, with and without an earlier version in force."""
        self.refused_objects.labels("earlier").set(earlier)
        self.refused_objects.labels("none").set(none)

    def denials(self) -> dict[str, int]:
        """Return the number of denials by reason."""
        totals: dict[str, int] = {}
        for (_, is_allowed, reason), count in self.decisions.items():
            if not is_allowed:
                totals[reason.value] = totals.get(reason.value, 0) + count
        return totals

    def render(self) -> str:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()
