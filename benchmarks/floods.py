# SPDX-License-Identifier: Apache-2.0
"""Connections between two pods while a third floods a fourth on the same node, in alternating rounds of one run.

The flood is as fast as one core makes it, by packet socket, so that only the victim's side has to judge it. What it
costs by itself (the sender, the bridge, the node's and the victim's kernel) is taken by the machine whatever stands at
the end: so the rate with the flood judged is compared with that while the same flood meets a rule of the victim's
kernel that drops it at once. The rate without any flood is shown beside.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from benchmarks.flood import write_frames
from benchmarks.flood_packets import FLOODS, Attacker, Flood
from enforcer_daemon.dataplane.addresses import interface
from enforcer_daemon.identity.authority import Authority
from enforcer_daemon.model import PodRef
from triremectl.lab.lab import Lab
from triremectl.lab.netns import netns_path
from triremectl.lab.world import NodeSpec, PodSpec, WorldSpec

PORT = 7000
ROUNDS = 5
_CONNECTIONS = 600
_CLIENTS = 8
_LOAD = Path(__file__).with_name("load.py")
_SENDER = Path(__file__).with_name("flood.py")
_START_S = 0.5
_ROLES = ("client", "server", "flooder", "victim")


def _policy(name: str, role: str, peer: str) -> dict[str, object]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": "bench", "name": name},
        "spec": {
            "podSelector": {"matchLabels": {"role": role}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"role": peer}}}]}],
        },
    }


WORLD = WorldSpec(
    nodes=(NodeSpec.numbered("a", 1),),
    pods=tuple(PodSpec(PodRef("bench", role), "a", {"role": role}) for role in _ROLES),
    manifests=(_policy("server", "server", "client"), _policy("victim", "victim", "flooder")),
)


def start_servers(lab: Lab) -> None:
    """Serve at the server and at the victim."""
    for place in ("bench/server", "bench/victim"):
        lab.spawn(place, sys.executable, str(_LOAD), "serve", str(lab.address_of(place)), str(PORT))
    time.sleep(_START_S)


def _authority(lab: Lab) -> Authority:
    key = load_pem_private_key((lab.directory / "ca-key.pem").read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("the lab's authority has another kind of key")
    return Authority(x509.load_pem_x509_certificate((lab.directory / "ca.pem").read_bytes()), key)


def _mac(lab: Lab, place: str) -> bytes:
    descriptor = os.open(netns_path(lab.place(place).netns), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return interface(descriptor, "eth0").mac
    finally:
        os.close(descriptor)


def record(lab: Lab, flood: Flood) -> Path:
    """Make the frames of a flood from the flooder to the victim; give their file."""
    addresses = (lab.address_of(place).packed for place in ("bench/flooder", "bench/victim"))
    attacker = Attacker(*addresses, PORT, _authority(lab), "flooder")
    head = _mac(lab, "bench/victim") + _mac(lab, "bench/flooder") + b"\x08\x00"
    path = lab.directory / f"{flood.__name__}.frames"
    write_frames(path, [head + packet for packet in flood(attacker)])
    return path


@contextmanager
def flooding(lab: Lab, frames: Path) -> Iterator[None]:
    """Let the flooder send all the time."""
    sender = lab.spawn("bench/flooder", sys.executable, str(_SENDER), str(frames), "eth0")
    try:
        time.sleep(_START_S)
        yield
        if sender.exit_status is not None:
            raise RuntimeError(f"the flood ended: {sender.tail()}")
    finally:
        sender.stop()


@contextmanager
def dropped_by_kernel(lab: Lab) -> Iterator[None]:
    """Let a rule in the victim's namespace drop what the flooder sends, before anything else looks at it."""
    rule = ("PREROUTING", "-s", str(lab.address_of("bench/flooder")), "-j", "DROP")
    lab.run("bench/victim", "iptables", "-t", "raw", "-I", *rule)
    try:
        yield
    finally:
        lab.run("bench/victim", "iptables", "-t", "raw", "-D", *rule)


def connect(
    lab: Lab,
    connections: int = _CONNECTIONS,
    clients: int = _CLIENTS,
    pair: tuple[str, str] = ("bench/client", "bench/server"),
) -> dict[str, float]:
    """Measure a pair of pods, by default the good one; raise LabError where a connection fails."""
    source, target = pair
    arguments = str(lab.address_of(target)), str(PORT), str(connections // clients), str(clients)
    output = lab.run(source, sys.executable, str(_LOAD), "connect", *arguments)
    result: dict[str, float] = json.loads(output)
    return result


@dataclass(frozen=True, slots=True)
class Row:
    """One flood; connections a second of the good pair."""

    what: str
    quiet: float
    dropped: float
    judged: float

    @property
    def ratio(self) -> float:
        """What the good pair keeps of what the machine leaves it."""
        return self.judged / self.dropped


def measure(lab: Lab, flood: Flood, rounds: int = ROUNDS, connections: int = _CONNECTIONS) -> Row:
    """Alternate: no flood, flood dropped by the kernel, flood judged; give the medians."""
    frames = record(lab, flood)
    results: dict[str, list[float]] = {"quiet": [], "dropped": [], "judged": []}
    for _ in range(rounds):
        results["quiet"].append(connect(lab, connections)["per_s"])
        with dropped_by_kernel(lab), flooding(lab, frames):
            results["dropped"].append(connect(lab, connections)["per_s"])
        with flooding(lab, frames):
            results["judged"].append(connect(lab, connections)["per_s"])
    return Row(flood.__name__, **{kind: statistics.median(rates) for kind, rates in results.items()})


def run(floods: Sequence[Flood] = FLOODS) -> list[Row]:
    """Measure every flood; takes about three minutes, as root."""
    with Lab(WORLD) as lab:
        start_servers(lab)
        connect(lab)  # Warms caches.
        return [measure(lab, flood) for flood in floods]


def main() -> None:
    """Print the table."""
    print(f"{'connections/s, 8 clients':32}{'no flood':>12}{'dropped':>12}{'judged':>12}{'ratio':>8}")
    for row in run():
        print(f"{row.what:32}{row.quiet:12.0f}{row.dropped:12.0f}{row.judged:12.0f}{row.ratio:8.2f}")


if __name__ == "__main__":
    main()
