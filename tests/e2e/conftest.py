# SPDX-License-Identifier: Apache-2.0
"""The whole product as tests use it: the plugin's bundle, and a world of two nodes."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from enforcer_daemon.model import PodRef
from tests.e2e.attackers import ignore_raw_ports
from triremectl.lab import HostSpec, Lab, NodeSpec, PodSpec, PortSpec, Tools, WorldSpec

ROOT = Path(__file__).resolve().parents[2]
SERVED_PORT = 5432
ATTACKING_HOSTS = ("host:near", "host:distant")


def _policy(name: str, app: str | None, spec: dict[str, object]) -> dict[str, object]:
    selector = {} if app is None else {"matchLabels": {"app": app}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": "shop", "name": name},
        "spec": {"podSelector": selector, **spec},
    }


def _pod(name: str, node: str, app: str, *ports: PortSpec) -> PodSpec:
    return PodSpec(PodRef("shop", name), node, labels={"app": app}, ports=ports)


WORLD = WorldSpec(
    nodes=(NodeSpec.numbered("a", 1), NodeSpec.numbered("b", 2)),
    namespaces={"shop": {}},
    pods=(
        _pod("db", "a", "db", PortSpec(SERVED_PORT)),
        _pod("web", "a", "web"),
        _pod("far-web", "b", "web"),
        _pod("caged", "a", "caged"),
    ),
    # Pods that nobody enforces: one on the server's node, one on the other.
    hosts=(HostSpec("near", node="a"), HostSpec("distant", node="b")),
    manifests=(
        _policy("default-deny", None, {"policyTypes": ["Ingress"]}),
        _policy(
            "db-from-web",
            "db",
            {"policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}]}]},
        ),
        _policy("caged", "caged", {"policyTypes": ["Egress"]}),
    ),
)


@pytest.fixture(scope="session")
def plugin() -> Path:
    """Return the plugin's bundle, built where it is missing."""
    bundle = ROOT / "dist" / "trireme" / "trireme"
    if not bundle.exists():
        subprocess.run(["make", "plugin"], cwd=ROOT, check=True)
    return bundle


@pytest.fixture(scope="module")
def world(plugin: Path) -> Iterator[Lab]:
    """Run a world of two nodes, a server that admits pods with one label, and attackers."""
    with Lab(WORLD, Tools(plugin=plugin)) as lab:
        for host in ATTACKING_HOSTS:
            ignore_raw_ports(lab, host)
        yield lab


_ports = itertools.count(6000)


@pytest.fixture
def port() -> int:
    """Return a port that no other test uses, so that denials at it are this test's."""
    return next(_ports)
