# SPDX-License-Identifier: Apache-2.0
"""What one namespace user's objects cost the others of a node: `python -m benchmarks.tenants`, as root.

One node, an API server over HTTP on the same machine, two pods that are measured, and pods of a hostile namespace whose
user writes the worst policies: 1 MB in 100 objects, replaced one after the other (1/s) or all of them each second
(100/s). Measured with and without, in one run: a policy change of another namespace, from the API server to the first
connection that follows it; connects between its pods, back to back; CNI ADD of a pod of it; memory; a restart.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cluster import _resident_mib
from enforcer_daemon.model import PodRef
from tests.kube.lab import KubeLab
from trireme_lab import LabSpec, NodeSpec, Outcome, PodSpec, PortSpec, Tools
from trireme_lab.probe import run_probe

Manifest = dict[str, Any]
OBJECTS = 100
OBJECT_BYTES = 10_000
HOSTILE_PODS = 5
FOLLOWED = 41
CONNECTS = 3_000
ADDED = 5
FOREIGN_BYTES = 28_000_000
_PORT = 7000
_LOAD = Path(__file__).with_name("load.py")


@dataclass(frozen=True, slots=True)
class Row:
    """What others of the node see."""

    what: str
    follow_ms: float
    """Median, from a change at the API server to the first connection that follows it."""
    follow_p99_ms: float
    connect_p50_us: float
    connect_p99_us: float
    add_ms: float
    """The slowest CNI ADD."""
    memory_mib: float
    """Resident, at the end."""
    restart_s: float


def policy(namespace: str, name: str, **spec: Any) -> Manifest:
    """Return a NetworkPolicy for all pods of a namespace, unless the spec says otherwise."""
    types = ["Ingress", "Egress"]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {"podSelector": {}, "policyTypes": types, **spec},
    }


def blocks(count: int, seed: int = 0) -> list[Manifest]:
    """Return networks that do not adjoin."""
    numbers = ((seed + index) * 2 for index in range(count))
    return [{"ipBlock": {"cidr": f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}/32"}} for n in numbers]


def ports(count: int, seed: int = 0) -> list[Manifest]:
    """Return ports that do not adjoin."""
    return [{"port": 1 + (seed + index) * 2 % 65_000} for index in range(count)]


def _selectors(count: int, seed: int) -> list[Manifest]:
    keys = (f"k{seed}-{index}" for index in range(count))
    return [{"podSelector": {"matchExpressions": [{"key": key, "operator": "DoesNotExist"}]}} for key in keys]


def _excepts(count: int, seed: int) -> list[Manifest]:
    numbers = ((seed + index) * 2 for index in range(count))
    return [{"ipBlock": {"cidr": "10.0.0.0/8", "except": [f"10.{n >> 8 & 255}.{n & 255}.0/32" for n in numbers]}}]


_KINDS: tuple[Callable[[int, int], dict[str, Any]], ...] = (
    lambda count, seed: {"egress": [{"to": blocks(count // 3, seed), "ports": ports(count // 2, seed)}]},
    lambda count, seed: {"egress": [{"to": _excepts(count // 2, seed)}]},
    lambda count, seed: {"ingress": [{"from": _selectors(count // 5, seed), "ports": ports(count // 5, seed)}]},
    lambda count, seed: {
        "egress": [{"to": [block], "ports": ports(1, seed + at)} for at, block in enumerate(blocks(count // 7, seed))]
    },
    lambda count, seed: {
        "ingress": [{"ports": [{"port": 1 + at + seed % 999, "endPort": 65_000 - at}]} for at in range(count // 5)]
    },
)
"""The worst of each kind: products, exceptions, requirements that no index finds, many rules, overlapping ranges."""


def hostile(number: int, version: int = 0, size: int = OBJECT_BYTES) -> Manifest:
    """Return one of the worst policies; another version of it has other contents."""
    make, count = _KINDS[number % len(_KINDS)], size // 12
    while True:
        found = policy("hostile", f"p{number}", **make(count, 1_000 * number + version))
        if len(json.dumps(found, separators=(",", ":"))) <= size:
            return found
        count = count * 9 // 10


@contextmanager
def updates(lab: KubeLab, per_s: float) -> Iterator[None]:
    """Replace the hostile objects, so many a second, one after the other."""
    stop = threading.Event()

    def work() -> None:
        for turn in itertools.count():
            lab.api.put(hostile(turn % OBJECTS, 1 + turn // OBJECTS))
            if stop.wait(1.0 / per_s):
                return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _world() -> LabSpec:
    pods = tuple(PodSpec(PodRef("hostile", f"pod-{number}"), "a", {"app": "x"}) for number in range(HOSTILE_PODS))
    return LabSpec(
        nodes=(NodeSpec.numbered("a", 1),),
        pods=(
            PodSpec(PodRef("bench", "client"), "a", {"app": "client"}),
            PodSpec(PodRef("bench", "server"), "a", {"app": "server"}, ports=(PortSpec(_PORT),)),
            *pods,
        ),
        manifests=(_access({"app": "client"}),),
        settings={"denyWith": "reset"},
    )


def _access(*labels: dict[str, str]) -> Manifest:
    peers = [{"podSelector": {"matchLabels": each}} for each in labels]
    rules = [{"from": peers}] if peers else []
    selector = {"matchLabels": {"app": "server"}}
    return policy("bench", "access", podSelector=selector, policyTypes=["Ingress"], ingress=rules)


def follow(lab: KubeLab, rounds: int = FOLLOWED) -> Iterator[float]:
    """Change the measured namespace's policy back and forth; give the time of each until it is followed."""
    request = replace(lab.request("bench/client", "bench/server", _PORT), timeout_s=1.0)
    for number in range(rounds + rounds % 2):
        manifest, expected = ((_access(), Outcome.REFUSED), (_access({"app": "client"}), Outcome.CONNECTED))[number % 2]
        started = time.perf_counter()
        lab.api.put(manifest)
        while run_probe(request).outcome is not expected:
            assert time.perf_counter() < started + 60, "the change has no effect"
        yield time.perf_counter() - started
        time.sleep(0.05)


