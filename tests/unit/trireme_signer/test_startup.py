# SPDX-License-Identifier: Apache-2.0
"""Which nodes lose the startup taint, and what else of them stays as it is."""

from __future__ import annotations

from typing import Any

import pytest

from trireme_signer.issuance import Grant
from trireme_signer.startup import DEFAULT_TAINT, Enforcer, enforcer_of, may_lose, without_taint

GRANT = Grant("trireme.io/node", "cluster.local", "trireme", "trireme-enforcer", "trireme-enforcer", 86_400)
EARLY, LATE = "2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"
OURS = {"key": DEFAULT_TAINT, "effect": "NoSchedule"}
OTHER = {"key": "example.com/gpu", "value": "a", "effect": "NoExecute"}


def node(*taints: dict[str, str], created: str = EARLY) -> dict[str, Any]:
    metadata = {"name": "node-1", "creationTimestamp": created, "resourceVersion": "7"}
    return {"metadata": metadata, "spec": {"taints": list(taints)}}


def pod(ready: str = "True", owner: str = "trireme-enforcer", **metadata: str) -> dict[str, Any]:
    owners = [{"kind": "DaemonSet", "name": owner, "controller": True}]
    return {
        "metadata": {"name": "p", "creationTimestamp": LATE, "ownerReferences": owners, **metadata},
        "spec": {"nodeName": "node-1"},
        "status": {"conditions": [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": ready}]},
    }


def test_a_ready_enforcer_frees_its_node() -> None:
    enforcer = enforcer_of(pod(), GRANT)
    assert enforcer == Enforcer("node-1", True, LATE)
    assert may_lose(node(OTHER, OURS), DEFAULT_TAINT, [enforcer])


@pytest.mark.parametrize(
    "read",
    [
        pod("False"),
        pod("Unknown"),
        pod(deletionTimestamp=LATE),
        pod() | {"status": {}},
        pod() | {"spec": {"nodeName": "node-2"}},
        pod(creationTimestamp="2025-12-31T23:59:59Z"),
    ],
)
def test_no_other_pod_does(read: dict[str, Any]) -> None:
    enforcer = enforcer_of(read, GRANT)
    assert enforcer is not None
    assert not may_lose(node(OURS), DEFAULT_TAINT, [enforcer])


@pytest.mark.parametrize("read", [pod(owner="other"), pod() | {"spec": {}}, {"metadata": {}}])
def test_what_is_no_enforcer_on_a_node(read: dict[str, Any]) -> None:
    assert enforcer_of(read, GRANT) is None


def test_a_node_without_the_taint_is_left_alone() -> None:
    ready = [Enforcer("node-1", True, LATE)]
    assert not may_lose(node(OTHER), DEFAULT_TAINT, ready)
    assert not may_lose({"metadata": {"name": "node-1"}}, DEFAULT_TAINT, ready)


def test_the_patch_keeps_other_taints_and_the_version() -> None:
    assert without_taint(node(OTHER, OURS), DEFAULT_TAINT) == {
        "metadata": {"resourceVersion": "7"},
        "spec": {"taints": [OTHER]},
    }
    assert without_taint(node(OURS, OURS | {"effect": "NoExecute"}), DEFAULT_TAINT)["spec"] == {"taints": None}
