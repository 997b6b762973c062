# SPDX-License-Identifier: Apache-2.0
"""Connections between two pods of one node, with the enforcer and without, in alternating rounds of one run.

Without: two network namespaces on the same bridge, made by the same plugins, that nobody enforces. With: both ends
enforced, one policy that allows the flow by the peer's labels, caches warm.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from enforcer_daemon.model import PodRef
from trireme_lab.lab import Lab
from trireme_lab.spec import HostSpec, LabSpec, NodeSpec, PodSpec

ROUNDS = 9
CONNECTIONS = 1_500
CLIENTS = 8
PORT = 7000
LOAD = Path(__file__).with_name("load.py")
_START_S = 0.5

_POLICY = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"namespace": "bench", "name": "allow"},
    "spec": {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"role": "client"}}}]}],
        "egress": [{"to": [{"podSelector": {"matchLabels": {"role": "server"}}}]}],
    },
}

WORLD = LabSpec(
    nodes=(NodeSpec.numbered("a", 1),),
    pods=(
        PodSpec(PodRef("bench", "client"), "a", {"role": "client"}),
        PodSpec(PodRef("bench", "server"), "a", {"role": "server"}),
    ),
    hosts=(HostSpec("client", node="a"), HostSpec("server", node="a")),
    manifests=(_POLICY,),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result; latencies in microseconds, rates in connections a second."""

    what: str
    without: float
    with_enforcer: float

    @property
    def ratio(self) -> float:
        """With the enforcer over without."""
        return self.with_enforcer / self.without


def run() -> list[Row]:
    """Measure; takes about a minute, as root."""
    rounds: dict[tuple[str, int], list[dict[str, float]]] = {}
    with Lab(WORLD) as lab:
        for place in ("host:server", "bench/server"):
            lab.spawn(place, sys.executable, str(LOAD), "serve", str(lab.address_of(place)), str(PORT))
        time.sleep(_START_S)
        for number in range(ROUNDS + 1):
            for clients in (1, CLIENTS):
                for kind, client, server in (
                    ("without", "host:client", "host:server"),
                    ("with", "bench/client", "bench/server"),
                ):
                    result = _measure(lab, client, server, clients)
                    if number:  # The first round warms caches on both sides.
                        rounds.setdefault((kind, clients), []).append(result)
    return [
        _row("connect p50, 1 client (us)", rounds, 1, "p50_us"),
        _row("connect p99, 1 client (us)", rounds, 1, "p99_us"),
        _row("connections/s, 1 client", rounds, 1, "per_s"),
        _row(f"connections/s, {CLIENTS} clients", rounds, CLIENTS, "per_s"),
    ]


def _measure(lab: Lab, client: str, server: str, clients: int) -> dict[str, float]:
    count = str(CONNECTIONS // clients)
    address = str(lab.address_of(server))
    output = lab.run(client, sys.executable, str(LOAD), "connect", address, str(PORT), count, str(clients))
    result: dict[str, float] = json.loads(output)
    return result


def _row(what: str, rounds: dict[tuple[str, int], list[dict[str, float]]], clients: int, key: str) -> Row:
    without, with_enforcer = (
        statistics.median(result[key] for result in rounds[(kind, clients)]) for kind in ("without", "with")
    )
    return Row(what, without, with_enforcer)


def print_rows(rows: Iterable[Row]) -> None:
    """Print a table."""
    print(f"{'':32}{'no agent':>12}{'enforcer':>12}{'ratio':>8}")
    for row in rows:
        print(f"{row.what:32}{row.without:12.0f}{row.with_enforcer:12.0f}{row.ratio:8.2f}")


def main() -> None:
    """Print the table."""
    print_rows(run())


if __name__ == "__main__":
    main()
