# SPDX-License-Identifier: Apache-2.0
"""The whole product as tests use it: the plugin's bundle, and a world of two nodes."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.attack import ATTACKING_HOSTS, WORLD
from tests.e2e.attackers import grow_old, ignore_raw_ports
from trireme_lab import Lab, Tools

ROOT = Path(__file__).resolve().parents[2]


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
        grow_old(lab)
        yield lab


_ports = itertools.count(6000)


@pytest.fixture
def port() -> int:
    """Return a port that no other test uses, so that denials at it are this test's."""
    return next(_ports)
