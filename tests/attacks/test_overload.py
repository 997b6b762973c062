# SPDX-License-Identifier: Apache-2.0
"""What never gives way to a flood: open connections, the node's probes, policy changes, new pods and operators.

docs/overload.md states the order in which the enforcer sheds work. These are its last lines, while one pod floods
another as fast as one core can, in every way that costs the enforcer most.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from benchmarks import flood_packets
from benchmarks.flood_packets import Flood
from benchmarks.floods import WORLD, connect, flooding, record, shares, start_servers
from benchmarks.shares import SharesError, WeighedLab
from enforcer_daemon.model import PodRef
from trireme_lab import Lab, LabSpec, Outcome, PodSpec, PortSpec, Tools
from trireme_lab.spec import Manifest

pytestmark = pytest.mark.kernel

FLOODS = [flood_packets.half_open, flood_packets.token_churn, flood_packets.unknown_data, flood_packets.datagrams]
ECHOES = 200
ECHO_PATIENCE_S = 1.0
"""Longer than any echo in the kernel takes, shorter than a retransmission that a dropped segment would need twice."""
PROBE_PATIENCE_S = 2.0
CHANGE_PATIENCE_S = 1.0
POD_PATIENCE_S = 5.0
"""For the whole CNI chain of a new pod, of which the enforcer's part is a fraction, on a machine that is full."""
SERVED = PortSpec(8080)


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    world = LabSpec(WORLD.nodes, pods=WORLD.pods, manifests=WORLD.manifests, settings=WORLD.settings)
    with ExitStack() as stack:
        lab = Lab(world, Tools(plugin=plugin))
        with suppress(SharesError):
            lab = WeighedLab(world, stack.enter_context(shares()), Tools(plugin=plugin))
        stack.enter_context(lab)
        start_servers(lab)
        for place in ("bench/server", "bench/victim"):
            lab.listen(place, SERVED)
        connect(lab, 80)
        yield lab


@pytest.fixture(params=FLOODS, ids=lambda flood: str(flood.__name__))
def flooded(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Yield the lab while the victim is flooded."""
    flood: Flood = request.param
    frames = record(lab, flood)
    with opened(lab) as connection:
        request.node.connection = connection
        with flooding(lab, frames):
            yield lab


def opened(lab: Lab) -> socket.socket:
    """Open a connection of the honest pair."""
    sock = lab.open_socket("bench/client")
    sock.settimeout(ECHO_PATIENCE_S)
    sock.connect((str(lab.address_of("bench/server")), SERVED.number))
    return sock


def echo(connection: socket.socket, text: bytes) -> float:
    """Send and await it back; return the seconds that it took."""
    started = time.monotonic()
    connection.sendall(text)
    while text:
        received = connection.recv(len(text))
        assert received, "the connection was closed"
        assert text.startswith(received)
        text = text[len(received) :]
    return time.monotonic() - started


def test_what_never_gives_way(flooded: Lab, request: pytest.FixtureRequest) -> None:
    lab, connection = flooded, request.node.connection
    banner = connection.recv(1_000)
    assert banner
    for number in range(ECHOES):
        echo(connection, f"message {number:06}\n".encode())

    # The node reaches the flooded pod itself: kubelet's probes must not restart it.
    started = time.monotonic()
    assert lab.probe("node:a", "bench/victim", SERVED.number).outcome is Outcome.CONNECTED
    assert time.monotonic() - started < PROBE_PATIENCE_S

    # A change of another pod's policy is in force at once, in both directions.
    for admitted, outcome in (("nobody", Outcome.TIMED_OUT), ("client", Outcome.CONNECTED)):
        started = time.monotonic()
        assert lab.apply(server_policy(admitted))
        assert time.monotonic() - started < CHANGE_PATIENCE_S
        assert lab.probe("bench/client", "bench/server", SERVED.number).outcome is outcome

    # A new pod comes, connects, and goes.
    spec = PodSpec(PodRef("bench", "late"), "a", {"role": "client"})
    started = time.monotonic()
    lab.add_pod(spec)
    assert lab.probe("bench/late", "bench/server", SERVED.number).outcome is Outcome.CONNECTED
    lab.remove_pod("bench/late")
    assert time.monotonic() - started < POD_PATIENCE_S

    # Operators are answered.
    started = time.monotonic()
    assert lab.node("a").status()["ready"] is True
    assert time.monotonic() - started < CHANGE_PATIENCE_S


def server_policy(admitted: str) -> Manifest:
    """Admit pods of one role to the honest server, in place of the policy that it starts with."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "server", "namespace": "bench"},
        "spec": {
            "podSelector": {"matchLabels": {"role": "server"}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"role": admitted}}}]}],
        },
    }
