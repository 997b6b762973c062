# SPDX-License-Identifier: Apache-2.0
"""A caged pod without any capability: every kind of socket, with every option, to every kind of address."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.attacks import origins, sweep
from tests.attacks import world as places
from tests.attacks.plain_pod import NEEDS_CAPABILITY, WAYS
from tests.attacks.witness import UNNUMBERED, Witness
from tests.attacks.world import AttackWorld, Variant
from trireme_lab import Lab, Tools
from trireme_lab.netns import exec_prefix

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
VARIANTS = [Variant("iptables", True), Variant("nft", False)]
EVERYWHERE = (
    *(places.NEAR, places.FAR, places.ISOLATED, places.FAR_ISOLATED),
    *(places.NEIGHBOR, places.OUTSIDE, places.EXTERNAL, "node:a", "node:b", places.FABRIC),
)
DATAGRAMS = frozenset(way.name for way in WAYS if way.kind != socket.SOCK_STREAM)
_PORTS = 2
_TIMEOUT_S = 60.0
_SHOWN = 30


@dataclass(frozen=True, slots=True)
class Tried:
    """One attempt of the program in the pod."""

    number: int
    way: str
    target: str
    version: int
    said: str
    """`sent`, or why the kernel refused the call."""


@pytest.fixture(scope="module")
def running(plugin: Path) -> Iterator[AttackWorld]:
    with Lab(places.world_spec(), Tools(plugin=plugin)) as lab:
        yield places.prepare(lab)


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def world(request: pytest.FixtureRequest, running: AttackWorld) -> Iterator[AttackWorld]:
    with places.applied(running, request.param):
        yield running


def _targets(world: AttackWorld) -> list[tuple[str, str, Sequence[int]]]:
    found: list[tuple[str, str, Sequence[int]]] = []
    for target in origins.targets(world, spare=("unspecified", "loopback", "service-unknown-port")):
        for address in target.addresses.values():
            is_on_link = address.is_link_local or address in places.LINK_GROUPS
            scope = "%eth0" if address.version == 6 and is_on_link else ""
            found.append((target.kind, f"{address}{scope}", target.ports[:_PORTS]))
    return found


def _try_all(world: AttackWorld, pod: str, tag: bytes) -> list[Tried]:
    """Run the program in the pod, without capabilities; return what it tried."""
    program = [*WITHOUT_CAPABILITIES, sys.executable, "-m", "tests.attacks.plain_pod"]
    done = subprocess.run(
        [*exec_prefix(world.netns(pod)), *program],
        input=json.dumps({"tag": tag.hex(), "targets": _targets(world)}),
        capture_output=True,
        text=True,
        check=True,
        timeout=_TIMEOUT_S,
        cwd=ROOT,
    )
    return [Tried(*entry) for entry in json.loads(done.stdout)]


def _arrived(witnesses: Mapping[str, Witness], tried: Sequence[Tried]) -> list[tuple[str, Tried]]:
    known = {entry.number: entry for entry in tried}
    unknown = Tried(UNNUMBERED, "unknown", "unknown", 0, "")
    return [
        (place, known.get(number, unknown))
        for place, witness in witnesses.items()
        for number in witness.arrived
        if not sweep.CONTROL <= number < sweep.CONTROL + 0x1_0000
    ]


def test_nothing_that_plain_sockets_send_leaves_a_caged_pod(world: AttackWorld) -> None:
    tag = sweep.fresh_tag()
    with places.witnesses(world, tag, *EVERYWHERE) as witnesses:
        tried = _try_all(world, places.CAGED, tag)
        sweep.settle(world, witnesses, tag)
        arrived = _arrived(witnesses, tried)
    assert not arrived, "\n".join(map(str, arrived[:_SHOWN]))
    assert [entry for entry in tried if entry.said == "answered"] == []
    sent = {entry.way for entry in tried if entry.said == "sent"}
    assert sent.isdisjoint(NEEDS_CAPABILITY), "the program has capabilities"
    assert len(sent) > len(WAYS) // 2


def test_what_plain_sockets_of_an_unrestricted_pod_send_arrives(world: AttackWorld) -> None:
    tag = sweep.fresh_tag()
    with places.witnesses(world, tag, *EVERYWHERE) as witnesses:
        tried = _try_all(world, places.FREE, tag)
        sweep.settle(world, witnesses, tag)
        arrived = {(entry.way, entry.target) for _, entry in _arrived(witnesses, tried)}
    datagrams = {(entry.way, entry.target) for entry in tried if entry.said == "sent" and entry.way.startswith("udp")}
    reached = {target for _, target in arrived}
    assert reached >= {"near-pod", "far-pod", "neighbor", "outside", "own-node", "service-pods", "node-port-other"}
    assert {way for way, _ in datagrams} <= {way for way, _ in arrived}
    streams = {entry.way for entry in tried if entry.said in ("sent", "answered") and entry.way not in DATAGRAMS}
    assert streams <= {entry.way for entry in tried if entry.said == "answered"}
