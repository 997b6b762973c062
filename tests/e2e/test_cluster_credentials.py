# SPDX-License-Identifier: Apache-2.0
"""Two nodes with certificates from the cluster's signer: under policy, as the authority changes, and one that lies."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from enforcer_daemon.kube.placement import PlacementLimits
from tests.e2e.operation_world import HTTP, NODES, RESET, app, connection, denials, pod, policy
from tests.kube.cluster import NAMESPACE, add_node
from tests.kube.lab import LIMITS, KubeLab
from tests.kube.rbac import grants
from trireme_lab import Lab, LabError, LabSpec, Outcome, Tools
from trireme_lab.netns import exec_prefix
from trireme_lab.node import Node
from trireme_lab.settings import overlay

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).parents[2]
CREDENTIALS = {
    "credentials": {
        "source": "kubernetes",
        "caCertificate": None,
        "caKey": None,
        "bundleConfigMap": f"{NAMESPACE}/trireme-trust-bundle",
    },
    "kubernetes": {"verifyPlacement": True},
}
TAINT = {"key": "trireme.io/agent-not-ready", "effect": "NoSchedule"}
ALLOW = policy("allow", "server", ingress=[{"from": [app("client")]}])
PODS = (pod("client", "a"), pod("server", "b"), pod("other", "a"))


class SignedLab(KubeLab):
    """A lab whose nodes have nothing but an account; the signer runs beside the API server."""

    signer: subprocess.Popen[bytes]

    def _start_api(self) -> None:
        super()._start_api()
        for node in self.spec.nodes:
            token = add_node(self.api, node.name)
            self.api.patch("Node", "", node.name, {"spec": {"taints": [TAINT]}})
            for address in node.addresses:
                self.api.users[str(address)] = self.api.users[token]
        kubeconfig = self.api.write_kubeconfig(self.directory / "signer.kubeconfig", "signer")
        argv = [
            sys.executable, "-m", "trireme_signer", "--kubeconfig", str(kubeconfig), "--namespace", NAMESPACE,
            "--metrics-port", "0", "--identity", "signer", "--overlap-hours", "0.001",
        ]  # fmt: skip
        log = self._stack.enter_context((self.directory / "signer.log").open("ab"))
        netns = exec_prefix(self.place("host:api").netns)
        self.signer = subprocess.Popen([*netns, *argv], stderr=log)
        self._stack.callback(self.signer.wait)
        self._stack.callback(self.signer.terminate)


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[SignedLab]:
    world = LabSpec(NODES, pods=PODS, manifests=(ALLOW,), settings=overlay(RESET, CREDENTIALS))
    with SignedLab(world, Tools(plugin=plugin), limits=replace(LIMITS, placement=PlacementLimits(retry_s=0.2))) as lab:
        yield lab


def status(node: Node) -> Any:
    return node.status()


def await_that(holds: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_pods_are_judged_by_identities_that_the_cluster_certified(lab: SignedLab) -> None:
    assert lab.probe("x/client", "x/server", HTTP.number).outcome is Outcome.CONNECTED
    assert lab.probe("x/other", "x/server", HTTP.number).outcome.is_denied
    for node in lab.nodes.values():
        found = status(node)
        assert found["key_problems"] == []
        assert [entry["trust_domain"] for entry in found["bundle"]] == ["cluster.local"]
        assert not list(Path(node.directories.state).glob("ca*")), "no authority's key is on a node"


def test_no_connection_is_lost_while_the_authority_changes(lab: SignedLab) -> None:
    time.sleep(1.1)  # Certificates know whole seconds.
    asked = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    annotations = {"trireme.io/replace-authorities-made-before": asked}
    before = {node.name: status(node)["bundle"] for node in lab.nodes.values()}
    lab.api.patch("Secret", NAMESPACE, "trireme-authority", {"metadata": {"annotations": annotations}})

    def has_both() -> bool:
        assert lab.probe("x/client", "x/server", HTTP.number).outcome is Outcome.CONNECTED
        return all(len(status(node)["bundle"]) == 2 for node in lab.nodes.values())

    await_that(has_both, "the new authority did not reach both nodes")
    for node in lab.nodes.values():  # What a renewal comes to, without the wait of two thirds of a day.
        (Path(node.directories.state) / "node-credential.pem").unlink()

    def is_renewed() -> bool:
        assert lab.probe("x/client", "x/server", HTTP.number).outcome is Outcome.CONNECTED
        return len(lab.api.all("CertificateSigningRequest")) >= 4 and all(
            not status(node)["key_problems"] for node in lab.nodes.values()
        )

    await_that(is_renewed, "no new certificates")
    assert before["a"] == before["b"]
    assert lab.probe("x/client", "x/server", HTTP.number).outcome is Outcome.CONNECTED
    assert lab.probe("x/other", "x/server", HTTP.number).outcome.is_denied


@pytest.mark.parametrize(("account", "token"), [("trireme-enforcer", "test"), ("trireme-signer", "signer")])
def test_the_shipped_roles_grant_what_is_used_and_no_more(lab: SignedLab, account: str, token: str) -> None:
    def is_event_repeated() -> bool:
        assert lab.probe("x/other", "x/server", HTTP.number).outcome.is_denied
        return any((asked.verb, asked.resource) == ("patch", "events") for asked in lab.api.asked)

    await_that(is_event_repeated, "no event was told again")
    await_that(lambda: all("taints" not in node["spec"] for node in lab.api.all("Node")), "nodes keep their taint")
    with pytest.raises(LabError, match="stranger"):  # A pod that the watch does not bring is asked for by name.
        Lab.add_pod(lab, pod("stranger", "a"))
    granted = grants(yaml.safe_load_all((ROOT / "install" / "trireme.yaml").read_text()), account)
    used = {asked for asked in lab.api.asked if asked.token == token}
    assert used
    assert {asked for asked in used if not any(grant.covers(asked) for grant in granted)} == set()
    idle = {grant for grant in granted if not any(grant.covers(asked) for asked in used)}
    # Kubernetes' own admission asks for these verbs when a signer writes, and they have no request of their own.
    assert {grant for grant in idle if grant.resource != "signers"} == set()


def test_a_node_that_claims_another_nodes_pod_is_denied_until_it_is_trusted_again(lab: SignedLab) -> None:
    lab.add_pod(pod("liar", "a", app="client"))
    try:
        with connection(lab, "x/client", "x/server") as ends:
            assert status(lab.node("b"))["denied_nodes"] == []
            lab.api.patch("Pod", "x", "liar", {"spec": {"nodeName": "b"}})
            lab.probe("x/liar", "x/server", HTTP.number)  # The first contact waits for no answer.
            await_that(lambda: status(lab.node("b"))["denied_nodes"], "the claim was not looked up")
            for end in ends:
                with pytest.raises(ConnectionError):
                    end.recv(1)
        (denied,) = status(lab.node("b"))["denied_nodes"]
        assert (denied["node"], denied["why"]) == ("a", "it claims pod x/liar, which is on node b")
        for client in ("x/liar", "x/client"):
            assert lab.probe(client, "x/server", HTTP.number).outcome.is_denied
        assert "node-denied" in denials(lab, "x/server")
        await_that(lambda: any(event["reason"] == "NodeDenied" for event in lab.api.all("Event")), "no event")
        events = [event for event in lab.api.all("Event") if event["reason"] == "NodeDenied"]
        assert [(event["regarding"]["name"], event["reportingInstance"]) for event in events] == [("a", "b")]
    finally:
        lab.remove_pod("x/liar")
    lab.node("b").admin("trust", node="a")
    assert status(lab.node("b"))["denied_nodes"] == []
    assert lab.probe("x/client", "x/server", HTTP.number).outcome is Outcome.CONNECTED


def test_a_restart_needs_neither_signer_nor_api_server(lab: SignedLab) -> None:
    lab.signer.terminate()
    lab.signer.wait()
    with lab.api.away():
        lab.node("a").restart()
        assert lab.probe("x/client", "x/server", HTTP.number).outcome is Outcome.CONNECTED
