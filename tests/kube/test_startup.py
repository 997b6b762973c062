# SPDX-License-Identifier: Apache-2.0
"""The real signer takes the startup taint from nodes whose enforcer is ready, over real HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.kube.api import FakeApi
from tests.kube.cluster import ACCOUNT, NAMESPACE, add_node, running_signer

OURS = {"key": "trireme.io/agent-not-ready", "effect": "NoSchedule"}
OTHER = {"key": "example.com/gpu", "effect": "NoSchedule"}


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with FakeApi() as served:
        for node in ("node-1", "node-2"):
            add_node(served, node)
            served.patch("Node", "", node, {"spec": {"taints": [OTHER, OURS]}})
        set_ready(served, "node-2", "False")
        yield served


def set_ready(api: FakeApi, node: str, status: str) -> None:
    conditions = [{"type": "Ready", "status": status}]
    api.patch("Pod", NAMESPACE, f"{ACCOUNT}-{node}", {"status": {"conditions": conditions}})


def taints(api: FakeApi, node: str) -> Any:
    return api.get("Node", "", node)["spec"].get("taints")


def wait_until_freed(api: FakeApi, node: str) -> None:
    deadline = time.monotonic() + 30
    while taints(api, node) != [OTHER]:
        assert time.monotonic() < deadline, taints(api, node)
        time.sleep(0.02)


def test_a_node_is_freed_when_its_enforcer_is_ready(api: FakeApi, tmp_path: Path) -> None:
    with running_signer(api, tmp_path):
        wait_until_freed(api, "node-1")
        assert taints(api, "node-2") == [OTHER, OURS]
        set_ready(api, "node-2", "True")
        wait_until_freed(api, "node-2")


def test_a_signer_waits_for_an_api_server_that_is_away(api: FakeApi, tmp_path: Path) -> None:
    with ExitStack() as stack:
        with api.away():
            signer = stack.enter_context(running_signer(api, tmp_path))
            deadline = time.monotonic() + 30
            while "waits for the API server" not in (tmp_path / "signer.log").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.05)
        wait_until_freed(api, "node-1")
        assert signer.poll() is None


def test_a_change_by_somebody_else_is_not_undone(api: FakeApi, tmp_path: Path) -> None:
    refused: list[str] = []

    def fault(request: web.Request) -> int | None:
        if request.method == "PATCH" and not refused:
            refused.append(request.path)
            return 409
        return None

    api.faults = fault
    with running_signer(api, tmp_path):
        wait_until_freed(api, "node-1")
    assert refused == ["/api/v1/nodes/node-1"]


def test_without_the_setting_nodes_are_left_alone(api: FakeApi, tmp_path: Path) -> None:
    with running_signer(api, tmp_path, "--startup-taint", ""):
        deadline = time.monotonic() + 30
        while not api.all("ConfigMap"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert taints(api, "node-1") == [OTHER, OURS]
    assert not any(asked.resource == "nodes" for asked in api.asked)
