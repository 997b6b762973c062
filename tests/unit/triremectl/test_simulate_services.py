# SPDX-License-Identifier: Apache-2.0
"""`triremectl simulate` towards a Service: decided for each pod behind it, by the pod's own labels and port."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from enforcer_daemon.policy.decode_services import decode_service
from enforcer_daemon.policy.reader import InvalidObjectError
from triremectl.__main__ import main

WEB_PORTS = [{"name": "http", "containerPort": 8080}]


def pod(name: str, address: str, ports: list[dict[str, Any]] = WEB_PORTS, **labels: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": "x", "name": name, "labels": labels},
        "spec": {"nodeName": "a", "containers": [{"name": "c", "ports": ports}]},
        "status": {"podIPs": [{"ip": address}, {"ip": f"fd00::{address.rpartition('.')[2]}"}]},
    }


def service(name: str = "web", **spec: object) -> dict[str, Any]:
    whole: dict[str, object] = {
        "clusterIP": "10.96.0.10",
        "selector": {"app": "web"},
        "ports": [{"name": "www", "port": 80, "targetPort": "http"}],
        **spec,
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "x", "name": name}, "spec": whole}


def policy(name: str, selector: dict[str, str], **spec: object) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": "x", "name": name},
        "spec": {"podSelector": {"matchLabels": selector}, **spec},
    }


CLIENT, ONE, TWO = (
    pod("client", "10.1.0.1", app="client"),
    pod("web-1", "10.1.0.2", app="web", n="1"),
    pod("web-2", "10.1.0.3", [{"name": "http", "containerPort": 9090}], app="web", n="2"),
)
TO_WEB = policy(
    "to-web",
    {"app": "client"},
    policyTypes=["Egress"],
    egress=[{"to": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": "http"}]}],
)
TO_ADDRESS = policy(
    "to-address", {"app": "client"}, policyTypes=["Egress"], egress=[{"to": [{"ipBlock": {"cidr": "10.96.0.0/16"}}]}]
)

TO_NODE = policy(
    "to-node", {"app": "client"}, policyTypes=["Egress"],
    egress=[{"to": [{"ipBlock": {"cidr": "10.1.0.2/32"}}], "ports": [{"port": 8080}]}],
)  # fmt: skip


def ask(place: Path, *manifests: dict[str, Any], to: str = "10.96.0.10", port: object = 80, more: str = "") -> Any:
    (place / "all.yaml").write_text(yaml.safe_dump_all(manifests))
    arguments = ["--policies", str(place), "--from", "x/client", "--to", to, "--port", str(port), *more.split()]
    return CliRunner().invoke(main, ["simulate", *arguments])


@pytest.mark.parametrize(("to", "port"), [("10.96.0.10", "80"), ("service:x/web", "80"), ("service:x/web", "www")])
def test_each_pod_behind_is_decided_by_its_own_labels_and_port(tmp_path: Path, to: str, port: str) -> None:
    result = ask(tmp_path, CLIENT, ONE, TWO, service(), TO_WEB, to=to, port=port)
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        f"x/client -> {to} TCP {port}: Service x/web: allowed at all of its 2 pods",
        "  x/client -> x/web-1 TCP 8080: allowed",
        "    egress of x/client: allowed (policy) by x/to-web[0]",
        "    ingress of x/web-1: allowed (not-isolated)",
        "  x/client -> x/web-2 TCP 9090: allowed",
        "    egress of x/client: allowed (policy) by x/to-web[0]",
        "    ingress of x/web-2: allowed (not-isolated)",
    ]


def test_a_rule_for_the_address_of_the_service_allows_nothing(tmp_path: Path) -> None:
    result = ask(tmp_path, CLIENT, ONE, service(), TO_ADDRESS)
    assert result.exit_code == 1
    assert "Service x/web: denied at all of its 1 pod" in result.output
    assert "egress of x/client: denied (egress-denied); isolated by x/to-address" in result.output


def test_pods_may_differ(tmp_path: Path) -> None:
    closed = policy("closed", {"n": "2"}, ingress=[])
    result = ask(tmp_path, CLIENT, ONE, TWO, service(), closed)
    assert result.exit_code == 1
    assert "Service x/web: allowed at 1 of its 2 pods" in result.output
    answer = json.loads(ask(tmp_path, CLIENT, ONE, TWO, service(), closed, more="--output json").output)
    assert (answer["service"], answer["verdict"]) == ("x/web", "mixed")
    assert [(found["to"], found["port"], found["verdict"]) for found in answer["backends"]] == [
        ("x/web-1", 8080, "allow"),
        ("x/web-2", 9090, "deny"),
    ]


def test_the_family_that_is_dialed_is_the_pods(tmp_path: Path) -> None:
    both = service(clusterIPs=["10.96.0.10", "fd00:10:96::10"])
    six = policy("six", {"app": "web"}, ingress=[{"from": [{"ipBlock": {"cidr": "fd00::/16"}}]}])
    assert ask(tmp_path, CLIENT, ONE, both, six, to="fd00:10:96::10").exit_code == 0
    assert ask(tmp_path, CLIENT, ONE, both, six).exit_code == 1


def test_a_load_balancers_address_is_the_services(tmp_path: Path) -> None:
    balanced = {**service(), "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.9"}, {"hostname": "x"}]}}}
    assert "Service x/web: allowed" in ask(tmp_path, CLIENT, ONE, balanced, to="203.0.113.9").output
    proxied = {**service(), "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.9", "ipMode": "Proxy"}]}}}
    assert "Service" not in ask(tmp_path, CLIENT, ONE, proxied, to="203.0.113.9").output


def test_an_external_address_is_decided_by_address_and_says_so(tmp_path: Path) -> None:
    result = ask(tmp_path, CLIENT, ONE, service(externalIPs=["203.0.113.9"]), TO_ADDRESS, to="203.0.113.9")
    assert result.exit_code == 1
    assert "egress of x/client: denied (unidentified-peer)" in result.output
    assert (
        "203.0.113.9 is an external address of Service x/web, decided by address: networks.externalIpNetworks allows "
        "none by default; where it allows this one, ask for service:x/web"
    ) in result.output


def test_a_pod_on_its_nodes_network_is_decided_by_either_address(tmp_path: Path) -> None:
    on_host = {**ONE, "spec": {**ONE["spec"], "hostNetwork": True}}
    assert ask(tmp_path, CLIENT, on_host, service(), TO_ADDRESS).exit_code == 0
    assert ask(tmp_path, CLIENT, on_host, service(), TO_NODE).exit_code == 0
    result = ask(tmp_path, CLIENT, on_host, service(), TO_WEB)
    assert result.exit_code == 1
    assert "x/web-1 is on its node's network: decided by the dialed address, or by the node's" in result.output


@pytest.mark.parametrize(
    ("manifests", "port", "message"),
    [
        ([service()], 81, "Service x/web has no TCP port 81; it has TCP 80 (www)"),
        ([service()], 80, "no pod among the manifests is behind Service x/web"),
        ([service(selector=None), ONE], 80, "Service x/web has no selector: its endpoints are not among the manifests"),
        ([service(ports=[{"port": 80, "targetPort": "nix"}]), ONE], 80, "no pod among the manifests is behind Service"),
        ([service(type="ExternalName", externalName="a.example")], 80, "Service x/web is an ExternalName"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_service_that_leads_nowhere_has_no_answer(
    tmp_path: Path, manifests: list[dict[str, Any]], port: int, message: str
) -> None:
    result = ask(tmp_path, CLIENT, *manifests, to="service:x/web", port=port)
    assert result.exit_code == 2
    assert message in result.output


def test_an_unknown_service_has_no_answer(tmp_path: Path) -> None:
    result = ask(tmp_path, CLIENT, ONE, service(), to="service:x/nix")
    assert (result.exit_code, "no Service x/nix" in result.output) == (2, True)


def test_a_headless_service_leads_to_the_pods_port(tmp_path: Path) -> None:
    result = ask(tmp_path, CLIENT, ONE, service(clusterIP="None"), to="service:x/web", port=80)
    assert (result.exit_code, "x/client -> x/web-1 TCP 8080: allowed" in result.output) == (0, True)


def test_without_services_an_unknown_address_is_called_one(tmp_path: Path) -> None:
    hint = "10.96.0.10 is no pod's or node's, and decided as an address outside; if a Service has it, add the Services"
    assert hint in ask(tmp_path, CLIENT, ONE).output
    assert hint not in ask(tmp_path, CLIENT, ONE, to="10.1.0.2").output
    assert hint not in ask(tmp_path, CLIENT, ONE, service("other", clusterIP="10.96.0.99")).output


def test_only_simulate_reads_services(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(service()))
    result = CliRunner().invoke(main, ["validate", str(tmp_path)])
    assert result.exit_code == 1
    assert 'Invalid value: "Service": is not read here' in result.output


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"ports": [{"port": "x"}]}, "spec.ports[0].port"),
        ({"ports": [{"port": 80, "protocol": "GRE"}]}, "spec.ports[0].protocol"),
        ({"externalIPs": ["x"]}, "spec.externalIPs[0]"),
        ({"clusterIPs": ["x"]}, "spec.clusterIPs[0]"),
        ({"selector": []}, "spec.selector"),
        ({"ports": [{"port": 80, "targetPort": []}]}, "spec.ports[0].targetPort"),
    ],
)
def test_a_fault_of_a_service_is_named(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidObjectError) as caught:
        decode_service(service(**spec))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("peer", "allowed"),
    [({"podSelector": {"matchLabels": {"app": "web"}}}, False), ({"ipBlock": {"cidr": "10.1.0.2/32"}}, True)],
)
def test_sctp_is_decided_by_address_as_the_enforcers_do(tmp_path: Path, peer: dict[str, Any], allowed: bool) -> None:
    ports = [{"port": 36412, "protocol": "SCTP"}]
    sctp = policy("sctp", {"app": "client"}, policyTypes=["Egress"], egress=[{"to": [peer], "ports": ports}])
    result = ask(tmp_path, CLIENT, ONE, sctp, to="x/web-1", port=36412, more="--protocol=SCTP")
    assert (result.exit_code == 0) is allowed
    assert "SCTP carries no identity: decided by addresses" in result.output
