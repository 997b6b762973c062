# SPDX-License-Identifier: Apache-2.0
"""What the daemon tells operators over the admin socket, as values that JSON can hold."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import structlog
from cryptography import x509

from enforcer_daemon.daemon.clusterstate import CompiledState
from enforcer_daemon.daemon.endpoint import Endpoint
from enforcer_daemon.daemon.kernel import Kernel
from enforcer_daemon.daemon.node import Node
from enforcer_daemon.daemon.placement import PlacementGuard
from enforcer_daemon.daemon.policylimits import PolicyLimits
from enforcer_daemon.daemon.registrar import Registrar
from enforcer_daemon.daemon.unenforced import MAX_NAMED, UnenforcedPods
from enforcer_daemon.dataplane.guard_links import passed_by_tc
from enforcer_daemon.dataplane.guard_vouched import NOT_CLAIMED
from enforcer_daemon.dataplane.queuecounters import LostPackets
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.identity.credential import vouched_domain
from enforcer_daemon.model import Direction
from enforcer_daemon.reasons import Reason
from enforcer_daemon.registration.admin import AdminError, Command
from enforcer_daemon.registration.server import Availability
from enforcer_daemon.settings import NetworkSettings, Settings
from enforcer_daemon.settings_effects import warnings_of
from enforcer_daemon.telemetry.metrics import Metrics

_log = structlog.get_logger(__name__)


class Status:
    """Answers the commands of the admin socket."""

    def __init__(
        self,
        settings: Settings,
        node: Node,
        registrar: Registrar,
        metrics: Metrics,
        kernel: Kernel,
        limits: PolicyLimits,
    ) -> None:
        self._settings = settings
        self._node = node
        self._registrar = registrar
        self._endpoints = registrar.endpoints
        self._metrics = metrics
        self._kernel = kernel
        self._limits = limits
        self._since = time.time()
        self.cluster: CompiledState | None = None
        self.unenforced: UnenforcedPods | None = None
        self.placement: PlacementGuard | None = None
        """Where placement is looked up."""

    def commands(self) -> Mapping[str, Command]:
        """Return the commands by name."""
        return {
            "status": self._status,
            "endpoints": self._list_endpoints,
            "metrics": self._render_metrics,
            "trust": self._trust,
        }

    async def _status(self, arguments: dict[str, Any]) -> object:
        _require_no_arguments(arguments)
        readiness, cluster = self._registrar.readiness(), self._registrar.cluster
        credential = self._node.keys.credential
        return {
            "node": self._settings.node,
            "version": version("trireme"),
            "trust_domain": self._settings.trust_domain,
            "since": _time(self._since),
            "ready": readiness.availability is Availability.READY,
            "detail": readiness.detail,
            "snapshot": self._snapshot(),
            "rules_backend": self._kernel.backend.name,
            "guard": await self._guard(),
            "deny_with": self._settings.deny_with.value,
            "credential": {
                "subject": f"spiffe://{credential.trust_domain}/node/{credential.node}",
                "issuer": credential.certificate.issuer.rfc4514_string(),
                "not_after": _time(credential.not_after),
                "renewed_at": _time(self._node.keys.renew_at),
            },
            "bundle": [_describe_authority(authority) for authority in self._node.keys.bundle.authorities],
            "key_problems": self._node.key_problems(),
            "networks": _describe_networks(self._settings.networks if cluster is None else cluster.networks()),
            "setting_warnings": list(warnings_of(self._settings)),
            "cluster": None if cluster is None else cluster.status(),
            "denied_nodes": [] if self.placement is None else self.placement.denied(),
            "endpoints": len(self._endpoints),
            "unenforced_pods": self._name_unenforced(),
            "closed_endpoints": {
                str(endpoint.identity.pod): endpoint.closed for endpoint in self._endpoints if endpoint.closed
            },
            "pods_without_labels": [
                str(endpoint.identity.pod) for endpoint in self._endpoints if self._is_bare(endpoint)
            ],
            "verifications": self._node.verifier.verifications,
            "drops": self._metrics.denials(),
            "limits_reached": {limit.value: count for limit, count in self._metrics.limit_hits.items() if count},
        }

    def _name_unenforced(self) -> object:
        """Name the pods that run without an enforcer; not all of very many."""
        found = self.unenforced
        lists = {} if found is None else {"before": found.earlier, "past": found.passed}
        return {started: [str(pod) for pod in pods[:MAX_NAMED]] for started, pods in lists.items()}

    async def _guard(self) -> object:
        not_claimed = list(NOT_CLAIMED)
        try:
            drops = await self._kernel.guard_drops()
        except DataplaneError as err:
            problem = f"the guard is not as it was put in place: {err}"
            return {"problem": problem, "drops": {}, "not_claimed": not_claimed}
        return {"problem": self._kernel.guard_problem, "drops": drops, "not_claimed": not_claimed}

    def _snapshot(self) -> object:
        if self.cluster is None:
            return None
        return {
            "generation": self.cluster.snapshot.generation,
            "policies": len(self.cluster.cluster.policies),
            "namespaces": len(self.cluster.cluster.namespaces),
            "pods": len(self.cluster.cluster.pods),
            "problems": [str(problem) for problem in (*self.cluster.cluster.problems, *self._limits.problems())],
        }

    def _is_bare(self, endpoint: Endpoint) -> bool:
        return self.cluster is not None and not self.cluster.knows_labels(endpoint.sandbox.requests)

    async def _list_endpoints(self, arguments: dict[str, Any]) -> object:
        wanted = arguments.pop("pod", None)
        _require_no_arguments(arguments)
        passed_by = passed_by_tc()
        return [
            _describe(endpoint)
            | {"guard": self._kernel.guard_problem or _guard_problem(endpoint, passed_by)}
            | {"are_labels_known": not self._is_bare(endpoint)}
            for endpoint in sorted(self._endpoints, key=lambda endpoint: endpoint.identity.pod)
            if wanted in (None, str(endpoint.identity.pod))
        ]

    async def _trust(self, arguments: dict[str, Any]) -> object:
        node = arguments.pop("node", None)
        _require_no_arguments(arguments)
        if not isinstance(node, str):
            raise AdminError("node: must be the name of a node")
        if self.placement is None or not self.placement.trust(node):
            raise AdminError(f"node {node} is not denied")
        return {"trusted": node}

    async def _render_metrics(self, arguments: dict[str, Any]) -> object:
        _require_no_arguments(arguments)
        return await self.render_metrics()

    async def render_metrics(self) -> str:
        """Return all metrics in Prometheus' text format, the guard's drops as they are now."""
        try:
            self._metrics.guard_drops.update(await self._kernel.guard_drops())
        except DataplaneError as err:
            # The other metrics are told all the same; whoever took the counters away is reported by the guard's keeper.
            self._metrics.guard_drops.clear()
            _log.warning("the guard's counters cannot be read", error=str(err))
        return self._metrics.render()


def _require_no_arguments(arguments: dict[str, Any]) -> None:
    if arguments:
        raise AdminError(f"{next(iter(arguments))}: unknown argument")


def _describe(endpoint: Endpoint) -> dict[str, object]:
    identity, sandbox, policy = endpoint.identity, endpoint.sandbox, endpoint.policy
    request = next(iter(sandbox.requests.values()))
    policies = {str(ref) for direction in Direction for ref in policy.direction(direction).isolating}
    return {
        "namespace": identity.pod.namespace,
        "pod": identity.pod.name,
        "container_id": request.attachment.container_id,
        "ifname": ", ".join(sandbox.ifnames),
        "netns": request.netns_path,
        "ips": [str(ip) for ip in identity.ips],
        "labels": dict(identity.labels),
        "service_account": identity.service_account,
        "state": _state(endpoint),
        "problem": endpoint.closed or endpoint.problem,
        "identity_bytes": endpoint.identity_bytes,
        "budget_bytes": endpoint.budget_bytes,
        "isolated": {"ingress": policy.ingress.is_isolated, "egress": policy.egress.is_isolated},
        "policies": sorted(policies),
        "half_open_flows": endpoint.datapath.half_open_flows,
        "held_packets": endpoint.datapath.held_packets,
        "leases": {"pairs": len(endpoint.leases), "unanswered": endpoint.leases.unanswered()},
        "lost_packets": endpoint.lost._asdict(),
        "counters": endpoint.flow_log.counts() | _unevaluated(endpoint.lost),
        "recent_denials": [denial.as_json() for denial in endpoint.flow_log.recent],
    }


def _state(endpoint: Endpoint) -> str:
    if endpoint.closed:
        return "closed"
    return "enforced" if endpoint.is_open and not endpoint.problem else "degraded"


def _unevaluated(lost: LostPackets) -> dict[str, int]:
    """Return the reasons of what the kernel dropped before anybody looked at it."""
    counts = {Reason.PACKET_RATE: lost.limit, Reason.QUEUE_FULL: lost.queue + lost.buffer}
    return {reason.value: count for reason, count in counts.items() if count}


def _guard_problem(endpoint: Endpoint, passed_by: frozenset[str]) -> str:
    """Return what the guard on the node cannot see of the pod, or does not allow it; empty if all is in order."""
    if problems := endpoint.policy.problems:
        return "; ".join(problems)
    links = endpoint.sandbox.links
    named = ", ".join(name for name in links.names if name in passed_by)
    if not named:
        return links.problem
    problem = f"tc filters at the ingress of {named} see packets first, and may send them past the guard"
    return f"{links.problem}; {problem}" if links.problem else problem


def _describe_authority(authority: x509.Certificate) -> dict[str, object]:
    return {
        "subject": authority.subject.rfc4514_string(),
        "trust_domain": vouched_domain(authority),
        "not_after": _time(authority.not_valid_after_utc.timestamp()),
    }


def _describe_networks(networks: NetworkSettings) -> dict[str, object]:
    return {"enforced": list(map(str, networks.enforced)), "virtual": list(map(str, networks.virtual))}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
