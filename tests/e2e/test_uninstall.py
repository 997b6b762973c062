# SPDX-License-Identifier: Apache-2.0
"""The product is removed from a node: its pods go on, nothing of ours is left in the kernel, and nobody evaluates
them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.operation_world import HTTP, NODES, connection, outcome, pod, rules_of
from trireme_lab import Lab, LabSpec, Outcome, Tools
from trireme_lab.netns import exec_prefix
from trireme_lab.node import Node

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    pods = (pod("one", "a"), pod("two", "a"))
    with Lab(LabSpec(NODES[:1], pods=pods), Tools(plugin=plugin)) as lab:
        yield lab


def uninstall(node: Node) -> subprocess.CompletedProcess[str]:
    program = (sys.executable, "-m", "enforcer_daemon", "--config", str(node.directories.settings), "--uninstall")
    return subprocess.run([*exec_prefix(node.netns), *program], check=False, capture_output=True, text=True, timeout=60)


def test_pods_go_on_and_nothing_of_ours_is_left(lab: Lab) -> None:
    node = lab.node("a")
    with connection(lab, "x/one", "x/two") as (client, server):
        refused = uninstall(node)
        assert (refused.returncode, "another daemon" in refused.stderr) == (1, True), refused.stderr
        assert node.stop() == 0
        assert outcome(lab, "x/one", "x/two", HTTP.number).is_denied  # A daemon that is away evaluates nobody.
        for _ in range(2):  # The second time there is nothing to do.
            done = uninstall(node)
            assert done.returncode == 0, done.stderr
        client.send(b"still here")
        assert server.recv(10) == b"still here"
    for version in (4, 6):
        assert outcome(lab, "x/one", "x/two", HTTP.number, version) is Outcome.CONNECTED
    for place in ("x/one", "x/two"):
        rules = rules_of(lab, place) + lab.run(place, "nft", "list", "ruleset")
        assert re.findall("(?i)trireme|queue", rules) == []
    assert "trireme" not in lab.run("node:a", "nft", "list", "tables")
    assert [*(node.directories.run / "endpoints").iterdir(), *(node.directories.run / "flows").iterdir()] == []
