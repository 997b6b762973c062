# SPDX-License-Identifier: Apache-2.0
"""How objects of the API become values: what is kept, what is refused, and that the last good version stays."""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer_daemon.kube import kept
from enforcer_daemon.kube.networks import discover, missing_networks
from enforcer_daemon.kube.resources import (
    MAX_EXTERNAL_IPS,
    MAX_INGRESS,
    MAX_SERVICE_PORTS,
    NAMESPACES,
    NETWORK_POLICIES,
    NODES,
    PODS,
    SERVICE_CIDRS,
    SERVICES,
    NodeNetworks,
    Resource,
    ServiceAddresses,
)
from enforcer_daemon.kube.table import Entry, Table, read_entry
from enforcer_daemon.model import NamedPort, PodRef, Protocol
from enforcer_daemon.policy.objects import EVERYTHING, NetworkPolicy, Operator, Requirement, Selector
from enforcer_daemon.settings import NetworkSettings
from enforcer_daemon.sources.manifests import Problem

RESOURCES: list[Resource[Any]] = [NETWORK_POLICIES, NAMESPACES, PODS, NODES, SERVICES, SERVICE_CIDRS]


def policy(name: str = "p", **spec: object) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "x", "futureField": 1}, "spec": {"podSelector": {}, **spec}}


def pod(**metadata: object) -> dict[str, Any]:
    port = {"name": "http", "containerPort": 8080, "futureField": 1}
    return {
        "metadata": {"name": "web", "namespace": "x", "uid": "u-1", "labels": {"app": "web"}, **metadata},
        "spec": {
            "nodeName": "a",
            "serviceAccountName": "robot",
            "containers": [{"name": "c", "image": "i", "ports": [port]}],
            "initContainers": [{"name": "once", "ports": [{"name": "never", "containerPort": 1}]}],
            "tolerations": [],
        },
        "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": []},
    }


def read(resource: Resource[Any], manifest: object, table: Table[Any] | None = None) -> Entry[Any]:
    entry = read_entry(resource, manifest, {} if table is None else table.entries)  # type: ignore[arg-type]
    assert isinstance(entry, Entry)
    return entry


def value(resource: Resource[Any], manifest: object) -> Any:
    """Return what a good manifest is decoded to."""
    found = read(resource, manifest).value
    assert found is not None
    return found


def test_a_pod_is_reduced_to_what_policy_needs() -> None:
    found = value(PODS, pod())
    assert found.ref == PodRef("x", "web")
    assert (found.labels, found.service_account, found.node, found.uid) == ({"app": "web"}, "robot", "a", "u-1")
    assert found.named_ports == (NamedPort("http", 8080, Protocol.TCP),)
    assert b"image" not in read(PODS, pod()).document


def test_a_static_pods_mirror_goes_by_its_config_hash() -> None:
    annotations = {"kubernetes.io/config.hash": "abc", "kubernetes.io/config.mirror": "abc"}
    assert value(PODS, pod(annotations=annotations)).uid == "abc"
    assert value(PODS, pod(annotations={"kubernetes.io/config.hash": "abc"})).uid == "u-1"


