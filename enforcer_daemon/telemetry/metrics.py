# SPDX-License-Identifier: Apache-2.0
"""The daemon's counters, in one object that is passed to those who count. Label sets are closed: never a pod's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

from enforcer_daemon.handshake.bounds import Bound
from enforcer_daemon.model import Direction
from enforcer_daemon.reasons import Reason

_LATENCY_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)


DecisionKind = tuple[Direction, bool, Reason]


class _DecisionCollector(Collector):
    """Turns the plain numbers into a metric when somebody asks."""

    def __init__(self, decisions: dict[DecisionKind, int]) -> None:
        self._decisions = decisions

    def collect(self) -> Iterator[CounterMetricFamily]:
        metric = CounterMetricFamily(
            "enforcer_decisions",
            "Decisions on flows and packets, by direction, verdict and reason (triremectl reasons).",
            labels=("direction", "verdict", "reason"),
        )
        for (direction, is_allowed, reason), count in self._decisions.items():
            metric.add_metric((direction.value, "allow" if is_allowed else "deny", reason.value), count)
        yield metric


class _BoundCollector(Collector):
    """Likewise for bounds that were reached."""

    def __init__(self, hits: Mapping[Bound, int]) -> None:
        self._hits = hits

    def collect(self) -> Iterator[CounterMetricFamily]:
        metric = CounterMetricFamily(
            "enforcer_bound_hits",
            "How often a bound cost somebody an entry, a packet or a verification.",
            labels=("bound",),
        )
        for bound, count in self._hits.items():
            metric.add_metric((bound.value,), count)
        yield metric


class _GuardCollector(Collector):
    """Likewise for what the guard counts in the kernel."""

    def __init__(self, drops: Mapping[str, int]) -> None:
        self._drops = drops

    def collect(self) -> Iterator[CounterMetricFamily]:
        metric = CounterMetricFamily(
            "enforcer_guard_drops",
            "Packets that the guard on the node dropped since its tables were made.",
            labels=("reason",),
        )
        for reason, count in self._drops.items():
            metric.add_metric((reason,), count)
        yield metric


class Metrics:
    """Everything that is counted, with a registry of its own."""

    def __init__(self, bound_hits: Mapping[Bound, int] = MappingProxyType({})) -> None:
        """Expose, with the metrics that are kept here, what the datapath counts itself."""
        self.registry = CollectorRegistry()
        self.bound_hits = bound_hits
        self.registry.register(_BoundCollector(bound_hits))
        self.decisions: dict[DecisionKind, int] = {}
        """Decisions by direction, whether allowed, and reason. Plain numbers: two are counted in every connection."""
        self.registry.register(_DecisionCollector(self.decisions))
        self.lost_packets = Counter(
            "enforcer_lost_packets",
            "Packets that the kernel dropped before they were judged: queue or buffer was full, or they came too fast.",
            labelnames=("where",),
            registry=self.registry,
        )
        self.ended_flows = Counter(
            "enforcer_ended_flows", "Established flows that a change no longer allowed.", registry=self.registry
        )
        self.half_open_flows = Gauge(
            "enforcer_half_open_flows", "Unfinished handshakes of all pods.", registry=self.registry
        )
        self.held_packets = Gauge(
            "enforcer_held_packets", "Packets of all pods that wait for proofs.", registry=self.registry
        )
        self.restored_rules = Counter(
            "enforcer_restored_rules",
            "Times that rules were put back which somebody else had taken away.",
            ("place",),
            registry=self.registry,
        )
        for place in ("node", "pod"):
            self.restored_rules.labels(place)
        self.endpoints = Gauge("enforcer_endpoints", "Pods enforced on this node.", registry=self.registry)
        self.snapshot_generation = Gauge(
            "enforcer_snapshot_generation", "Policy snapshots since the start.", registry=self.registry
        )
        self.refused_objects = Gauge(
            "enforcer_refused_objects",
            "Problems with objects, by whether an earlier version is in force instead.",
            ("in_force",),
            registry=self.registry,
        )
        self.count_refused(0, 0)
        self.guard_drops: dict[str, int] = {}
        """Packets that the guard dropped, by reason, as of the last look at the kernel."""
        self.registry.register(_GuardCollector(self.guard_drops))
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
        self._open_of_leases()
        self._open_of_cluster()

    def _open_of_leases(self) -> None:
        """Expose what became of the leases of pairs of pods."""
        self.lapsed_flows = Counter(
            "trireme_lapsed_flows",
            "Established flows that ended because their peer fell silent.",
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
            "enforcer_kubernetes_events",
            "Events for the API server, by what became of them.",
            ("result",),
            registry=self.registry,
        )
        for result in ("sent", "failed", "limited"):
            self.events.labels(result)
        self.placement = Counter(
            "enforcer_placement_checks",
            "Look-ups of pods that other nodes' tokens name, by what was found.",
            ("result",),
            registry=self.registry,
        )
        for result in ("here", "elsewhere", "absent", "unknown", "skipped", "refused"):
            self.placement.labels(result)
        self.denied_nodes = Gauge(
            "enforcer_denied_nodes", "Nodes that are not believed because of false claims.", registry=self.registry
        )
        self._watch_up = Gauge(
            "enforcer_watch_up", "Whether a kind is followed at the API server.", ("resource",), registry=self.registry
        )
        self._watch_silence = Gauge(
            "enforcer_watch_silence_seconds",
            "Since the API server last said something about a kind, bookmarks included.",
            ("resource",),
            registry=self.registry,
        )

    def watch(self, resource: str, is_up: Callable[[], bool], silence_s: Callable[[], float]) -> None:
        """Show a watch; both are asked when somebody looks."""
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
