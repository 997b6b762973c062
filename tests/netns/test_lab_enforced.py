# SPDX-License-Identifier: Apache-2.0
"""A lab with enforcers: the demo, and what tests of the enforcer lean on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from enforcer_daemon.model import PodRef
from trireme_lab import HostSpec, Lab, LabError, LabSpec, NodeSpec, PodSpec, PortSpec, Tools
from trireme_lab.manifests import ObjectRef
from trireme_lab.runner import refused_objects, run_steps
from trireme_lab.scenario import Step, load_scenario
from triremectl.admin_client import AdminError

pytestmark = pytest.mark.kernel

WEB = PodSpec(PodRef("shop", "web"), "a", labels={"app": "web"}, ports=(PortSpec(80),))
DB = PodSpec(PodRef("shop", "db"), "b", labels={"app": "db"}, ports=(PortSpec(5432, name="sql"),))
WORLD = LabSpec(
    nodes=(NodeSpec.numbered("a", 1), NodeSpec.numbered("b", 2)),
    namespaces={"shop": {"team": "x"}, "dev": {}},
    pods=(WEB, DB, PodSpec(PodRef("dev", "debug"), "a")),
    hosts=(HostSpec("near", node="b"),),
    settings={"denyWith": "reset"},
)


def _policy(name: str, spec: dict[str, object]) -> dict[str, object]:
    metadata = {"namespace": "shop", "name": name}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


DENY = _policy("deny", {"podSelector": {}})
WEB_TO_DB = _policy(
    "web-to-db",
    {
        "podSelector": {"matchLabels": {"app": "db"}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": "sql"}]}],
    },
)
BY_NAMESPACE = _policy(
    "by-namespace",
    {"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"may": "enter"}}}]}]},
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(WORLD) as lab:
        yield lab


@pytest.fixture
def locked(lab: Lab) -> Iterator[Lab]:
    """The lab with a default deny in the shop, taken back afterwards with all that the test added."""
    assert lab.apply(DENY)
    yield lab
    for node in lab.nodes.values():
        for file in node.directories.policy.glob("networkpolicy_*.yaml"):
            file.unlink()
    lab.label_namespace("dev", {})


@pytest.mark.slow
def test_the_demo_goes_as_expected() -> None:
    scenario = load_scenario("demo")
    with Lab(scenario.spec, replace(Tools(), probe_timeout_s=scenario.timeout_s)) as lab:
        results = [item for result in run_steps(lab, scenario.steps) for item in result.flows]
    assert [item for item in results if not item.is_as_expected] == []
    assert len(results) == sum(len(step.flows) for step in scenario.steps)


def test_a_refused_policy_is_known_by_its_name_and_the_reason(locked: Lab) -> None:
    step = Step(apply=(_policy("bad", {"podSelector": {}, "policyTypes": ["Both"]}),))
    (result,) = run_steps(locked, [step])
    (refused,) = result.refused
    assert refused.startswith("NetworkPolicy shop/bad: spec.policyTypes[0]: ")
    assert locked.remove(ObjectRef("NetworkPolicy", "shop", "bad"))
    assert refused_objects(locked) == ()


def test_a_policy_applied_and_removed_is_in_force_when_the_call_returns(locked: Lab) -> None:
    assert locked.probe("shop/web", "shop/db", 5432).outcome.is_denied
    assert locked.apply(WEB_TO_DB)
    assert locked.probe("shop/web", "shop/db", 5432).outcome.is_allowed
    assert locked.probe("dev/debug", "shop/db", 5432).outcome.is_denied
    assert locked.probe("host:near", "shop/db", 5432).outcome.is_denied
    assert locked.remove(ObjectRef("NetworkPolicy", "shop", "web-to-db"))
    assert locked.probe("shop/web", "shop/db", 5432).outcome.is_denied
    with pytest.raises(LabError, match="no NetworkPolicy shop/web-to-db to remove"):
        locked.remove(ObjectRef("NetworkPolicy", "shop", "web-to-db"))


def test_labels_of_a_pod_and_of_a_namespace_count_at_once(locked: Lab) -> None:
    locked.apply(WEB_TO_DB, BY_NAMESPACE)
    assert locked.label("shop/web", {"app": "other"})
    assert locked.probe("shop/web", "shop/db", 5432).outcome.is_denied
    assert locked.label("shop/web", {"app": "web"})
    assert locked.probe("shop/web", "shop/db", 5432).outcome.is_allowed
    assert locked.label_namespace("dev", {"may": "enter"})
    assert locked.probe("dev/debug", "shop/db", 5432).outcome.is_allowed


def test_a_denial_is_told_by_the_node_of_the_pod(locked: Lab) -> None:
    locked.probe("shop/web", "shop/db", 5432)
    (endpoint,) = locked.node("b").endpoints()
    denials = endpoint["recent_denials"]
    assert isinstance(denials, list)
    assert denials[-1]["peer"] == "shop/web"
    assert denials[-1]["reason"] == "ingress-denied"
    assert any(record.get("reason") == "ingress-denied" for record in locked.node("b").log_records())


def test_a_killed_enforcer_lets_nothing_new_through_and_a_new_one_goes_on(locked: Lab) -> None:
    locked.apply(WEB_TO_DB)
    node = locked.node("b")
    with locked.open_socket("shop/web") as client:
        client.settimeout(3)
        client.connect((str(locked.address_of("shop/db")), 5432))
        with client.makefile("rwb") as stream:
            assert stream.readline() == b"shop/db\n"
            node.kill()
            with pytest.raises(AdminError):
                node.status()
            probe = replace(locked.request("dev/debug", "shop/db", 5432), timeout_s=0.5)
            assert locked.probe_all([probe])[0].outcome.is_denied
            stream.write(b"still there?\n")
            stream.flush()
            assert stream.readline() == b"still there?\n"
        node.start()
        node.wait_ready()
    assert locked.probe("shop/web", "shop/db", 5432).outcome.is_allowed
    assert locked.probe("dev/debug", "shop/db", 5432).outcome.is_denied


def test_an_enforcer_stops_in_good_order(lab: Lab) -> None:
    assert lab.node("a").stop() == 0
    lab.node("a").start()
    lab.node("a").wait_ready()


def test_an_enforcer_that_cannot_start_is_quoted() -> None:
    broken = replace(Tools(), enforcer=(sys.executable, "-c", "import sys; sys.exit('no such key')"))
    with pytest.raises(LabError, match=r"node a: the daemon ended:\s+no such key"), Lab(WORLD, broken):
        pass


def test_two_labs_with_the_same_addresses_do_not_meet(lab: Lab) -> None:
    with Lab(replace(WORLD, manifests=(DENY,))) as other:
        assert other.probe("dev/debug", "shop/db", 5432).outcome.is_denied
        assert lab.probe("dev/debug", "shop/db", 5432).outcome.is_allowed
