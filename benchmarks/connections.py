# SPDX-License-Identifier: Apache-2.0
"""Connections between two pods of one node, in alternating rounds of one run: with the enforcer and without.

Ways are compared with the baseline: no agent, but conntrack and one rule, as every node of Kubernetes has them. Below
the enforcer lies the floor: a C program that accepts the packets which the enforcer's rules queue (accept_all.c).
`--against DIR` adds the enforcer of another work tree, which `make setup plugin` has prepared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from enforcer_daemon.datapath.flowindex import BY_ADDRESS
from enforcer_daemon.dataplane.backends import choose_backend
from enforcer_daemon.dataplane.netns import tune_conntrack
from enforcer_daemon.dataplane.ratelimits import QueueLimits
from enforcer_daemon.dataplane.ruleset import QUEUE_NUMBER, EndpointRules
from enforcer_daemon.marks import released_mark
from enforcer_daemon.model import PodRef
from enforcer_daemon.settings import RulesBackend
from trireme_lab.lab import Lab
from trireme_lab.netns import exec_prefix, netns_path, run
from trireme_lab.sandbox import IFNAME
from trireme_lab.spec import HostSpec, LabSpec, NodeSpec, PodSpec

ROUNDS = 9
CONNECTIONS = 1_500
CLIENTS = 8
PORT = 7000
LOAD = Path(__file__).with_name("load.py")
BASELINE = "conntrack"
"""The way that the others are compared with."""
_TREE = Path(__file__).parent.parent
_FLOOR_SOURCE, _FLOOR = Path(__file__).with_name("accept_all.c"), _TREE / "build" / "accept_all"
_START_S = 0.5
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_RULE = "table inet bench {\n chain input {\n  type filter hook input priority 0\n  ct state new accept\n }\n}\n"
_OTHER_TREE = """
import json, sys
from benchmarks.connections import WORLD, Lab
with Lab(WORLD) as lab:
    places = {name: (lab.place(name).netns, str(lab.address_of(name))) for name in ("bench/client", "bench/server")}
    print(json.dumps([*places.values(), lab.nodes["a"].daemon.pid]), flush=True)
    sys.stdin.read()
"""
"""Holds what `--against` needs of a work tree, whose modules may have other names, until standard input ends."""

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
    hosts=tuple(
        HostSpec(f"{kind}{end}", node="a") for kind in ("", "tracked-", "floor-") for end in ("client", "server")
    ),
    manifests=(_POLICY,),
)


@dataclass(frozen=True, slots=True)
class Way:
    """How connections are made: between which network namespaces, and through which agent."""

    client: str
    server: str
    address: str
    """The server's."""
    agent: int | None = None
    """Process id; None: there is no agent."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result: a figure of each way. Times in microseconds, rates in connections a second."""

    what: str
    figures: Mapping[str, float]


Rounds = dict[str, list[dict[str, float]]]


def run_rounds(against: Path | None = None) -> list[Row]:
    """Measure; takes about two minutes, as root."""
    rounds: dict[int, Rounds] = {1: {}, CLIENTS: {}}
    with ExitStack() as stack:
        ways = _ways(stack, against)
        for way in ways.values():
            stack.enter_context(_Server(way))
        time.sleep(_START_S)
        for number in range(ROUNDS + 1):
            for clients, results in rounds.items():
                for name, way in ways.items():
                    result = _measure(way, clients)
                    if number:  # The first round warms caches.
                        results.setdefault(name, []).append(result)
    return [
        row("connect p50, 1 client (us)", rounds[1], "p50_us"),
        row("connect p99, 1 client (us)", rounds[1], "p99_us"),
        row("connections/s, 1 client", rounds[1], "per_s"),
        row(f"connections/s, {CLIENTS} clients", rounds[CLIENTS], "per_s"),
        row("agent's CPU, 1 client (us)", rounds[1], "cpu_us"),
        row(f"agent's CPU, {CLIENTS} clients (us)", rounds[CLIENTS], "cpu_us"),
    ]


