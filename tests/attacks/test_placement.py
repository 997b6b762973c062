# SPDX-License-Identifier: Apache-2.0
"""Placement is no weapon: who deletes pods of his own by force takes no node, and no other pod, from anybody."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from enforcer_daemon.handshake.placement import MAX_ABSENT
from enforcer_daemon.kube.placement import PlacementLimits
from tests.e2e.operation_world import HTTP, NODES, RESET, connection, denials, outcome, pod
from tests.kube.lab import LIMITS, KubeLab
from trireme_lab import LabSpec, Outcome, Tools

pytestmark = pytest.mark.kernel

_PATIENCE_S = 20.0
VICTIMS = (pod("client", "b", namespace="victim"), pod("late", "b", namespace="victim"))
MINE = tuple(pod(f"mine-{number}", "b") for number in range(MAX_ABSENT + 1))


@pytest.fixture
def lab(plugin: Path) -> Iterator[KubeLab]:
    limits = replace(LIMITS, placement=PlacementLimits(max_lookups_per_s=100.0, retry_s=0.2))
    namespaces: dict[str, dict[str, str]] = {"x": {}, "victim": {}}
    pods = (pod("server", "a", namespace="victim"), *VICTIMS, *MINE)
    world = LabSpec(NODES, namespaces, pods=pods, settings={**RESET, "kubernetes": {"verifyPlacement": True}})
    with KubeLab(world, Tools(plugin=plugin), limits=limits) as lab:
        yield lab


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be so"
        time.sleep(0.02)


def counted(lab: KubeLab, result: str) -> float:
    text = str(lab.node("a").admin("metrics"))
    found = re.search(rf'trireme_placement_checks_total{{result="{result}"}} ([\d.e+]+)', text)
    return float(found[1]) if found else 0.0


def status(lab: KubeLab) -> dict[str, Any]:
    return dict(lab.node("a").status())


def dials(lab: KubeLab, name: str, version: int = 4) -> bool:
    return outcome(lab, name, "victim/server", HTTP.number, version) is Outcome.CONNECTED


def test_pods_that_were_deleted_by_force_take_their_node_from_nobody(lab: KubeLab) -> None:
    assert dials(lab, "victim/client")
    wait_for(lambda: counted(lab, "here") >= 1)
    with connection(lab, "victim/client", "victim/server") as (client, server):
        for spec in MINE:  # The objects go, the processes live on.
            lab.api.delete("Pod", "x", spec.pod.name)
        for spec in MINE[:MAX_ABSENT]:
            assert dials(lab, str(spec.pod))  # The first contact waits for nothing.
        wait_for(lambda: counted(lab, "absent") >= MAX_ABSENT)
        assert status(lab)["denied_nodes"] == []
        for spec in MINE[:MAX_ABSENT]:
            assert not dials(lab, str(spec.pod))
        for version in (4, 6):
            assert dials(lab, "victim/client", version)
            assert dials(lab, "victim/late", version)
        client.send(b"still here")
        assert server.recv(10) == b"still here"
    # More of them are looked up before they are believed.
    assert not dials(lab, str(MINE[-1].pod))
    assert {"misplaced-pod", "unconfirmed-pod"} <= set(denials(lab, "victim/server"))


def test_a_connection_with_a_pod_that_the_cluster_does_not_have_ends(lab: KubeLab) -> None:
    lab.api.delete("Pod", "x", "mine-0")
    with connection(lab, "x/mine-0", "victim/server") as (_, server), pytest.raises(ConnectionError):
        server.recv(1)
    assert status(lab)["denied_nodes"] == []


def test_a_pod_of_another_node_in_the_clothes_of_a_static_one_denies_nobody(lab: KubeLab) -> None:
    """Its annotation says the UID of the user's own pod on node b, which was deleted by force."""
    uid = lab.api.get("Pod", "x", "mine-0")["metadata"]["uid"]
    lab.api.delete("Pod", "x", "mine-0")
    annotations = {"kubernetes.io/config.hash": uid, "kubernetes.io/config.mirror": uid}
    lab.api.put({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "mine-0", "namespace": "x", "uid": "another", "annotations": annotations},
        "spec": {"nodeName": "c"}, "status": {"phase": "Running"},
    })  # fmt: skip
    assert dials(lab, "x/mine-0")
    wait_for(lambda: counted(lab, "absent") >= 1)
    assert status(lab)["denied_nodes"] == []
    assert dials(lab, "victim/client")
    assert not dials(lab, "x/mine-0")
