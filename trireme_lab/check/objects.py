# SPDX-License-Identifier: Apache-2.0
"""A case as the daemons read it: one file of all objects, so that they take it over whole, in one step."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping

from enforcer_daemon.model import PodRef
from enforcer_daemon.policy import Pod
from enforcer_daemon.policy.syntax import parse_cidr
from trireme_lab.check.plan import is_sandboxed
from trireme_lab.errors import LabError
from trireme_lab.manifests import namespace_manifest
from trireme_lab.node import Node
from triremectl.cases import Case

TURN_NAMESPACE = "lab-check-turn"
"""No pod is in it. Its label differs in each case, so that each is a change that the daemon has to take over."""
_FILE_NAME = "case.json"
_TIMEOUT_S = 10.0
_POLL_S = 0.005


def case_file(case: Case, pods: Collection[PodRef], turn: int) -> Mapping[str, object]:
    """Return a case's objects for a node with these pods; `turn` is of this case alone."""
    objects = case.objects
    return {
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            namespace_manifest(TURN_NAMESPACE, {"turn": str(turn)}),
            *(namespace_manifest(name, labels) for name, labels in objects.namespaces.items()),
            *(_pod_manifest(pod) for pod in objects.pods if is_sandboxed(pod) and pod.ref in pods),
            *(_with_masked_cidrs(policy) if objects.has_old_cidrs else policy for policy in objects.policies),
        ],
    }


def _pod_manifest(pod: Pod) -> Mapping[str, object]:
    ports = [
        {"name": port.name, "containerPort": port.number, "protocol": port.protocol.name} for port in pod.named_ports
    ]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": pod.ref.namespace, "name": pod.ref.name, "labels": dict(pod.labels)},
        "spec": {"containers": [_container(port, number) for number, port in enumerate(ports)]},
    }


def _container(port: Mapping[str, object], number: int) -> Mapping[str, object]:
    # One port a container: a name may be in use for several protocols, but not twice in one container.
    return {"name": f"c{number}", "image": "lab", "ports": [port]}


def _with_masked_cidrs(value: object) -> object:
    """Write CIDRs as an API server of today stores them: what was stored before has the same meaning, masked."""
    if isinstance(value, Mapping):
        return {
            key: _mask(item) if key in ("cidr", "except") else _with_masked_cidrs(item) for key, item in value.items()
        }
    return [_with_masked_cidrs(item) for item in value] if isinstance(value, list) else value


def _mask(value: object) -> object:
    if isinstance(value, list):
        return [_mask(item) for item in value]
    network = parse_cidr(value, mask_host_bits=True)[0] if isinstance(value, str) else None
    return value if network is None else str(network)


def put_in_force(files: Mapping[str, Mapping[str, object]], nodes: Mapping[str, Node]) -> None:
    """Give each node its file, and return when every daemon judges by it; raise LabError if one refuses any of it."""
    before = {name: nodes[name].generation() for name in files}
    for name, content in files.items():
        directories = nodes[name].directories
        draft = directories.staging / _FILE_NAME
        draft.write_text(json.dumps(content), encoding="utf-8")
        draft.rename(directories.policy / _FILE_NAME)
    deadline = time.monotonic() + _TIMEOUT_S
    for name, generation in before.items():
        node = nodes[name]
        while node.generation() == generation:
            if time.monotonic() > deadline:
                raise LabError(
                    f"node {name}: the policies are not in force after {_TIMEOUT_S:g} s:\n{node.daemon.tail()}"
                )
            time.sleep(_POLL_S)
        if problems := _problems(node):
            raise LabError(f"node {name}: refuses objects of the case: {'; '.join(problems)}")


def _problems(node: Node) -> list[str]:
    snapshot = node.status().get("snapshot")
    problems = snapshot.get("problems") if isinstance(snapshot, Mapping) else None
    return [str(problem) for problem in problems] if isinstance(problems, list) else []
