# SPDX-License-Identifier: Apache-2.0
"""Policy decisions a second against the number of policies, with no cache in front: `python -m benchmarks.decisions`.

Four ways in which policies can be many, each with 1, 100, 1,000 and 10,000 of them: about other pods of the namespace;
about this pod, with other peers; about this pod and the same peers, with other ports; about this pod, with other
networks. The measured flow is allowed by exactly one rule. Rounds of all sizes alternate, and medians are compared, so
that a slow moment of the machine falls on all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from enforcer_daemon.model import Identity, PodRef, Protocol
from enforcer_daemon.policy import compile_snapshot, decode_network_policy

SIZES = (1, 100, 1_000, 10_000)
ROUNDS = 31
DECISIONS_PER_ROUND = 2_000
LOOKUPS_PER_ROUND = 500
_NODE = "node"
_LABELS = {f"team{index}": "blue" for index in range(8)}  # labels that no policy asks for
_NAMESPACE_LABELS = {"kubernetes.io/metadata.name": "shop"}
_POD = Identity(PodRef("shop", "web-0"), (ip_address("10.0.0.1"),), {"app": "web", **_LABELS}, _NAMESPACE_LABELS, _NODE)
_PEER = Identity(
    PodRef("shop", "client-0"), (ip_address("10.0.0.2"),), {"app": "client", **_LABELS}, _NAMESPACE_LABELS, _NODE
)
_CLIENT = {"podSelector": {"matchLabels": {"app": "client"}}}

Spec = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result."""

    scenario: str
    policies: int
    decisions_per_s: float
    ratio: float
    """Against one policy in the same rounds; 1.0 is flat."""
    lookups_per_s: float
    """Finding a pod's policies, the snapshot warm."""
    compile_s: float
    """From objects to the first answer."""


def _about_other_pods(index: int) -> Spec:
    app = "web" if index == 0 else f"web{index}"
    return {"podSelector": {"matchLabels": {"app": app}}, "ingress": [{"from": [_CLIENT], "ports": [{"port": 80}]}]}


def _about_other_peers(index: int) -> Spec:
    peer = _CLIENT if index == 0 else {"podSelector": {"matchLabels": {"app": f"client{index}"}}}
    return {"ingress": [{"from": [peer], "ports": [{"port": 80}]}]}


def _about_other_ports(index: int) -> Spec:
    return {"ingress": [{"from": [_CLIENT], "ports": [{"port": 80 if index == 0 else 1_000 + index}]}]}


def _about_other_networks(index: int) -> Spec:
    cidr = "10.0.0.2/32" if index == 0 else f"172.{16 + index // 256 % 16}.{index % 256}.{index // 4_096}/32"
    return {"ingress": [{"from": [{"ipBlock": {"cidr": cidr}}], "ports": [{"port": 80}]}]}


SCENARIOS: dict[str, Callable[[int], Spec]] = {
    "other pods": _about_other_pods,
    "other peers": _about_other_peers,
    "other ports": _about_other_ports,
    "other networks": _about_other_networks,
}


def _manifest(index: int, spec: Spec) -> object:
    metadata = {"name": f"p{index}", "namespace": "shop"}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


@dataclass(slots=True)
class _Subject:
    policies: int
    evaluate: Callable[[], object]
    look_up: Callable[[], object]
    compile_s: float


def _subject(make: Callable[[int], Spec], size: int) -> _Subject:
    policies = [decode_network_policy(_manifest(index, make(index))) for index in range(size)]
    start = time.perf_counter()
    snapshot = compile_snapshot(policies, 1)
    ingress = snapshot.pod_policy(_POD).ingress
    compile_s = time.perf_counter() - start
    address = _PEER.ips[0]
    assert ingress.evaluate(_PEER, address, 80, Protocol.TCP).is_allowed
    assert not ingress.evaluate(_PEER, address, 81, Protocol.TCP).is_allowed

    def evaluate() -> None:
        for _ in range(DECISIONS_PER_ROUND // 2):
            ingress.evaluate(_PEER, address, 80, Protocol.TCP)
            ingress.evaluate(_PEER, address, 81, Protocol.TCP)

    def look_up() -> None:
        for _ in range(LOOKUPS_PER_ROUND):
            snapshot.pod_policy(_POD)

    return _Subject(size, evaluate, look_up, compile_s)


def _elapsed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _measure(scenario: str, make: Callable[[int], Spec]) -> list[Row]:
    subjects = [_subject(make, size) for size in SIZES]
    judging: dict[int, list[float]] = {subject.policies: [] for subject in subjects}
    looking: dict[int, list[float]] = {subject.policies: [] for subject in subjects}
    for number in range(ROUNDS):
        # Forwards and backwards in turn: none is always first.
        for subject in subjects if number % 2 else reversed(subjects):
            judging[subject.policies].append(_elapsed(subject.evaluate))
            if scenario == "other pods":
                looking[subject.policies].append(_elapsed(subject.look_up))
    base = judging[SIZES[0]]
    return [
        Row(
            scenario,
            subject.policies,
            DECISIONS_PER_ROUND / statistics.median(judging[subject.policies]),
            statistics.median(mine / one for mine, one in zip(judging[subject.policies], base, strict=True)),
            LOOKUPS_PER_ROUND / statistics.median(looking[subject.policies]) if looking[subject.policies] else 0.0,
            subject.compile_s,
        )
        for subject in subjects
    ]


def run() -> list[Row]:
    """Measure all scenarios; half of the decisions allow, half deny."""
    return [row for scenario, make in SCENARIOS.items() for row in _measure(scenario, make)]


def main() -> None:
    """Print the rows."""
    print(f"{'scenario':<16}{'policies':>9}{'decisions/s':>14}{'cost':>8}{'look-ups/s':>13}{'compile ms':>12}")
    for row in run():
        looked = f"{row.lookups_per_s:>13,.0f}" if row.lookups_per_s else f"{'-':>13}"
        print(
            f"{row.scenario:<16}{row.policies:>9,}{row.decisions_per_s:>14,.0f}{row.ratio:>7.2f}x{looked}"
            f"{row.compile_s * 1_000:>12.1f}"
        )


if __name__ == "__main__":
    main()
