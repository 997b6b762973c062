# SPDX-License-Identifier: Apache-2.0
"""A node's enforcer in a large cluster: its start, its memory, and a policy's way to the datapath.

One node, an API server over HTTP on the same machine (its processor time is not counted, but it takes some of it). Time
runs from the change at the API server to what a client of a pod sees: the first connection that is judged anew. Pods on
other nodes must cost nothing: the same is measured without and with them.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from enforcer_daemon.model import PodRef
from tests.kube.lab import KubeLab
from trireme_lab import LabSpec, NodeSpec, Outcome, PodSpec, PortSpec, Tools
from trireme_lab.probe import run_probe

POLICIES = 10_000
NAMESPACES = 5_000
FOREIGN_PODS = 50_000
ROUNDS = 41
_PORT = 7000
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Row:
    """What a cluster costs the node's enforcer."""

    what: str
    ready_s: float
    """From the start of the process until it is ready."""
    cpu_s: float
    """Processor time until then."""
    memory_mib: float
    """Resident, when ready."""
    follow_ms: float
    """Median, from a change at the API server to the first connection that follows it."""
    watched: int
    """Objects that the API server sent."""


def _policy(number: int) -> dict[str, Any]:
    peers = [{"namespaceSelector": {"matchLabels": {"team": f"t{number % 50}"}}, "podSelector": {}}]
    return _network_policy(f"ns-{number % NAMESPACES}", f"p{number}", f"app-{number % 7}", peers)


def _network_policy(namespace: str, name: str, app: str, peers: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {
            "podSelector": {"matchLabels": {"app": app}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": peers, "ports": [{"port": 8080}, {"port": _PORT}]}] if peers else [],
        },
    }


def _objects(policies: int, namespaces: int, pods: int) -> Iterator[dict[str, Any]]:
    yield from (_policy(number) for number in range(policies))
    for number in range(namespaces):
        labels = {"team": f"t{number % 50}", "env": "prod"}
        yield {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"ns-{number}", "labels": labels}}
    for number in range(pods):
        metadata = {"name": f"pod-{number}", "namespace": f"ns-{number % NAMESPACES}", "labels": {"app": "app-1"}}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"nodeName": f"n{number % 500}"}}


_OPEN = _network_policy("bench", "access", "server", [{"podSelector": {"matchLabels": {"app": "client"}}}])
_CLOSED = _network_policy("bench", "access", "server", [])


def measure(what: str, policies: int, namespaces: int, pods: int) -> Row:
    """Measure one cluster; as root."""
    world = LabSpec(
        nodes=(NodeSpec.numbered("a", 1),),
        pods=(
            PodSpec(PodRef("bench", "client"), "a", {"app": "client"}),
            PodSpec(PodRef("bench", "server"), "a", {"app": "server"}, ports=(PortSpec(_PORT),)),
        ),
        manifests=(_OPEN,),
        settings={"denyWith": "reset"},
    )
    with KubeLab(world, Tools(), _objects(policies, namespaces, pods)) as lab:
        node = lab.node("a")
        _restart_without_state(lab)
        sent = lab.api.sent_objects
        started = time.perf_counter()
        node.start()
        node.wait_ready(60.0)
        ready_s = time.perf_counter() - started
        pid = node.daemon.pid
        cpu_s, memory = _cpu_s(pid), _resident_mib(pid)
        sent = lab.api.sent_objects - sent
        lab.api.put(*({**pod, "status": {}} for pod in _objects(0, 0, min(pods, 200))))
        follow = statistics.median(_follow(lab))
    return Row(what, ready_s, cpu_s, memory, follow * 1e3, sent)


def _restart_without_state(lab: KubeLab) -> None:
    node = lab.node("a")
    node.stop()
    for path in (node.directories.state / "cluster").iterdir():
        path.unlink()


def _follow(lab: KubeLab) -> Iterator[float]:
    request = replace(lab.request("bench/client", "bench/server", _PORT), timeout_s=1.0)
    for number in range(ROUNDS):
        manifest, expected = ((_CLOSED, Outcome.REFUSED), (_OPEN, Outcome.CONNECTED))[number % 2]
        started = time.perf_counter()
        lab.api.put(manifest)
        while run_probe(request).outcome is not expected:
            assert time.perf_counter() < started + 10, "the change has no effect"
        yield time.perf_counter() - started
        time.sleep(0.05)  # An idle node.


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _resident_mib(pid: int) -> float:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def run() -> list[Row]:
    """Measure; takes about a minute."""
    large = f"{POLICIES:,} policies, {NAMESPACES:,} namespaces"
    return [
        measure("2 pods, 1 policy", 0, 0, 0),
        measure(large, POLICIES, NAMESPACES, 0),
        measure(f"{large}, {FOREIGN_PODS:,} pods on other nodes", POLICIES, NAMESPACES, FOREIGN_PODS),
    ]


def main() -> None:
    """Print the table."""
    print(f"{'':64}{'ready s':>9}{'CPU s':>8}{'MiB':>7}{'follow ms':>11}{'objects':>9}")
    for row in run():
        numbers = f"{row.ready_s:9.1f}{row.cpu_s:8.1f}{row.memory_mib:7.0f}{row.follow_ms:11.1f}{row.watched:9,}"
        print(f"{row.what:64}{numbers}")


if __name__ == "__main__":
    main()
