# SPDX-License-Identifier: Apache-2.0
"""A cluster with the enforcer's DaemonSet on some nodes, as far as certificates are concerned."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.kube.api import FakeApi

NAMESPACE = "trireme"
ACCOUNT = "trireme-enforcer"
_BOUND = "authentication.kubernetes.io/"


def add_node(api: FakeApi, node: str) -> str:
    """Put a node with its pod of the DaemonSet into the cluster; give the pod's token."""
    if not any(found["metadata"]["name"] == node for found in api.all("Node")):
        api.put({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}})
    api.put(
        {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": {"name": ACCOUNT, "namespace": NAMESPACE, "uid": "uid-set"},
        },
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{ACCOUNT}-{node}",
                "namespace": NAMESPACE,
                "uid": f"uid-pod-{node}",
                "ownerReferences": [{"kind": "DaemonSet", "name": ACCOUNT, "uid": "uid-set", "controller": True}],
            },
            "spec": {"nodeName": node, "serviceAccountName": ACCOUNT},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
        },
    )
    token = f"token-{node}"
    api.users[token] = {
        "username": f"system:serviceaccount:{NAMESPACE}:{ACCOUNT}",
        "extra": {
            f"{_BOUND}pod-name": [f"{ACCOUNT}-{node}"],
            f"{_BOUND}pod-uid": [f"uid-pod-{node}"],
            f"{_BOUND}node-name": [node],
            f"{_BOUND}node-uid": [api.get("Node", "", node)["metadata"]["uid"]],
        },
    }
    return token


@contextmanager
def running_signer(
    api: FakeApi, directory: Path, *options: str, name: str = "signer"
) -> Iterator[subprocess.Popen[Any]]:
    """Run the real program against the API server; its log is `<name>.log` in the directory."""
    kubeconfig = api.write_kubeconfig(directory / f"{name}.kubeconfig", "signer")
    argv = [sys.executable, "-m", "trireme_signer", "--kubeconfig", str(kubeconfig), "--namespace", NAMESPACE]
    with (directory / f"{name}.log").open("ab") as log:
        process = subprocess.Popen([*argv, "--metrics-port", "0", "--identity", name, *options], stderr=log)
    try:
        yield process
    finally:
        ended_early = process.poll()
        process.terminate()
        process.wait(20)
        assert ended_early is None, (directory / f"{name}.log").read_text()