def _ways(stack: ExitStack, against: Path | None) -> dict[str, Way]:
    lab = stack.enter_context(Lab(WORLD))

    def way(prefix: str, agent: int | None = None) -> Way:
        server = lab.place(f"{prefix}server")
        return Way(lab.place(f"{prefix}client").netns, server.netns, str(server.address(4)), agent)

    ways = {"no agent": way("host:"), BASELINE: way("host:tracked-")}
    for netns in (ways[BASELINE].client, ways[BASELINE].server):
        run([*exec_prefix(netns), "nft", "-f", "-"], _RULE)
    ways["C floor"] = way("host:floor-", _start_floor(lab))
    ways["enforcer"] = way("bench/", lab.node("a").daemon.pid)
    if against is not None:
        ways["against"] = stack.enter_context(_OtherTree(against)).way
    return ways


def _start_floor(lab: Lab) -> int:
    """Build the C program and let it serve two namespaces by the enforcer's own rules; return its process id."""
    _FLOOR.parent.mkdir(exist_ok=True)
    source = str(_FLOOR_SOURCE)
    run(["gcc", "-O2", "-Wall", "-Wextra", "-o", str(_FLOOR), source, "-lnetfilter_queue"])
    paths = [netns_path(lab.place(f"host:floor-{end}").netns) for end in ("client", "server")]
    rules = EndpointRules((IFNAME,), QUEUE_NUMBER, frozenset(), QueueLimits(per_source=100_000, total=200_000))
    backend = choose_backend(RulesBackend.AUTO)
    for path in paths:
        netns_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            tune_conntrack(netns_fd)
            backend.apply(netns_fd, rules)
        finally:
            os.close(netns_fd)
    numbers = str(QUEUE_NUMBER), hex(released_mark(BY_ADDRESS))
    return lab.spawn("node:a", str(_FLOOR), *numbers, *map(str, paths)).pid


class _OtherTree:
    """The lab of another work tree, in a process of its own."""

    def __init__(self, tree: Path) -> None:
        python = tree / ".venv" / "bin" / "python"
        self._process = subprocess.Popen(
            [python, "-c", _OTHER_TREE], cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> _OtherTree:
        assert self._process.stdout is not None
        (client, _), (server, address), agent = json.loads(self._process.stdout.readline())
        self.way = Way(client, server, address, agent)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


class _Server:
    """The load's server of a way."""

    def __init__(self, way: Way) -> None:
        argv = [*exec_prefix(way.server), sys.executable, str(LOAD), "serve", way.address, str(PORT)]
        self._process = subprocess.Popen(argv, start_new_session=True)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, 9)  # It has forked.
        self._process.wait()


def _measure(way: Way, clients: int) -> dict[str, float]:
    count = CONNECTIONS // clients
    load = (sys.executable, str(LOAD), "connect", way.address, str(PORT), str(count), str(clients))
    before = 0.0 if way.agent is None else _cpu_s(way.agent)
    result: dict[str, float] = json.loads(run([*exec_prefix(way.client), *load]))
    if way.agent is not None:
        result["cpu_us"] = (_cpu_s(way.agent) - before) * 1e6 / (count * clients)
    return result


def _cpu_s(pid: int) -> float:
    """Return the CPU time that a process has used, seconds (proc_pid_stat(5): utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def row(what: str, rounds: Rounds, key: str) -> Row:
    """Return the median of a figure in each way's rounds; a way without the figure is left out."""
    figures = {name: [result[key] for result in results if key in result] for name, results in rounds.items()}
    return Row(what, {name: statistics.median(values) for name, values in figures.items() if values})


def print_rows(rows: Iterable[Row], baseline: str) -> None:
    """Print a table: each way's figure, and its ratio to the baseline's."""
    rows = list(rows)
    ways = list(rows[0].figures)
    print(f"{'':30}" + "".join(f"{way:>18}" for way in ways))
    for line in rows:
        print(f"{line.what:30}" + "".join(f"{_cell(line, way, baseline):>18}" for way in ways))


def _cell(line: Row, way: str, baseline: str) -> str:
    if way not in line.figures:
        return "-"
    if baseline not in line.figures:
        return f"{line.figures[way]:,.0f}"
    return f"{line.figures[way]:,.0f} ({line.figures[way] / line.figures[baseline]:.2f})"


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.connections")
    parser.add_argument("--against", type=Path, metavar="DIR", help="compare with the enforcer of another work tree")
    print_rows(run_rounds(parser.parse_args(argv).against), BASELINE)


if __name__ == "__main__":
    main(sys.argv[1:])
