# SPDX-License-Identifier: Apache-2.0
"""A state as a source knows it, compiled; and who a registered pod is in it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace

from cni_plugin import messages
from enforcer_daemon.errors import RegistrationError
from enforcer_daemon.model import AttachmentId, Identity
from enforcer_daemon.policy.compile import PolicySnapshot, compile_snapshot
from enforcer_daemon.registration.request import AddRequest
from enforcer_daemon.settings import Settings
from enforcer_daemon.sources.manifests import ClusterState, Problem

MAX_PEER_NAMESPACE_BYTES = 1024 * 1024
"""Policies of a namespace that are decoded because a pod with flows into it got other labels. They may be another
tenant's; beyond, the peer's node alone evaluates the peer's direction, as it does for each handshake."""


@dataclass(frozen=True, slots=True)
class CompiledState:
    """What all endpoints are evaluated by at one moment."""

    cluster: ClusterState
    snapshot: PolicySnapshot
    node: str
    trust_domain: str
    has_uids: bool = False
    """Whether identities state their pods' UIDs, for nodes that look up where these are."""
    large: Mapping[str, str] = field(default_factory=dict)
    """Namespaces that have more policies than are compiled, each with the problem."""

    def identity_of(self, requests: Mapping[AttachmentId, AddRequest], last: Identity | None = None) -> Identity:
        """Return the identity of the pod that these attachments belong to, and which was `last` until now.

        The pod object's labels count where the source has it, else those that the runtime passed. A pod that was
        deleted from the cluster stays what it was as long as its namespace is there.
        """
        request = next(iter(requests.values()))
        ips = tuple(dict.fromkeys(ip for attached in requests.values() for ip in attached.ips))
        namespace_labels = self.cluster.labels_of(request.pod.namespace)
        pod = self.cluster.find_pod(request.pod, request.uid)
        if pod is None and last is not None and self.cluster.is_cluster:
            return replace(last, ips=ips, namespace_labels=namespace_labels)
        return Identity(
            pod=request.pod,
            ips=ips,
            labels=request.labels if pod is None else pod.labels,
            namespace_labels=namespace_labels,
            node=self.node,
            service_account="default" if pod is None else pod.service_account,
            trust_domain=self.trust_domain,
            named_ports=() if pod is None else pod.named_ports,
            uid=request.uid if self.has_uids else "",
        )

    def knows_labels(self, requests: Mapping[AttachmentId, AddRequest]) -> bool:
        """Return whether anybody said what labels the pod has, be it that it has none.

        With a cluster a pod is known before it is registered, and stays what it was when it is gone there.
        """
        if self.cluster.is_cluster:
            return True
        return any(request.labels or request.pod in self.cluster.pods for request in requests.values())

    def evaluates(self, peer: Identity) -> bool:
        """Return whether this node evaluates a peer's own policies too: not those of large namespaces."""
        return self.snapshot.size_of(peer.pod.namespace) <= MAX_PEER_NAMESPACE_BYTES

    def require_labels(self, request: AddRequest) -> None:
        """Raise RegistrationError for a pod whose labels nobody said."""
        if not self.knows_labels({request.attachment: request}):
            raise RegistrationError(
                messages.FAILED,
                f"registration.requireLabels: no labels are known of pod {request.pod}; its Pod manifest must be in "
                "policyDir before it starts, or the runtime must pass its labels (args.cni.labels)",
            )

    def prepare(self, identity: Identity) -> None:
        """Compile what selects a pod, which may take long; for threads."""
        policy = self.snapshot.pod_policy(identity)
        policy.ingress.address_rules()
        policy.egress.address_rules()


def with_large_namespaces(compiled: CompiledState, namespaces: Iterable[str]) -> CompiledState:
    """Add a problem for each of these namespaces that has more policies than are compiled."""
    large = {name: problem for name in sorted(namespaces) if (problem := compiled.snapshot.problem_of(name))}
    if not large:
        return compiled
    found = (Problem("networkpolicies", 0, f"Namespace {name}", "", problem) for name, problem in large.items())
    cluster = replace(compiled.cluster, problems=(*compiled.cluster.problems, *found))
    return replace(compiled, cluster=cluster, large=large)


def compile_state(
    cluster: ClusterState, settings: Settings, previous: CompiledState | None, keep: Container[str] | None = None
) -> CompiledState:
    """Compile a state; what did not change of the namespaces in `keep` (None: all) is taken over from the previous one.

    A namespace is compiled when it is first asked for.
    """
    generation = 1 if previous is None else previous.snapshot.generation + 1
    before = None if previous is None else previous.snapshot
    snapshot = compile_snapshot(cluster.policies, generation, before, keep)
    has_uids = cluster.is_cluster and settings.kubernetes.verify_placement
    return CompiledState(cluster, snapshot, settings.node, settings.trust_domain, has_uids)
