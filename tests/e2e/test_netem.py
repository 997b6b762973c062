# SPDX-License-Identifier: Apache-2.0
"""Nodes on a bad network: what the kernel's network emulator loses, delays, repeats and reorders, both ways.

Without the emulator in the kernel (CONFIG_NET_SCH_NETEM) the tests are skipped; `make test-vm` boots one that has it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.bad_network import bad_network
from tests.e2e.operation_world import FAMILIES, HTTP, NODES, app, connection, in_background, pod, policy, transfer
from trireme_lab import HostSpec, Lab, LabSpec, Tools

pytestmark = [pytest.mark.kernel, pytest.mark.slow, pytest.mark.stock_kernel]

ENFORCED = ("x/client", "x/server")
PLAIN = ("host:client", "host:server")
"""Pods on the same nodes that nobody enforces: the same network without the agent."""
VERSIONS = [4, 6]
CONNECTIONS = 500
"""With the agent, and as many without."""
WITHOUT_LOSS = 100
"""Likewise, to know what this machine takes where nothing is lost."""
ROUNDS = 2
AT_ONCE = 12
"""Few enough that an emulated machine is not what they wait for."""
WORSE_BY = 1.3
IGNORED_AFTER_S = 60.0


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    world = LabSpec(
        NODES,
        pods=(pod("client", "a"), pod("server", "b")),
        hosts=(HostSpec("client", node="a"), HostSpec("server", ports=(HTTP,), node="b")),
        manifests=(policy("server", "server", ingress=[{"from": [app("client")]}]),),
    )
    with Lab(world, Tools(plugin=plugin)) as lab:
        for source, target in (ENFORCED, PLAIN):
            for version in VERSIONS:
                assert lab.probe(source, target, HTTP.number, version).outcome.is_allowed
        yield lab


def _exchange_s(lab: Lab, ends: tuple[str, str], version: int, *, speaks: bool) -> float:
    """Connect, hear the server's banner, and, where the client speaks too, the echo; return how long it took."""
    source, target = ends
    words = os.urandom(16).hex().encode() if speaks else b"\n"
    heard, started = b"", time.monotonic()
    with lab.open_socket(source, FAMILIES[version]) as sock:
        sock.settimeout(IGNORED_AFTER_S)
        sock.connect((str(lab.place(target).address(version)), HTTP.number))
        if speaks:
            sock.sendall(words)
        while not heard.endswith(words):
            more = sock.recv(1_000)
            assert more, heard
            heard += more
    assert heard.startswith(f"{target}\n".encode())
    return time.monotonic() - started


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[math.ceil(share * len(values)) - 1]


def test_five_percent_loss_each_way(lab: Lab) -> None:
    """All connections come about, and the loss costs the slowest hardly more time than without the agent.

    What connections take on this machine without loss does not count. The slowest hundredth are some with two losses of
    a second each, so chance may put one more of them on either side: what a first round leaves in doubt, a second one
    decides.
    """
    with bad_network(lab, "delay", "10ms"):
        clean = _took(lab, WITHOUT_LOSS)
    took: dict[tuple[str, str], list[float]] = {PLAIN: [], ENFORCED: []}
    with bad_network(lab, "delay", "10ms", "loss", "5%"):
        for _ in range(ROUNDS):
            for ends, seconds in _took(lab, CONNECTIONS).items():
                took[ends] += seconds
            plain, enforced = (
                _percentile(took[ends], 0.99) - _percentile(clean[ends], 0.5) for ends in (PLAIN, ENFORCED)
            )
            print(f"99th percentile: {enforced:.3f} s more with the agent, {plain:.3f} s without")  # noqa: T201
            if enforced <= WORSE_BY * plain:
                return
    raise AssertionError(f"99th percentile: {enforced:.3f} s more with the agent, {plain:.3f} s without")


def _took(lab: Lab, count: int) -> dict[tuple[str, str], list[float]]:
    """Connect so often with the agent and without; return what each connection took."""
    took: dict[tuple[str, str], list[float]] = {PLAIN: [], ENFORCED: []}
    for ends, seconds in _alternate(lab, count):
        took[ends].append(seconds)
    return took


def _alternate(lab: Lab, count: int) -> Iterator[tuple[tuple[str, str], float]]:
    """Connect so often with the agent and without, in both families, in turn, a few at a time; give what each took."""
    attempts = [
        (ends, version, n % 2 == 0) for n in range(count // 2) for version in VERSIONS for ends in (PLAIN, ENFORCED)
    ]
    with ThreadPoolExecutor(AT_ONCE) as executor:
        results = executor.map(lambda attempt: _exchange_s(lab, *attempt[:2], speaks=attempt[2]), attempts)
        for (ends, _, _), seconds in zip(attempts, results, strict=True):
            yield ends, seconds


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("speaks", [True, False], ids=["both speak", "the server speaks"])
@pytest.mark.parametrize(
    "what",
    [
        ("delay", "60ms", "20ms"),
        ("delay", "10ms", "duplicate", "50%"),
        ("delay", "20ms", "reorder", "50%"),
        ("delay", "20ms", "15ms", "duplicate", "20%", "reorder", "20%", "loss", "2%"),
    ],
    ids=["delay", "duplicates", "reordering", "all together"],
)
def test_connections_come_about(lab: Lab, what: tuple[str, ...], version: int, *, speaks: bool) -> None:
    with bad_network(lab, *what), ThreadPoolExecutor(AT_ONCE) as executor:
        futures = [executor.submit(_exchange_s, lab, ENFORCED, version, speaks=speaks) for _ in range(50)]
        assert all(future.result() < IGNORED_AFTER_S for future in futures)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_transferred_arrives_as_it_was(lab: Lab, version: int) -> None:
    with (
        bad_network(lab, "delay", "5ms", "3ms", "duplicate", "5%", "reorder", "20%", "loss", "1%"),
        connection(lab, *ENFORCED, version) as (client, server),
        in_background(lambda: transfer(client, server, 1)),
    ):
        transfer(server, client, 1)
