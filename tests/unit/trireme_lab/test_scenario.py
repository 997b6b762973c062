# SPDX-License-Identifier: Apache-2.0
"""Scenario files: what they mean, and what is said of wrong ones."""

from __future__ import annotations

import copy
import re
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from enforcer_daemon.model import PodRef, Protocol
from enforcer_daemon.reasons import Reason
from trireme_lab.errors import ScenarioError
from trireme_lab.manifests import ObjectRef
from trireme_lab.scenario import SHIPPED, Flow, decode_scenario, load_scenario
from trireme_lab.spec import NodeSpec, PodSpec, PortSpec, ServicePort

OLD = {"kind": "NetworkPolicy", "metadata": {"namespace": "shop", "name": "old"}}
NEW = {"kind": "NetworkPolicy", "metadata": {"namespace": "shop", "name": "new"}}
SCENARIO: dict[str, Any] = {
    "policies": [OLD],
    "title": "two pods",
    "nodes": [{"name": "a"}, {"name": "b", "addresses": ["192.0.2.1"], "podNetworks": ["10.1.0.0/24"]}],
    "namespaces": [{"name": "shop", "labels": {"team": "x"}}],
    "pods": [
        {"name": "shop/web", "node": "a", "labels": {"app": "web"}},
        {
            "name": "shop/db",
            "node": "b",
            "addresses": ["10.1.0.9"],
            "ports": [5432, {"port": 53, "protocol": "UDP", "name": "dns"}],
            "serviceAccount": "db",
        },
    ],
    "hosts": [{"name": "out", "addresses": ["203.0.113.1"]}, {"name": "near", "node": "a"}],
    "services": [
        {"name": "shop/db", "addresses": ["10.96.0.1"], "pods": ["shop/db"], "ports": [{"port": 1, "targetPort": 5432}]}
    ],
    "steps": [
        {
            "remove": [{"namespace": "shop", "name": "old"}],
            "apply": [NEW],
            "labelPods": [{"name": "shop/web", "labels": {}}],
            "flows": [
                {"from": "shop/web", "to": "service:shop/db", "port": 1, "expect": "allow"},
                {
                    "from": "host:out",
                    "to": "shop/db",
                    "port": 53,
                    "protocol": "UDP",
                    "family": "IPv6",
                    "expect": "deny",
                    "reason": "unidentified-peer",
                },
            ],
        }
    ],
}


def test_a_scenario_becomes_values() -> None:
    scenario = decode_scenario(SCENARIO)
    world = scenario.spec
    assert world.nodes == (
        NodeSpec.numbered("a", 1),
        NodeSpec("b", (ip_address("192.0.2.1"),), (ip_network("10.1.0.0/24"),)),
    )
    assert world.pods == (
        PodSpec(PodRef("shop", "web"), "a", {"app": "web"}),
        PodSpec(
            PodRef("shop", "db"),
            "b",
            addresses=(ip_address("10.1.0.9"),),
            ports=(PortSpec(5432), PortSpec(53, Protocol.UDP, "dns")),
            service_account="db",
        ),
    )
    assert world.namespaces == {"shop": {"team": "x"}}
    assert [host.node for host in world.hosts] == [None, "a"]
    assert world.services[0].ports == (ServicePort(1, 5432),)
    assert world.enforcer
    (step,) = scenario.steps
    assert step.remove == (ObjectRef("NetworkPolicy", "shop", "old"),)
    assert [(change.target, change.labels) for change in step.label_pods] == [("shop/web", {})]
    assert step.flows == (
        Flow("shop/web", "service:shop/db", 1, is_allowed=True),
        Flow("host:out", "shop/db", 53, False, Reason.UNIDENTIFIED_PEER, Protocol.UDP, 6),
    )


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (["nodes"], [], "nodes: must be 1 to 200"),
        (["nodes", 0], {}, "nodes[0].name: is required"),
        (["nodes", 0, "color"], "red", "nodes[0].color: unknown field"),
        (["typo"], 1, "typo: unknown field"),
        (["pods", 0, "name"], "web", "pods[0].name: must be NAMESPACE/NAME"),
        (["pods", 0, "node"], "c", "pods[0].node: c is not among the nodes"),
        (["pods", 0, "labels", "app"], True, "pods[0].labels.app: labels are text"),
        (["pods", 1, "addresses", 0], "10.1.0", "pods[1].addresses[0]: "),
        (["pods", 1, "addresses", 0], "192.0.2.1", "addresses: 192.0.2.1 occurs twice"),
        (["pods", 1, "ports", 0], 0, "pods[1].ports[0]: must be a port number"),
        (["pods", 1, "ports", 1, "protocol"], "SCTP", "pods[1].ports[1].protocol: must be one of TCP, UDP"),
        (["hosts", 0, "addresses"], [], "hosts[0].addresses: out needs an address"),
        (["services", 0, "pods", 0], "shop/x", "services[0].pods[0]: there is no pod shop/x"),
        (["steps", 0, "flows", 0, "expect"], "maybe", "steps[0].flows[0].expect: must be one of allow, deny"),
        (["steps", 0, "flows", 0, "reason"], "mood", "steps[0].flows[0].reason: must be one of "),
        (["steps", 0, "flows"], {}, "steps[0].flows: must be a list"),
        (["steps", 0, "apply"], [{"kind": "NetworkPolicy"}], "steps[0].apply[0].metadata: must be a mapping"),
        (["policies"], [{"metadata": {"name": "x"}}], "policies[0].kind: must be a name"),
        (["steps", 0, "flows", 0, "from"], "shop/x", "steps[0].flows[0].from: this lab has no shop/x; must be "),
        (["steps", 0, "flows", 0, "from"], "service:shop/db", "steps[0].flows[0].from: this lab has no service:"),
        (["steps", 0, "flows", 1, "to"], "db", "steps[0].flows[1].to: this lab has no db; must be NAMESPACE/POD"),
        (["steps", 0, "labelPods", 0, "name"], "shop/x", "steps[0].labelPods[0].name: this lab has no shop/x"),
        (["steps", 0, "flows", 0, "reason"], "policy", "steps[0].flows[0].reason: is for flows with expect: deny"),
        (["steps", 0, "remove", 0, "name"], "new", "steps[0].remove[0]: there is no policy shop/new by then (in step"),
        (
            ["services", 0, "externalIPs"],
            ["198.51.100.9", "10.244.1.9"],
            "services[0].externalIPs[1]: 10.244.1.9 is inside the networks of pods or of Services",
        ),
        (["services", 0, "externalIPs"], ["x"], "services[0].externalIPs[0]: "),
        (["services", 0, "addresses", 0], "192.0.2.9", "services[0].addresses[0]: 192.0.2.9 is not in 10.96.0.0/16"),
        (["settings"], {"denyWiht": "reset"}, "settings.denyWiht: unknown setting"),
        (
            ["settings"],
            {"credentials": {"tokenLifetimeSeconds": -1}},
            "settings.credentials.token",
        ),
        (["timeoutSeconds"], 0, "timeoutSeconds: must be a number of seconds"),
        (["enforcer"], "no", "enforcer: must be true or false"),
    ],
)
def test_a_fault_is_named_by_its_field(path: list[Any], value: object, complaint: str) -> None:
    tree = copy.deepcopy(SCENARIO)
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ScenarioError) as error:
        decode_scenario(tree)
    assert str(error.value).startswith(complaint)