def add(lab: KubeLab, rounds: int = ADDED) -> Iterator[float]:
    """Add and remove a pod of the measured namespace; give the time of each ADD."""
    for number in range(rounds):
        spec = PodSpec(PodRef("bench", f"late-{number}"), "a", {"app": "late"})
        started = time.perf_counter()
        lab.add_pod(spec)
        yield time.perf_counter() - started
        lab.remove_pod(f"bench/late-{number}")


def _connect(lab: KubeLab) -> dict[str, float]:
    address = str(lab.address_of("bench/server"))
    output = lab.run("bench/client", sys.executable, str(_LOAD), "connect", address, str(_PORT), str(CONNECTS), "1")
    found: dict[str, float] = json.loads(output)
    return found


def restart(lab: KubeLab) -> float:
    """Stop the enforcer and start it; give the time until it is ready."""
    node = lab.node("a")
    node.stop()
    started = time.perf_counter()
    node.start()
    node.wait_ready(120.0)
    return time.perf_counter() - started


def measure(lab: KubeLab, what: str) -> Row:
    """Measure what others see at present."""
    followed = sorted(follow(lab))
    connects = _connect(lab)
    slowest = max(add(lab))
    memory = _resident_mib(lab.node("a").daemon.pid)
    return Row(
        what,
        statistics.median(followed) * 1e3,
        followed[(len(followed) * 99 - 1) // 100] * 1e3,
        connects["p50_us"],
        connects["p99_us"],
        slowest * 1e3,
        memory,
        restart(lab),
    )


def foreign() -> Iterator[Manifest]:
    """Yield policies of a namespace without pods on the node."""
    for number in range(FOREIGN_BYTES // (2 * OBJECT_BYTES)):
        manifest = hostile(number, size=2 * OBJECT_BYTES)
        yield {**manifest, "metadata": {"namespace": "elsewhere", "name": f"p{number}"}}


ISSUES: dict[str, list[Manifest]] = {
    "71 KB, 1,000 selectors x 1,700 ports": [
        policy("hostile", "one", ingress=[{"from": _selectors(600, 0), "ports": ports(1_700)}])
    ],
    "15 KB, 300 blocks x 300 ports": [policy("hostile", "one", egress=[{"to": blocks(300), "ports": ports(300)}])],
    "25 KB, 500 blocks x 500 ports": [policy("hostile", "one", egress=[{"to": blocks(500), "ports": ports(500)}])],
}


def run() -> Iterator[Row]:
    """Measure; takes some minutes."""
    with KubeLab(_world(), Tools()) as lab:
        yield measure(lab, "nothing hostile")
        for what, manifests in ISSUES.items():
            with _changed(lab, manifests):
                yield measure(lab, what)
        lab.api.put(*map(hostile, range(OBJECTS)))
        yield measure(lab, "1 MB in 100 objects")
        for per_s in (1, 100):
            with updates(lab, per_s):
                yield measure(lab, f"1 MB in 100 objects, {per_s} updated a second")
        yield measure(lab, "1 MB in 100 objects, at rest again")
        for number in range(OBJECTS):
            lab.api.delete("NetworkPolicy", "hostile", f"p{number}")
        yield measure(lab, "nothing hostile any more")
    with KubeLab(_world(), Tools(), foreign()) as lab:
        yield measure(lab, f"{FOREIGN_BYTES // 1_000_000} MB in a namespace without pods here")


@contextmanager
def _changed(lab: KubeLab, manifests: list[Manifest]) -> Iterator[None]:
    """Have these policies in place, put there again and again each second."""
    stop = threading.Event()

    def work() -> None:
        for turn in itertools.count():
            for manifest in manifests:
                extra = ports(1, 32_000 + turn)
                spec = {**manifest["spec"], "ingress": [*manifest["spec"].get("ingress", ()), {"ports": extra}]}
                lab.api.put({**manifest, "spec": spec})
            if stop.wait(1.0):
                return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for manifest in manifests:
            lab.api.delete("NetworkPolicy", "hostile", manifest["metadata"]["name"])


def main() -> None:
    """Print the table."""
    heads = "follow ms", "p99 ms", "connect us", "p99 us", "ADD ms", "MiB", "restart s"
    print(f"{'':48}" + "".join(f"{head:>12}" for head in heads))
    for row in run():
        figures = (row.follow_ms, row.follow_p99_ms, row.connect_p50_us, row.connect_p99_us, row.add_ms, row.memory_mib)
        print(
            f"{row.what:48}" + "".join(f"{figure:12.0f}" for figure in figures) + f"{row.restart_s:12.1f}", flush=True
        )


if __name__ == "__main__":
    main()