@pytest.mark.parametrize(
    ("resource", "manifest", "field"),
    [
        (NETWORK_POLICIES, policy(futureField=1), "spec.futureField"),
        (NETWORK_POLICIES, policy(ingress=[{"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}]), "cidr"),
        (NAMESPACES, {"metadata": {"name": "x", "labels": {"a b": "c"}}}, "metadata.labels"),
        (PODS, pod(uid=None), "metadata.uid"),
        (PODS, pod(uid=7), "metadata.uid"),
        (PODS, {**pod(), "spec": []}, "spec"),
        (NODES, {"metadata": {"name": "a"}, "spec": {"podCIDRs": ["10.0.0.0"] * 2 + ["x"]}}, "spec.podCIDRs[2]"),
        (SERVICES, {"metadata": {"name": "s"}, "spec": {"externalIPs": ["300.0.0.1"]}}, "spec.externalIPs[0]"),
        (SERVICE_CIDRS, {"metadata": {"name": "s"}, "spec": {"cidrs": "10.0.0.0/8"}}, "spec.cidrs"),
    ],
)
def test_a_bad_object_is_refused_with_its_field(resource: Resource[Any], manifest: object, field: str) -> None:
    entry = read(resource, manifest)
    assert entry.document == b""
    assert (entry.value is None) is (resource is not NETWORK_POLICIES)
    assert field in entry.problems[0].field


def test_the_last_good_version_stays_and_a_mended_one_replaces_it() -> None:
    table: Table[Any] = Table(NETWORK_POLICIES)
    assert table.put(read(NETWORK_POLICIES, policy(), table))
    (good,) = table.values()
    assert table.put(read(NETWORK_POLICIES, policy(policyTypes=["Sideways"]), table))
    assert table.values() == [good]
    assert [(problem.field, problem.has_earlier) for problem in table.problems()] == [("spec.policyTypes[0]", True)]
    assert table.put(read(NETWORK_POLICIES, policy(), table))
    assert (table.values(), table.problems()) == ([good], ())
    assert not table.put(read(NETWORK_POLICIES, policy(), table))  # the same again is no change


def test_an_object_that_was_never_good_has_no_earlier_version() -> None:
    table: Table[Any] = Table(NETWORK_POLICIES)
    for wrong in ("Sideways", "Upwards"):
        assert table.put(read(NETWORK_POLICIES, policy(policyTypes=[wrong]), table))
        assert [problem.has_earlier for problem in table.problems()] == [False]


CLOSED: tuple[object, ...] = ()
WEB = Selector((Requirement("app", Operator.IN, frozenset({"web"})),))


@pytest.mark.parametrize(
    ("spec", "selector", "ingress", "egress"),
    [
        ({"futureField": 1}, WEB, CLOSED, None),
        ({"ingress": [{"from": [{"futurePeer": {}}]}]}, WEB, CLOSED, None),
        ({"egress": [{"to": [{"futurePeer": {}}]}]}, WEB, CLOSED, CLOSED),
        ({"policyTypes": ["Egress"], "egress": [{}], "futureField": 1}, WEB, None, CLOSED),
        ({"policyTypes": ["Sideways"]}, WEB, CLOSED, CLOSED),
        ({"podSelector": {"futureSelector": 1}}, EVERYTHING, CLOSED, CLOSED),
    ],
)
def test_a_policy_that_was_never_good_isolates_and_allows_nothing(
    spec: dict[str, Any], selector: Selector, ingress: object, egress: object
) -> None:
    found = read(NETWORK_POLICIES, policy(**{"podSelector": {"matchLabels": {"app": "web"}}, **spec}))
    assert found.value == NetworkPolicy("x", "p", selector, ingress, egress)  # type: ignore[arg-type]
    assert not found.problems[0].has_earlier


def test_what_stands_in_follows_the_policy_and_goes_with_it() -> None:
    table: Table[Any] = Table(NETWORK_POLICIES)
    for app in ("web", "db"):
        bad = policy(podSelector={"matchLabels": {"app": app}}, futureField=1)
        assert table.put(read(NETWORK_POLICIES, bad, table))
        assert app in str(table.values())
    assert table.put(read(NETWORK_POLICIES, policy(), table))
    assert (table.values(), table.problems()) == ([read(NETWORK_POLICIES, policy()).value], ())


def test_a_complete_list_removes_what_is_not_in_it() -> None:
    table: Table[Any] = Table(NETWORK_POLICIES)
    nameless = read_entry(NETWORK_POLICIES, {"metadata": {}}, {})
    assert isinstance(nameless, Problem)
    assert table.replace([read(NETWORK_POLICIES, policy("a")), read(NETWORK_POLICIES, policy("b")), nameless])
    assert len(table.problems()) == 1
    assert table.replace([read(NETWORK_POLICIES, policy("b"), table)])
    assert ([found.name for found in table.values()], table.problems()) == (["b"], ())
    revision = table.revision
    assert not table.replace([read(NETWORK_POLICIES, policy("b"), table)])
    assert table.revision == revision


FIELDS = [
    *("metadata", "spec", "status", "name", "namespace", "uid", "labels", "annotations", "ports", "containers"),
    *("podCIDRs", "addresses", "cidrs", "externalIPs", "loadBalancer", "ingress", "ip", "podSelector"),
]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["metadata", "spec", "status"]), values), st.sampled_from(RESOURCES))
def test_whatever_an_object_is_it_is_read_or_refused(manifest: dict[str, object], resource: Resource[Any]) -> None:
    manifest = {**manifest, "metadata": {**_mapping(manifest.get("metadata")), "name": "n", "namespace": "x"}}
    entry = read(resource, manifest)
    assert bool(entry.document) != bool(entry.problems)
    assert (entry.value is None) == (bool(entry.problems) and resource is not NETWORK_POLICIES)


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


# Networks.

NODE = NodeNetworks("a", (ip_network("10.1.0.0/24"), ip_network("fd01::/64")), (ip_address("192.0.2.1"),))
NEXT = NodeNetworks("b", (ip_network("10.1.1.0/24"),), (ip_address("192.0.2.2"),))
CIDRS = [(ip_network("10.96.0.0/16"),)]


def test_networks_are_discovered_and_neighbours_put_together() -> None:
    found = discover(NetworkSettings(), [NODE, NEXT], CIDRS)
    assert found.enforced == (ip_network("10.1.0.0/23"), ip_network("fd01::/64"))
    assert found.virtual == (ip_network("10.96.0.0/16"),)


def test_what_is_configured_is_not_discovered() -> None:
    configured = NetworkSettings(enforced=(ip_network("10.0.0.0/8"),), virtual=(ip_network("172.16.0.0/12"),))
    assert discover(configured, [NODE], CIDRS) == configured


def test_a_node_without_networks_is_told_what_to_set() -> None:
    bare = NodeNetworks("a", (), ())
    assert "networks.enforced" in missing_networks(NetworkSettings(), "a", [bare, NEXT])
    assert missing_networks(NetworkSettings(), "a", [NODE]) == ""
    assert missing_networks(NetworkSettings(enforced=(ip_network("10.0.0.0/8"),)), "a", [bare]) == ""


def test_addresses_of_services() -> None:
    ingress = [{"ip": "198.51.100.7"}, {"hostname": "lb.example"}, {"ip": "198.51.100.8", "ipMode": "Proxy"}]
    ports = [{"port": 80}, {"port": 81, "nodePort": 30081}, {"port": 81, "nodePort": 30081, "protocol": "UDP"}]
    service = {
        "metadata": {"name": "s", "namespace": "x", "labels": {"a": "b"}},
        "spec": {"externalIPs": ["203.0.113.001", "::ffff:203.0.113.1"], "ports": ports},
        "status": {"loadBalancer": {"ingress": ingress}},
    }
    addresses = (ip_address("203.0.113.1"),), (ip_address("198.51.100.7"),)
    found = read(SERVICES, service)
    node_ports = ((Protocol.TCP, 30081), (Protocol.UDP, 30081))
    service_ports = ((Protocol.TCP, 80), (Protocol.TCP, 81), (Protocol.UDP, 81))
    assert found.value == ServiceAddresses(*addresses, node_ports, service_ports)
    assert b"labels" not in found.document


@pytest.mark.parametrize(
    "changed",
    [
        {"labels": {"service.kubernetes.io/service-proxy-name": "other"}},
        {"labels": {"service.kubernetes.io/headless": ""}},
        {"clusterIP": "None"},
        {"type": "ExternalName"},
    ],
)
def test_a_service_that_kube_proxy_passes_over_has_no_addresses(changed: dict[str, Any]) -> None:
    """Nobody translates them, so what is sent there leaves the cluster."""
    spec = {"externalIPs": ["203.0.113.1"], "ports": [{"nodePort": 30080}], **changed}
    service = {"metadata": {"name": "s", "namespace": "x", "labels": changed.get("labels")}, "spec": spec}
    assert read(SERVICES, service).value == ServiceAddresses()


def test_a_service_with_more_addresses_than_may_be_is_refused_and_hardly_read() -> None:
    def listing(count: int) -> dict[str, Any]:
        addresses = [f"203.0.{number // 250}.{number % 250}" for number in range(count)]
        return {"metadata": {"name": "s", "namespace": "x"}, "spec": {"externalIPs": addresses}}

    assert len(value(SERVICES, listing(MAX_EXTERNAL_IPS)).external) == MAX_EXTERNAL_IPS
    ingress = [{"ip": f"203.0.{number // 250}.{number % 250}"} for number in range(MAX_INGRESS + 1)]
    status = {"loadBalancer": {"ingress": ingress}}
    assert read(SERVICES, {"metadata": {"name": "s", "namespace": "x"}, "status": status}).problems
    status = {"loadBalancer": {"ingress": ingress[:-1]}}
    assert not read(SERVICES, {"metadata": {"name": "s", "namespace": "x"}, "status": status}).problems
    refused = read(SERVICES, listing(20_000))
    assert (refused.value, [problem.field for problem in refused.problems]) == (None, ["spec.externalIPs"])
    assert f"at most {MAX_EXTERNAL_IPS}" in refused.problems[0].message
    assert len(str(SERVICES.reduce(listing(20_000)))) < 30 * MAX_EXTERNAL_IPS
    ports = [{"nodePort": 1 + number} for number in range(MAX_SERVICE_PORTS + 1)]
    assert read(SERVICES, {"metadata": {"name": "s", "namespace": "x"}, "spec": {"ports": ports}}).problems
    ports = [{"port": 1 + number} for number in range(5_000)]  # Without node ports, as many as it likes.
    entry = read(SERVICES, {"metadata": {"name": "s", "namespace": "x"}, "spec": {"ports": ports}})
    assert (entry.value, len(entry.document) < 150) == (ServiceAddresses(), True)


def test_an_address_of_a_node_that_cannot_be_read_costs_its_pods_nothing() -> None:
    addresses = [{"type": "InternalIP", "address": "node-a.example"}, {"type": "InternalIP", "address": "192.0.2.1"}]
    manifest = {
        "metadata": {"name": "a"},
        "spec": {"podCIDRs": ["010.1.0.5/24"]},
        "status": {"addresses": addresses},
    }
    assert read(NODES, manifest).value == NodeNetworks("a", (ip_network("10.1.0.0/24"),), (ip_address("192.0.2.1"),))


# On disk.


@pytest.mark.parametrize(
    ("resource", "manifest"),
    [
        (NETWORK_POLICIES, policy()),
        (PODS, pod(annotations={"kubernetes.io/config.hash": "abc", "kubernetes.io/config.mirror": "abc"})),
        (NODES, {"metadata": {"name": "a"}, "spec": {"podCIDRs": ["10.1.0.0/24"]}, "status": {"addresses": [
            {"type": "InternalIP", "address": "192.0.2.1"}, {"type": "Hostname", "address": "a"}]}}),
        (SERVICES, {"metadata": {"name": "s", "namespace": "x"}, "spec": {"ports": [{"nodePort": 30000}]},
                    "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.7"}]}}}),
        (SERVICE_CIDRS, {"metadata": {"name": "s"}, "spec": {"cidrs": ["10.96.0.0/16"]}}),
    ],
)  # fmt: skip
def test_what_is_kept_is_what_was_in_force(tmp_path: Path, resource: Resource[Any], manifest: object) -> None:
    entry = read(resource, manifest)
    assert entry.value is not None
    kept.save(tmp_path / "state", resource, "a", [entry.document])
    assert kept.load(tmp_path / "state", resource, "a") == kept.Kept((entry,), "", is_there=True)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert kept.file_of(tmp_path / "state", resource).stat().st_mode & 0o777 == 0o600


def test_what_another_node_kept_or_nobody_can_read_is_not_used(tmp_path: Path) -> None:
    assert kept.load(tmp_path, PODS, "a") == kept.Kept()
    kept.save(tmp_path, PODS, "b", [])
    assert "something else" in kept.load(tmp_path, PODS, "a").problem
    path = kept.file_of(tmp_path, PODS)
    header = json.dumps({"version": 1, "resource": "pods", "scope": "a"})
    for content in ("", "{", f"{header}\n[", f"{header}\n[]", f'{header}\n{{"metadata": {{"name": "x"}}}}'):
        path.write_text(content)
        found = kept.load(tmp_path, PODS, "a")
        assert found.problem
        assert not found.is_there
