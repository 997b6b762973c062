# SPDX-License-Identifier: Apache-2.0
"""Two nodes whose world comes from an API server: what happens there reaches real connections as it should."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from enforcer_daemon.model import PodRef
from tests.e2e.operation_world import (
    HTTP,
    NODES,
    RESET,
    Stream,
    app,
    block,
    connection,
    endpoint,
    outcome,
    pod,
    policy,
)
from tests.kube.lab import KubeLab, cluster_pod
from trireme_install.examination import examine
from trireme_lab import Lab, LabError, LabSpec, Outcome, ServicePort, ServiceSpec, Tools
from trireme_lab.chain import SHIPPED_CONFLIST
from trireme_lab.manifests import ObjectRef
from trireme_lab.node import Node
from trireme_lab.spec import Manifest, PodSpec

pytestmark = pytest.mark.kernel

DENY = policy("deny-all", ingress=[])
ALLOW = policy("allow", "server", ingress=[{"from": [app("client")]}])
PODS = (pod("client", "a"), pod("server", "b"), pod("other", "a", namespace="y"))
NODE_PORT = 30080
SERVICES = tuple(
    ServiceSpec(
        "x", name, (ip_address(address),), (PodRef("x", "server"),), (ServicePort(80, HTTP.number, node_port=port),)
    )
    for name, address, port in (("in", "10.97.0.10", None), ("out", "198.51.100.10", NODE_PORT))
)
"""What nodes translate, of which the API server says nothing at first; outside the default ServiceCIDR."""
ADD_TIMEOUT_S = 2
_PATIENCE_S = 20.0
_LOOK_S = 3.0


@pytest.fixture(scope="module")
def lab(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeLab]:
    conflist = json.loads(SHIPPED_CONFLIST.read_text())
    conflist["plugins"][-1]["addTimeoutSeconds"] = ADD_TIMEOUT_S
    path = tmp_path_factory.mktemp("chain") / "10-trireme.conflist"
    path.write_text(json.dumps(conflist))
    namespaces: Mapping[str, Mapping[str, str]] = {"x": {}, "y": {"team": "red"}}
    settings = {**RESET, "networks": {"externalIpNetworks": ["198.51.100.0/28"]}}
    world = LabSpec(NODES, namespaces, pods=PODS, services=SERVICES, manifests=(DENY,), settings=settings)
    with KubeLab(world, Tools(plugin=plugin, conflist=path)) as lab:
        yield lab


@pytest.fixture(autouse=True)
def only_deny_all(lab: KubeLab) -> Iterator[None]:
    yield
    for found in lab.api.all("NetworkPolicy"):
        if found["metadata"]["name"] != "deny-all":
            lab.remove(ObjectRef("NetworkPolicy", found["metadata"]["namespace"], found["metadata"]["name"]))


def wait_for(condition: Callable[[], bool], patience_s: float = _PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be so"
        time.sleep(0.02)


def reaches(lab: Lab, source: str, target: str = "x/server", version: int = 4) -> bool:
    found = outcome(lab, source, target, HTTP.number, version)
    assert found in (Outcome.CONNECTED, Outcome.REFUSED)
    return found is Outcome.CONNECTED


def wait_until_refused(lab: Lab) -> None:
    """Wait until the client is refused; an attempt that the change finds half open is reset instead."""
    wait_for(lambda: outcome(lab, "x/client", "x/server", HTTP.number) is Outcome.REFUSED)


def cluster(node: Node) -> Mapping[str, Any]:
    found = node.status()["cluster"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("version", [4, 6])
def test_policies_come_change_and_go(lab: KubeLab, version: int) -> None:
    assert not reaches(lab, "x/client", version=version)
    lab.apply(ALLOW)
    assert reaches(lab, "x/client", version=version)
    lab.apply(policy("allow", "server", ingress=[{"from": [app("somebody-else")]}]))
    assert not reaches(lab, "x/client", version=version)
    lab.apply(ALLOW)
    lab.remove(ObjectRef("NetworkPolicy", "x", "allow"))
    assert not reaches(lab, "x/client", version=version)


def test_a_pod_comes_is_relabelled_and_goes(lab: KubeLab) -> None:
    lab.apply(ALLOW)
    lab.add_pod(pod("guest", "a"))
    try:
        assert not reaches(lab, "x/guest")
        lab.label("x/guest", {"app": "client"})
        assert reaches(lab, "x/guest")
        with connection(lab, "x/guest", "x/server") as (client, server):
            client.sendall(b"hello")
            assert server.recv(100) == b"hello"
            lab.label("x/guest", {"app": "guest"})
            assert not reaches(lab, "x/guest")
        lab.label("x/server", {"app": "server", "more": "labels"})
        assert endpoint(lab, "x/server")["labels"] == {"app": "server", "more": "labels"}
    finally:
        lab.remove_pod("x/guest")
    wait_for(lambda: cluster(lab.node("a"))["watches"]["pods"]["objects"] == 2)


def test_labels_of_a_server_change_whom_it_admits_also_in_established_flows(lab: KubeLab) -> None:
    lab.apply(policy("open", "open", ingress=[{}]))
    lab.label("x/server", {"app": "open"})
    with connection(lab, "x/client", "x/server") as ends:
        lab.label("x/server", {"app": "server"})
        for end in ends:
            with pytest.raises(ConnectionError):
                end.recv(1)


def test_labels_of_a_namespace_count(lab: KubeLab) -> None:
    red = {"namespaceSelector": {"matchLabels": {"team": "red"}}}
    lab.apply(policy("allow-red", "server", ingress=[{"from": [red]}]))
    assert reaches(lab, "y/other")
    lab.label_namespace("y", {"team": "blue"})
    assert not reaches(lab, "y/other")
    lab.label_namespace("y", {"team": "red"})
    assert reaches(lab, "y/other")


def test_a_deleted_pod_keeps_its_identity_until_its_sandbox_is_gone(lab: KubeLab) -> None:
    """Else a policy that selects the pod would let go of it while it still runs."""
    lab.apply(policy("allow-guest", "server", ingress=[{"from": [app("late")]}]))
    lab.add_pod(pod("guest", "a"))
    lab.label("x/guest", {"app": "late"})
    assert reaches(lab, "x/guest")
    lab.api.delete("Pod", "x", "guest")
    lab.api.put(cluster_pod(pod("guest", "a", app="next"), uid="another"))
    wait_for(lambda: cluster(lab.node("a"))["watches"]["pods"]["objects"] == 3)
    lab.label_namespace("x", {"touched": "yes"})
    assert endpoint(lab, "x/guest")["labels"] == {"app": "late"}
    assert reaches(lab, "x/guest")
    lab.remove_pod("x/guest")


def test_changes_made_while_watches_are_gone_are_not_missed(lab: KubeLab) -> None:
    for disturb in (lab.api.compact, lab.api.hang_up):
        disturb()
        lab.apply(ALLOW)
        assert reaches(lab, "x/client")
        disturb()
        lab.remove(ObjectRef("NetworkPolicy", "x", "allow"))
        assert not reaches(lab, "x/client")


def test_a_malformed_object_changes_nothing_else(lab: KubeLab) -> None:
    lab.apply(ALLOW)
    lab.apply(policy("allow", "server", ingress=[{"from": block("10.0.0.0/33")}]))
    assert reaches(lab, "x/client")
    snapshot = lab.node("b").status()["snapshot"]
    assert isinstance(snapshot, dict)
    assert [problem.split(": ")[:3] for problem in snapshot["problems"]] == [
        ["networkpolicies", "NetworkPolicy x/allow", "spec.ingress[0].from[0].ipBlock.cidr"]
    ]
    lab.apply(policy("deny-others", ingress=[]))
    assert reaches(lab, "x/client")
    lab.apply(policy("allow", "server", ingress=[]))
    assert not reaches(lab, "x/client")


def events(lab: KubeLab, name: str, reason: str) -> list[Mapping[str, Any]]:
    """Return the Events that the cluster has about an object, newest last."""
    found = [event for event in lab.api.all("Event") if event["regarding"]["name"] == name]
    return sorted((event for event in found if event["reason"] == reason), key=lambda event: str(event["eventTime"]))


def test_a_denied_flow_is_an_event_of_the_pod_with_a_count(lab: KubeLab) -> None:
    def told() -> list[Mapping[str, Any]]:
        found = events(lab, "server", "FlowDenied")
        return [event for event in found if event["note"].startswith("ingress-denied: ingress from y/other (")]

    assert not reaches(lab, "y/other")
    wait_for(lambda: bool(told()))
    assert not reaches(lab, "y/other")
    wait_for(lambda: told()[-1].get("series", {}).get("count", 0) > 1)
    event = told()[-1]
    assert "TCP port 8080, denied; decided by x/" in event["note"]  # By those that were there when it began.
    assert (event["reportingInstance"], event["metadata"]["namespace"]) == ("b", "x")
    assert event["regarding"] == {
        "apiVersion": "v1", "kind": "Pod", "namespace": "x", "name": "server", "uid": "x-server",
    }  # fmt: skip


def test_a_refused_policy_has_one_event_of_all_nodes(lab: KubeLab) -> None:
    def told() -> int:
        return sum(asked == ("POST", "/apis/events.k8s.io/v1/namespaces/x/events") for asked in lab.api.requests)

    before = told()
    lab.apply(policy("wrong", "server", ingress=[{"from": block("10.0.0.0/33")}]))
    wait_for(lambda: told() >= before + len(lab.nodes))
    uid = lab.api.get("NetworkPolicy", "x", "wrong")["metadata"]["uid"]
    (event,) = events(lab, "wrong", "PolicyRefused")
    assert (event["regarding"]["kind"], event["regarding"]["uid"]) == ("NetworkPolicy", uid)
    assert "the pods that it selects are isolated: spec.ingress[0].from[0].ipBlock.cidr" in event["note"]


def test_an_identity_that_grew_too_large_is_an_event_of_the_pod(lab: KubeLab) -> None:
    lab.add_pod(pod("guest", "a"))
    try:
        large = {f"label-{number}": os.urandom(30).hex() for number in range(40)}
        lab.label("x/guest", large)
        wait_for(lambda: bool(events(lab, "guest", "IdentityTooLarge")))
        (event,) = events(lab, "guest", "IdentityTooLarge")
        assert "identity-too-large: identity of x/guest takes" in event["note"]
        assert event["regarding"]["uid"] == "x-guest"
    finally:
        lab.remove_pod("x/guest")


def test_a_pod_that_starts_past_the_plugin_is_reported(lab: KubeLab) -> None:
    """As where the runtime uses another network: the API server shows an address, and no ADD came."""
    past, node = PodRef("x", "past"), lab.node("a")

    def unenforced() -> object:
        found = node.status()["unenforced_pods"]
        assert isinstance(found, dict)
        return found["past"]

    def watched_pods() -> object:
        return node.status()["cluster"]["watches"]["pods"]["objects"]  # type: ignore[index]

    before = watched_pods()
    lab.api.put(cluster_pod(PodSpec(past, "a", {})))
    try:
        wait_for(lambda: watched_pods() != before)
        time.sleep(_LOOK_S)  # The daemon compares once a second, and has to see it without an address first.
        status = {"status": {"phase": "Running", "podIPs": [{"ip": "10.244.1.250"}]}}
        lab.api.patch("Pod", "x", "past", status)
        wait_for(lambda: unenforced() == ["x/past"], 30.0)
        wait_for(lambda: bool(events(lab, "past", "NotEnforced")))
        facts = examine(Path("/nowhere"), Path("/nowhere"), node.directories.run, ())
        assert facts.unenforced == ("x/past",)
    finally:
        lab.api.delete("Pod", "x", "past")
    wait_for(lambda: unenforced() == [])


def service(**spec: object) -> Manifest:
    metadata = {"name": "web", "namespace": "x"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"clusterIP": "10.97.0.10", **spec}}


def test_addresses_of_services_come_and_go_with_what_the_api_server_has(lab: KubeLab) -> None:
    """Where one is not known, connections to it carry no identity, and a rule by label allows none."""
    cidr = {
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "more"},
        "spec": {"cidrs": ["10.97.0.0/24"]},
    }  # fmt: skip
    ways = {"in": ("x/client", "service:x/in", 80), "out": ("x/client", "service:x/out", 80)}
    ways["node"] = ("x/client", "node:b", NODE_PORT)

    def open_ways() -> set[str]:
        # What comes masqueraded and without an identity is dropped on the node: nobody refuses it.
        found = {name: outcome(lab, *way, timeout_s=1.5) for name, way in ways.items()}
        return {name for name, result in found.items() if result is Outcome.CONNECTED}

    lab.apply(ALLOW)
    assert open_ways() == set()
    lab.apply(service(ports=[{"port": 80}], externalIPs=["198.51.100.10"]))
    assert open_ways() == {"out"}
    lab.apply(cidr)
    assert open_ways() == {"in", "out"}
    lab.apply(service(type="NodePort", ports=[{"port": 80, "nodePort": NODE_PORT}]))
    assert open_ways() == {"in", "node"}
    status = {"loadBalancer": {"ingress": [{"ip": "198.51.100.10"}]}}
    lab.apply({**service(type="LoadBalancer", ports=[{"port": 80}]), "status": status})
    assert open_ways() == {"in", "out"}
    assert "10.97.0.0/24" in lab.run("node:a", "nft", "list", "table", "netdev", "trireme_guard")
    lab.remove(ObjectRef("Service", "x", "web"), ObjectRef("ServiceCIDR", "", "more"))
    wait_for(lambda: open_ways() == set())
    assert "10.97.0.0/24" not in lab.run("node:a", "nft", "list", "table", "netdev", "trireme_guard")


def cni_status(plugin: Path, node: Node) -> subprocess.CompletedProcess[str]:
    config = {"cniVersion": "1.1.0", "name": "n", "type": "trireme", "runDir": str(node.directories.run)}
    env = {**os.environ, "CNI_COMMAND": "STATUS", "CNI_PATH": str(plugin.parent)}
    return subprocess.run([plugin], input=json.dumps(config), env=env, capture_output=True, text=True, check=False)


def test_the_last_state_stays_while_the_api_server_is_away(lab: KubeLab, plugin: Path) -> None:
    lab.apply(ALLOW)
    assert cni_status(plugin, lab.node("a")).stderr == ""
    with connection(lab, "x/client", "x/server") as ends, lab.api.away():
        with Stream(*ends) as stream:
            wait_for(lambda: "networkpolicies" in cluster(lab.node("a"))["lag"])
            stream.wait_for_rounds(3)
            assert reaches(lab, "x/client")
            assert not reaches(lab, "y/other")
            # A new sandbox of a known pod: the runtime makes one also without the API server.
            Lab.remove_pod(lab, "y/other")
            Lab.add_pod(lab, PODS[2])
            assert not reaches(lab, "y/other")
            with pytest.raises(LabError, match=r"code 11.*is not known here"):
                Lab.add_pod(lab, pod("unknown", "a"))
            status = cni_status(plugin, lab.node("a"))
            assert (status.returncode, "the last state stays in force" in status.stderr) == (0, True)
            stream.wait_for_rounds(3)
        lab.api.delete("NetworkPolicy", "x", "allow")
    wait_until_refused(lab)
    wait_for(lambda: cluster(lab.node("a"))["lag"] == "")


def wait_until_kept(node: Node, text: str) -> None:
    """Wait until the policies on disk have a text, as a daemon writes them when it has the time."""
    kept = node.directories.state / "cluster" / "networkpolicies.jsonl"
    wait_for(lambda: kept.exists() and text in kept.read_text())


def test_a_daemon_that_starts_without_the_api_server_goes_on_with_the_last_state(lab: KubeLab) -> None:
    lab.apply(ALLOW)
    wait_until_kept(lab.node("b"), '"allow"')
    with lab.api.away():
        lab.node("b").restart()
        assert reaches(lab, "x/client")
        assert not reaches(lab, "y/other")
        assert endpoint(lab, "x/server")["labels"] == {"app": "server"}
        assert "not followed" in str(lab.node("b").status()["detail"])
        lab.api.delete("NetworkPolicy", "x", "allow")
        assert reaches(lab, "x/client")
    wait_until_refused(lab)


def test_a_slow_list_holds_up_nothing_but_itself(lab: KubeLab) -> None:
    lab.apply(ALLOW)
    wait_until_kept(lab.node("b"), '"allow"')
    lab.node("b").kill()
    lab.api.delays_s["networkpolicies"] = 3600.0
    try:
        lab.apply(policy("allow", "server", ingress=[]), is_awaited=False)
        lab.node("b").start()
        lab.node("b").wait_ready()
        assert not cluster(lab.node("b"))["watches"]["networkpolicies"]["synced"]
        assert reaches(lab, "x/client")  # as it was kept
    finally:
        lab.api.delays_s.clear()
    wait_until_refused(lab)


def test_a_daemon_with_neither_server_nor_kept_state_is_not_ready_and_says_why(lab: KubeLab, plugin: Path) -> None:
    node = lab.node("b")
    node.stop()
    for path in (node.directories.state / "cluster").iterdir():
        path.unlink()
    with lab.api.away():
        node.start()
        wait_for(lambda: node.directories.run.joinpath("admin.sock").exists())
        with pytest.raises(LabError, match="not ready"):
            node.wait_ready(2.0)
        assert "the cluster has not been read yet" in str(node.status()["detail"])
        status = cni_status(plugin, node)
        assert (status.returncode, json.loads(status.stdout)["code"]) == (1, 50)
    node.wait_ready()
    assert not reaches(lab, "x/client")
    lab.apply(ALLOW)
    assert reaches(lab, "x/client")


def test_a_pod_that_nobody_registered_is_enforced_when_the_daemon_is_ready(lab: KubeLab) -> None:
    """The node's first daemon finds pods from before it; what the cluster says of them is in force by then."""
    node = lab.node("b")
    node.stop()
    for record in (node.directories.run / "endpoints").iterdir():
        record.unlink()
    node.start()
    node.wait_ready()
    assert [found["pod"] for found in node.endpoints()] == ["server"]
    assert "pod not discovered" not in [record["event"] for record in node.log_records()]
