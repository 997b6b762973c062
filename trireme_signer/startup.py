# SPDX-License-Identifier: Apache-2.0
"""Takes the startup taint from nodes whose enforcer is ready, so that no pod starts where none would enforce it.

A node registers with the taint (kubelet's --register-with-taints, or the node pool's setting). That the signer removes
it spares the enforcers the right to change nodes: whoever takes one node over could then change all the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from enforcer_daemon.kube.client import ApiError
from enforcer_daemon.kube.reflector import Reflector, Surroundings
from enforcer_daemon.kube.resources import Resource
from enforcer_daemon.kube.table import Table
from enforcer_daemon.telemetry.logs import Logger
from trireme_signer.cluster import CONFLICT, Cluster, Manifest
from trireme_signer.issuance import Grant

DEFAULT_TAINT = "trireme.io/agent-not-ready"
_RETRY_S = 2.0


@dataclass(frozen=True, slots=True)
class Enforcer:
    """What is looked at of a pod in the DaemonSet's namespace."""

    node: str
    is_ready: bool
    created: str
    """RFC 3339 time, as the API server writes it: two of them are in order as text."""


def enforcer_of(pod: Mapping[str, Any], grant: Grant) -> Enforcer | None:
    """Read a pod of the DaemonSet; None if it is another's, or on no node."""
    metadata, spec = pod.get("metadata") or {}, pod.get("spec") or {}
    owners = [owner for owner in metadata.get("ownerReferences") or () if owner.get("controller")]
    if [(owner.get("kind"), owner.get("name")) for owner in owners] != [("DaemonSet", grant.daemon_set)]:
        return None
    conditions = (pod.get("status") or {}).get("conditions") or ()
    ready = any((found.get("type"), found.get("status")) == ("Ready", "True") for found in conditions)
    is_ready = ready and not metadata.get("deletionTimestamp")
    node = spec.get("nodeName") or ""
    return Enforcer(node, is_ready, metadata.get("creationTimestamp") or "") if node else None


def may_lose(node: Mapping[str, Any], key: str, enforcers: Iterable[Enforcer]) -> bool:
    """Return whether a node has the taint, and an enforcer that is ready.

    A node that was made anew under its name may still have the ready pod of the one before.
    """
    metadata = node["metadata"]
    made = metadata.get("creationTimestamp") or ""
    return any(taint.get("key") == key for taint in _taints(node)) and any(
        pod.is_ready and pod.node == metadata["name"] and pod.created >= made for pod in enforcers
    )


def without_taint(node: Mapping[str, Any], key: str) -> Manifest:
    """Return the merge patch that takes the taint from a node, if nobody else changed the node meanwhile."""
    left = [taint for taint in _taints(node) if taint.get("key") != key]
    return {"metadata": {"resourceVersion": node["metadata"]["resourceVersion"]}, "spec": {"taints": left or None}}


def _taints(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return (node.get("spec") or {}).get("taints") or []


class StartupTaints:
    """The nodes and the enforcers' pods, and the work on them."""

    def __init__(self, cluster: Cluster, grant: Grant, taint: str, shared: Callable[[Callable[[], None]], Surroundings],
                 log: Logger) -> None:  # fmt: skip
        """`shared` gives what the watches need, with what they call on a change."""
        self._cluster = cluster
        self._grant = grant
        self._taint = taint
        self._log = log
        self._wake = asyncio.Event()
        surroundings = shared(self._wake.set)
        self._nodes: Reflector[Manifest] = Reflector(Table(_nodes()), surroundings)
        self._pods: Reflector[Manifest] = Reflector(Table(_pods(grant.namespace)), surroundings)

    async def run(self) -> NoReturn:
        """Go on until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._nodes.run(), name="nodes")
            tasks.create_task(self._pods.run(), name="enforcers")
            while True:
                await self._wake.wait()
                self._wake.clear()
                await self._take_off()

    async def _take_off(self) -> None:
        read = (enforcer_of(pod, self._grant) for pod in self._pods.table.values())
        enforcers = [enforcer for enforcer in read if enforcer is not None]
        for (_, name), entry in list(self._nodes.table.entries.items()):
            if entry.value is None or not may_lose(entry.value, self._taint, enforcers):
                continue
            path = f"/api/v1/nodes/{name}"
            try:
                node = await self._cluster.find(path)  # As it is now: the patch must not undo another's.
                if node is not None and may_lose(node, self._taint, enforcers):
                    await self._cluster.patch(path, without_taint(node, self._taint))
                    self._log.info("startup taint removed", node=name, taint=self._taint)
            except ApiError as err:
                if err.status != CONFLICT:
                    self._log.warning("startup taint not removed", node=name, error=str(err))
                asyncio.get_running_loop().call_later(_RETRY_S, self._wake.set)


def _nodes() -> Resource[Manifest]:
    return Resource("nodes", "/api/v1/nodes", "v1", "Node", _taints_of, dict)


def _pods(namespace: str) -> Resource[Manifest]:
    return Resource("pods", f"/api/v1/namespaces/{namespace}/pods", "v1", "Pod", _readiness_of, dict)


def _taints_of(node: Mapping[str, Any]) -> dict[str, object]:
    metadata = node.get("metadata") or {}
    kept = {name: metadata.get(name) for name in ("name", "creationTimestamp")}
    return {"metadata": kept, "spec": {"taints": _taints(node)}}


def _readiness_of(pod: Mapping[str, Any]) -> dict[str, object]:
    metadata, spec, status = (pod.get(part) or {} for part in ("metadata", "spec", "status"))
    names = ("name", "namespace", "creationTimestamp", "deletionTimestamp", "ownerReferences")
    ready = [found for found in status.get("conditions") or () if found.get("type") == "Ready"]
    return {
        "metadata": {name: metadata.get(name) for name in names},
        "spec": {"nodeName": spec.get("nodeName")},
        "status": {"conditions": [{"type": "Ready", "status": found.get("status")} for found in ready]},
    }
