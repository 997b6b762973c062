# SPDX-License-Identifier: Apache-2.0
"""A lab whose enforcers take their world from an API server: `tests/kube/api.py`, on a host of the lab.

    with KubeLab(LabSpec(NODES, pods=pods), Tools(plugin=plugin)) as lab:
        lab.apply(policy)        # as in every lab, but through the API
        with lab.api.away(): ...

Networks are discovered: nothing of them is in the daemons' settings.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

from enforcer_daemon.daemon.limits import DaemonLimits
from enforcer_daemon.kube.limits import ClusterLimits
from enforcer_daemon.telemetry.events import EventLimits
from tests.kube.api import FakeApi
from trireme_lab import HostSpec, Lab, LabSpec, NodeSpec, PodSpec, Tools
from trireme_lab.enforcer import enforcer_with
from trireme_lab.manifests import ObjectRef, namespace_manifest, pod_manifest
from trireme_lab.netns import open_socket
from trireme_lab.node import Node
from trireme_lab.sandbox import Place
from trireme_lab.settings import overlay
from trireme_lab.spec import SERVICE_NETWORKS, Manifest

_ADDRESS = "192.168.60.250"
_PORT = 6443
_PATIENCE_S = 20.0
SETTINGS: dict[str, object] = {
    "policyDir": None,
    "networks": {"enforced": [], "virtual": []},
    "kubernetes": {"enabled": True},
}
LIMITS = DaemonLimits(
    cluster=ClusterLimits(max_backoff_s=0.5, sync_timeout_s=1.0, save_interval_s=0.2),
    events=EventLimits(max_per_minute=6000.0, max_per_minute_per_object=600.0, update_interval_s=0.5),
)
"""So that no test waits long for what comes again."""


class KubeLab(Lab):
    """A lab with an API server in place of directories of policies."""

    api: FakeApi

    def __init__(
        self, spec: LabSpec, tools: Tools, objects: Iterable[Mapping[str, Any]] = (), limits: DaemonLimits = LIMITS
    ) -> None:
        """Prepare; `objects` are in the cluster before the daemons start, besides what the world says."""
        host = HostSpec("api", (ip_address(_ADDRESS),))
        super().__init__(replace(spec, hosts=(*spec.hosts, host)), replace(tools, enforcer=enforcer_with(limits)))
        self._objects = objects

    def _start_daemons(self) -> None:
        self._start_api()
        super()._start_daemons()

    def _start_api(self) -> None:
        sock = open_socket(self.place("host:api").netns, socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((_ADDRESS, _PORT))
        self.api = self._stack.enter_context(FakeApi(sock))
        self.api.load(self._objects)
        self.api.put(*map(node_manifest, self.spec.nodes), service_cidr_manifest(), *self.spec.manifests)
        self.api.put(*(namespace_manifest(name, labels) for name, labels in self.spec.namespaces.items()))
        kubeconfig = self.api.write_kubeconfig(self.directory / "kubeconfig")
        settings = overlay(SETTINGS, self.spec.settings)
        self.spec = replace(
            self.spec, settings=overlay(settings, {"kubernetes": {"kubeconfig": str(kubeconfig)}}), manifests=()
        )

    def add_pod(self, spec: PodSpec) -> Place:
        self.api.put(cluster_pod(spec))
        return super().add_pod(spec)

    def remove_pod(self, pod: str) -> None:
        super().remove_pod(pod)
        namespace, _, name = pod.partition("/")
        self.api.delete("Pod", namespace, name)

    def apply(self, *manifests: Manifest, is_awaited: bool = True) -> bool:
        return self._through_api(lambda: self.api.put(*manifests), self.nodes.values(), is_awaited)

    def remove(self, *references: ObjectRef) -> bool:
        def take() -> None:
            for reference in references:
                self.api.delete(reference.kind, reference.namespace, reference.name)

        return self._through_api(take, self.nodes.values())

    def label(self, pod: str, labels: Mapping[str, str]) -> bool:
        spec = self._spec(pod)
        self._specs[spec.pod] = changed = replace(spec, labels=dict(labels))
        return self._through_api(lambda: self.api.put(cluster_pod(changed)), [self.node(spec.node)])

    def _through_api(self, act: Callable[[], None], nodes: Iterable[Node], is_awaited: bool = True) -> bool:
        before = {node.name: node.generation() for node in nodes if is_awaited}
        act()
        deadline = time.monotonic() + _PATIENCE_S
        for name, generation in before.items():
            while self.node(name).generation() == generation:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.005)
        return True


def cluster_pod(spec: PodSpec, uid: str | None = None) -> dict[str, Any]:
    """Return a pod as the API server has it; its UID is the one that the lab's runtime says."""
    manifest: dict[str, Any] = dict(pod_manifest(spec, spec.labels))
    metadata = {**manifest["metadata"], "uid": uid or f"{spec.pod.namespace}-{spec.pod.name}"}
    return {**manifest, "metadata": metadata, "status": {"phase": "Pending"}}


def node_manifest(node: NodeSpec) -> dict[str, Any]:
    """Return a Node as kubelet and the controllers leave it."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name},
        "spec": {"podCIDRs": [str(network) for network in node.pod_networks]},
        "status": {"addresses": [{"type": "InternalIP", "address": str(address)} for address in node.addresses]},
    }


def service_cidr_manifest() -> dict[str, Any]:
    """Return the default ServiceCIDR."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": [str(network) for network in SERVICE_NETWORKS]},
    }
