# SPDX-License-Identifier: Apache-2.0
"""Connections between two pods while a third floods a fourth on the same node, in rounds of one run.

The flood is as fast as one core makes it, by packet socket, so that only the victim's side has to evaluate it. The rate
of the good pair is compared with that without a flood. Beside it stand the rate while the same flood meets a rule of
the victim's kernel that drops it at once, and the rate while the third pod only spins and sends nothing: so much of the
machine is the sender's own, whatever becomes of its packets. All have the CPU shares that kubelet would give them.
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
from benchmarks.shares import ENFORCER, Shares, WeighedLab, chart_request
from enforcer_daemon.daemon.limits import DaemonLimits
from enforcer_daemon.dataplane.addresses import interface
from enforcer_daemon.handshake.limits import HandshakeLimits
from enforcer_daemon.identity.authority import Authority
from enforcer_daemon.model import PodRef
from trireme_lab.enforcer import enforcer_with
from trireme_lab.lab import Lab
from trireme_lab.netns import netns_path
from trireme_lab.spec import LabSpec, NodeSpec, PodSpec
from trireme_lab.tools import Tools

PORT = 7000
ROUNDS = 5
_CONNECTIONS = 2_400
_CLIENTS = 8
_LOAD = Path(__file__).with_name("load.py")
_SENDER = Path(__file__).with_name("flood.py")
_START_S = 0.5
_REST_S = 120.0
_SMALL_REQUEST = 100
"""Thousandths of a CPU."""
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


WORLD = LabSpec(
    nodes=(NodeSpec.numbered("a", 1),),
    pods=tuple(PodSpec(PodRef("bench", role), "a", {"role": role}) for role in _ROLES),
    manifests=(_policy("server", "server", "client"), _policy("victim", "victim", "flooder")),
)
LIMITS = DaemonLimits(handshake=HandshakeLimits(timeout_s=2.0))
"""Half-open flows are evicted soon, so that rounds with and without a flood can alternate."""


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
    own, target = (lab.address_of(place).packed for place in ("bench/flooder", "bench/victim"))
    attacker = Attacker(own, target, PORT, _authority(lab), "flooder")
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
    """Measure a pair of pods, by default the good one; raise LabError if a connection fails."""
    source, target = pair
    arguments = str(lab.address_of(target)), str(PORT), str(connections // clients), str(clients)
    output = lab.run(source, sys.executable, str(_LOAD), "connect", *arguments)
    result: dict[str, float] = json.loads(output)
    return result


@dataclass(frozen=True, slots=True)
class Row:
    """One flood, or a pod that spins; connections a second of the good pair."""

    what: str
    quiet: float
    judged: float
    dropped: float | None = None

    @property
    def ratio(self) -> float:
        """What the good pair keeps."""
        return self.judged / self.quiet


@contextmanager
def spinning(lab: Lab) -> Iterator[None]:
    """Let the flooder's pod use one core, and send nothing."""
    process = lab.spawn("bench/flooder", sys.executable, "-c", "while True: pass")
    try:
        time.sleep(_START_S)
        yield
    finally:
        process.stop()


def measure_spinning(lab: Lab, rounds: int = ROUNDS) -> Row:
    """Alternate: nothing, a pod that spins; give the medians."""
    quiet, beside = [], []
    for _ in range(rounds):
        quiet.append(connect(lab)["per_s"])
        with spinning(lab):
            beside.append(connect(lab)["per_s"])
    return Row("(spins)", statistics.median(quiet), statistics.median(beside))


def _await_rest(lab: Lab) -> None:
    """Wait until the last flood's handshakes are given up, which is work of its own."""
    deadline = time.monotonic() + _REST_S
    while any(endpoint["half_open_flows"] for endpoint in lab.node("a").endpoints()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"handshakes of a flood are left after {_REST_S:.0f} s")
        time.sleep(_START_S)


def measure(lab: Lab, flood: Flood, rounds: int = ROUNDS, connections: int = _CONNECTIONS) -> Row:
    """Alternate: no flood, flood dropped by the victim's kernel, flood judged; give the medians.

    What a judged flood leaves behind would slow a quiet round down, and so flatter the ratio: that is waited for.
    """
    frames = record(lab, flood)
    quiet, dropped, judged = [], [], []
    for _ in range(rounds):
        _await_rest(lab)
        quiet.append(connect(lab, connections)["per_s"])
        with dropped_by_kernel(lab), flooding(lab, frames):
            dropped.append(connect(lab, connections)["per_s"])
        with flooding(lab, frames):
            judged.append(connect(lab, connections)["per_s"])
    return Row(flood.__name__, statistics.median(quiet), statistics.median(judged), statistics.median(dropped))


def shares(request: int = 0) -> Shares:
    """Let each pod request so many thousandths of a CPU, and the enforcer what the chart says."""
    return Shares({ENFORCER: chart_request(), **{f"bench/{role}": request for role in _ROLES}})


def run(request: int = 0, floods: Sequence[Flood] = FLOODS) -> list[Row]:
    """Measure every flood, where each pod requests so much; takes about five minutes, as root."""
    with shares(request) as given, WeighedLab(WORLD, given, Tools(enforcer=enforcer_with(LIMITS))) as lab:
        start_servers(lab)
        connect(lab)  # Warms caches.
        return [measure_spinning(lab), *(measure(lab, flood) for flood in floods)]


def main() -> None:
    """Print a table for pods that request nothing, and one for pods that request as much as small ones do."""
    for request in (0, _SMALL_REQUEST):
        print(
            f"{f'connections/s, pods request {request}m':32}{'no flood':>12}{'dropped':>12}{'judged':>12}{'ratio':>8}"
        )
        for row in run(request):
            dropped = "" if row.dropped is None else f"{row.dropped:.0f}"
            print(f"{row.what:32}{row.quiet:12.0f}{dropped:>12}{row.judged:12.0f}{row.ratio:8.2f}")


if __name__ == "__main__":
    main()