@pytest.mark.parametrize(
    ("step", "where"),
    [
        (
            {"title": "go", "flows": [{"from": "shop/x", "to": "shop/db", "port": 1, "expect": "deny"}]},
            " (in step 2: go)",
        ),
        ({"title": "go", "flows": 1}, " (in step 2: go)"),
        ({"color": "red"}, " (in step 2)"),
        ("no step", " (in step 2)"),
    ],
)
def test_a_fault_in_a_step_names_the_step(step: object, where: str) -> None:
    with pytest.raises(ScenarioError) as error:
        decode_scenario({**SCENARIO, "steps": [*SCENARIO["steps"], step]})
    assert str(error.value).endswith(where)


def test_what_an_earlier_step_applied_can_be_removed_once() -> None:
    remove = {"remove": [{"namespace": "shop", "name": "new"}]}
    decode_scenario({**SCENARIO, "steps": [*SCENARIO["steps"], remove]})
    with pytest.raises(ScenarioError, match=r"steps\[2\]\.remove\[0\]: there is no policy shop/new by then"):
        decode_scenario({**SCENARIO, "steps": [*SCENARIO["steps"], remove, remove]})


def test_a_node_needs_a_name_that_its_enforcer_can_have() -> None:
    with pytest.raises(ScenarioError, match=r"^nodes\[1\]\.name: must be a DNS name"):
        decode_scenario({"nodes": [{"name": "a"}, {"name": "B"}]})


def test_a_field_that_occurs_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "story.yaml").write_text("title: one\nnodes: [{name: a}]\ntitle: two\n")
    with pytest.raises(ScenarioError, match=r"story\.yaml:3: duplicate field \"title\""):
        load_scenario(str(tmp_path / "story.yaml"))


def test_an_address_is_a_target() -> None:
    flow = {"from": "shop/web", "to": "203.0.113.1", "port": 1, "expect": "deny"}
    assert decode_scenario({**SCENARIO, "steps": [{"flows": [flow]}]}).steps[0].flows[0].target == "203.0.113.1"


def test_a_file_that_is_no_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "story.yaml"
    file.write_text("nodes:\n- [a\n")
    with pytest.raises(ScenarioError) as error:
        load_scenario(str(file))
    assert str(error.value).startswith(f"{file}:3: not YAML: ")


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_shipped_scenarios_load_by_name(name: str) -> None:
    assert load_scenario(name).steps


def test_the_documented_scenario_is_one() -> None:
    page = Path(__file__).parents[3] / "docs/lab.md"
    (block,) = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert [len(step.flows) for step in decode_scenario(yaml.safe_load(block)).steps] == [1, 2]


def test_an_unknown_scenario_is_answered_with_the_shipped_ones() -> None:
    with pytest.raises(ScenarioError, match="shipped scenarios: demo"):
        load_scenario("no-such")
