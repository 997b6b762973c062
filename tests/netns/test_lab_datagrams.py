# SPDX-License-Identifier: Apache-2.0
"""Many UDP probes at once: what was answered, what was refused, and what a server got although nobody heard of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from enforcer_daemon.model import PodRef, Protocol
from tests.e2e.operation_world import FAMILIES, in_background
from trireme_lab import Lab, LabSpec, NodeSpec, Outcome, PodSpec, PortSpec, Probe
from trireme_lab.probe import run_probe

pytestmark = pytest.mark.kernel

DNS = PortSpec(53, Protocol.UDP)
CLOSED_PORT = 54
LONG_S = 20.0
"""Only for what is answered long before."""
WORLD = LabSpec(
    nodes=(NodeSpec.numbered("a", 1), NodeSpec.numbered("b", 2)),
    pods=(
        PodSpec(PodRef("x", "one"), "a", ports=(DNS,)),
        PodSpec(PodRef("x", "two"), "b", ports=(DNS,)),
        PodSpec(PodRef("x", "deaf"), "b", ports=(DNS,)),
        PodSpec(PodRef("x", "mute"), "b", ports=(DNS,)),
    ),
    enforcer=False,
)
VERSIONS = (4, 6)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(WORLD) as lab:
        for tool in ("iptables", "ip6tables"):
            lab.run("x/deaf", tool, "-A", "INPUT", "-p", "udp", "-j", "DROP")
            lab.run("x/mute", tool, "-A", "OUTPUT", "-p", "udp", "-j", "DROP")
        yield lab


def _probe(lab: Lab, target: str, version: int, port: int = DNS.number) -> Probe:
    return replace(lab.request("x/one", target, port, version), protocol=Protocol.UDP, timeout_s=LONG_S)


def test_answers_come_in_the_order_of_the_probes(lab: Lab) -> None:
    targets = [(target, version) for target in ("x/two", "x/one") for version in VERSIONS] * 20
    results = lab.ask_all([_probe(lab, *target) for target in targets], quiet_s=LONG_S)
    assert [(result.outcome, result.banner) for result in results] == [(Outcome.CONNECTED, name) for name, _ in targets]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_end_of_a_question_is_told_apart(lab: Lab, version: int) -> None:
    probes = [
        _probe(lab, "x/two", version),
        _probe(lab, "x/deaf", version),
        _probe(lab, "x/mute", version),
        _probe(lab, "x/two", version, CLOSED_PORT),
    ]
    results = lab.ask_all(probes, quiet_s=1.5)  # so long that the questions are sent a second time
    assert [result.outcome for result in results] == [
        Outcome.CONNECTED, Outcome.TIMED_OUT, Outcome.SILENT, Outcome.REFUSED,
    ]  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_an_empty_datagram_is_no_answer(lab: Lab, version: int) -> None:
    with lab.open_socket("x/two", FAMILIES[version], socket.SOCK_DGRAM) as server:
        server.bind((str(lab.address_of("x/two", version)), 0))
        server.settimeout(LONG_S)

        def answer() -> None:
            _, peer = server.recvfrom(100)
            server.sendto(b"", peer)

        for ask in (lambda probe: lab.ask_all([probe], quiet_s=0.5)[0], run_probe):
            with in_background(answer):
                probe = replace(_probe(lab, "x/two", version, server.getsockname()[1]), timeout_s=0.5)
                assert ask(probe).outcome is Outcome.TIMED_OUT


def test_nothing_asked_is_answered_at_once(lab: Lab) -> None:
    assert lab.ask_all([], quiet_s=LONG_S) == []
