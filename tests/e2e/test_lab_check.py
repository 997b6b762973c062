# SPDX-License-Identifier: Apache-2.0
"""Cases on the wire: every probe by real packets, and every denial before connect() returns."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from enforcer_daemon.packet.tcp import ACK, RST, SYN, SYN_ACK, Segment
from tests.e2e.operation_world import NODES, app, pod, policy, segments
from trireme_lab import Lab, LabSpec, Outcome, Tools
from trireme_lab.probe import run_probe

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
OWN_CASES = ROOT / "tests" / "vectors" / "cases" / "wire.jsonl"
SHARED_CASES = ROOT.parent / "shared" / "conformance" / "cases.jsonl.gz"
SOME_CASES = SHARED_CASES if SHARED_CASES.exists() else OWN_CASES
TIMEOUT_S = 280
PORT = 8080


def _check(plugin: Path, *arguments: object, text: str = "") -> tuple[int, list[str]]:
    """Run `triremectl lab check`; return its exit status and what it printed, by lines."""
    command = [sys.executable, "-m", "triremectl", "lab", "check", "--plugin", str(plugin), *map(str, arguments)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def _own_case(name: str) -> dict[str, Any]:
    cases = map(json.loads, OWN_CASES.read_text(encoding="utf-8").splitlines())
    return next(case for case in cases if case["name"] == name)


def test_own_cases_of_both_families_nodes_and_pods_that_dial_themselves(plugin: Path) -> None:
    status, lines = _check(plugin, OWN_CASES)
    probes = [probe for line in OWN_CASES.read_text().splitlines() for probe in json.loads(line)["probes"]]
    count = sum(probe["protocol"] != "SCTP" for probe in probes)
    assert lines[-1].startswith(f"{count} of {count} probes as expected")
    assert lines[:-1] == ["1 SCTP probes not probed"]
    assert status == 0


def test_a_sample_of_published_suites(plugin: Path) -> None:
    status, lines = _check(plugin, SOME_CASES, "--sample", 30, "--seed", 1)
    assert status == 0, lines


def test_denials_that_are_silent(plugin: Path) -> None:
    status, lines = _check(plugin, OWN_CASES, "--deny-with", "drop", "--timeout", 0.7)
    assert status == 0, lines


def test_a_difference_is_told_with_its_explanation(plugin: Path) -> None:
    case = _own_case("each end refuses for itself")
    for probe in case["probes"][:2]:
        probe["expected"] = "deny" if probe["expected"] == "allow" else "allow"
        probe.pop("denied_by", None)
    status, lines = _check(plugin, "-", text=json.dumps(case))
    assert status == 1
    assert lines == [
        "each end refuses for itself: ops/backup -> shop/db TCP 5432: expected deny, found connected",
        "  egress of ops/backup: allowed (policy) by ops/quiet[0]",
        "  ingress of shop/db: allowed (policy) by shop/guarded[0]",
        "each end refuses for itself: ops/probe -> shop/db TCP 5432: expected allow, found refused",
        "  egress of ops/probe: allowed (policy) by ops/quiet[0]",
        "  ingress of shop/db: denied (ingress-denied); isolated by shop/guarded",
        "  the enforcer of shop/db: ingress-denied (ingress) by shop/guarded",
        "4 of 6 probes as expected (1 cases)",
    ]


def test_packed_cases_are_read(plugin: Path, tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(_own_case("IPv6 alone")).encode()))
    assert _check(plugin, file) == (0, ["7 of 7 probes as expected (1 cases)"])


CLOSED_SERVER = policy("closed", "server", ingress=[{"from": [app("other")]}])
CLOSED_CLIENT = policy("closed", "client", egress=[{"to": [app("other")]}])
SILENCED_CLIENT = policy("closed", "client", egress=[])


@pytest.fixture(params=["drop", "reset"])
def closed(request: pytest.FixtureRequest, plugin: Path) -> Iterator[Lab]:
    """Run a client and a server on two nodes, with denials in each of the two ways."""
    world = LabSpec(NODES, pods=(pod("client", "a"), pod("server", "b")), settings={"denyWith": request.param})
    with Lab(world, Tools(plugin=plugin)) as lab:
        yield lab


def _dial(lab: Lab, version: int) -> tuple[Outcome, list[Segment]]:
    """Dial the server; return what the client saw, and the segments between the nodes."""
    with lab.capture("node:a") as capture:
        request = lab.request("x/client", "x/server", PORT, version)
        outcome = run_probe(replace(request, timeout_s=1.5)).outcome
        return outcome, segments(capture.close(), PORT)


@pytest.mark.parametrize("version", [4, 6])
def test_ingress_is_denied_at_the_syn(closed: Lab, version: int) -> None:
    closed.apply(CLOSED_SERVER)
    outcome, seen = _dial(closed, version)
    assert outcome in (Outcome.TIMED_OUT, Outcome.REFUSED)
    assert seen[0].flags == SYN
    assert all(segment.flags == SYN or segment.flags & RST for segment in seen)  # the server never answers


@pytest.mark.parametrize("version", [4, 6])
def test_egress_is_denied_at_the_syn_ack(closed: Lab, version: int) -> None:
    closed.apply(CLOSED_CLIENT)
    outcome, seen = _dial(closed, version)
    assert outcome in (Outcome.TIMED_OUT, Outcome.REFUSED)
    assert [segment.flags for segment in seen[:2]] == [SYN, SYN_ACK]
    # The client never sends its ACK: its connect() has not returned.
    assert all(segment.flags in (SYN, SYN_ACK) or segment.flags & RST for segment in seen)
    assert not any(segment.flags == ACK for segment in seen)


def test_a_pod_that_nothing_is_allowed_sends_nothing(closed: Lab) -> None:
    closed.apply(SILENCED_CLIENT)
    outcome, seen = _dial(closed, 4)
    assert outcome in (Outcome.TIMED_OUT, Outcome.REFUSED)
    assert seen == []


def test_what_a_policy_allows_is_the_whole_handshake(closed: Lab) -> None:
    closed.apply(policy("open", "server", ingress=[{"from": [app("client")]}]))
    outcome, seen = _dial(closed, 4)
    assert outcome is Outcome.CONNECTED
    assert [segment.flags for segment in seen[:3]] == [SYN, SYN_ACK, ACK]
