# SPDX-License-Identifier: Apache-2.0
"""What the lab writes: routes, rules, CNI configuration, settings and policy files."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import yaml

from enforcer_daemon.model import PodRef
from enforcer_daemon.settings_file import decode_settings
from trireme_lab.chain import ADD_TIMEOUT_S, SHIPPED_CONFLIST, load_conflist, node_conflist
from trireme_lab.errors import LabError, ScenarioError
from trireme_lab.links import AddRoute, AddVeth
from trireme_lab.manifests import ObjectRef, object_ref, put_manifest, remove_manifest
from trireme_lab.network import fabric_steps, node_rules, uplink_steps
from trireme_lab.node import NodeDirectories
from trireme_lab.settings import daemon_settings, overlay
from trireme_lab.spec import LabSpec, NodeSpec, PodSpec, ServicePort, ServiceSpec

NODE = NodeSpec.numbered("a", 1)


def test_the_fabric_routes_a_nodes_pods_through_its_address_of_the_same_family() -> None:
    steps = fabric_steps(0, Path("/n"), NODE.addresses, NODE.pod_networks)
    assert steps[0] == AddVeth("port0", "eth0", Path("/n"))
    for network, gateway in (("10.244.1.0/24", "192.168.60.11"), ("fd00:10:244:1::/64", "fd00:60::b")):
        assert AddRoute(ip_network(network), "port0", ip_address(gateway), is_onlink=True) in steps


def test_a_host_with_one_family_gets_one_default_route() -> None:
    steps = uplink_steps([ip_address("203.0.113.1")])
    routes = [step for step in steps if isinstance(step, AddRoute) and step.destination.prefixlen == 0]
    assert routes == [AddRoute(ip_network("0.0.0.0/0"), "eth0", ip_address("169.254.0.1"))]


def test_service_rules_are_made_where_both_ends_have_the_family() -> None:
    service = ServiceSpec("x", "s", (ip_address("10.96.0.1"),), (), (ServicePort(80, 8080, node_port=30080),))
    rules = node_rules([(service, [ip_address("10.244.1.2"), ip_address("fd00::2")])])
    assert "ip daddr { 10.96.0.1 } tcp dport 80 goto svc-0-tcp-80-v4" in rules
    assert "fib daddr type local tcp dport 30080" in rules
    assert "dnat ip to 10.244.1.2:8080" in rules
    assert "fd00::2" not in rules
    assert "ct state invalid counter drop" in rules


def test_external_addresses_are_translated_with_masquerade_and_are_virtual() -> None:
    external = (ip_address("198.51.100.9"), ip_address("2001:db8::9"))
    service = ServiceSpec("x", "s", (ip_address("10.96.0.1"),), (), (ServicePort(80, 8080, node_port=30080),), external)
    rules = node_rules([(service, [ip_address("10.244.1.2"), ip_address("fd00::2")])])
    assert "ip daddr { 198.51.100.9 } tcp dport 80 meta mark set meta mark | 0x4000 goto svc-0-tcp-80-v4" in rules
    assert "ip6 daddr { 2001:db8::9 } tcp dport 80 meta mark set meta mark | 0x4000 goto svc-0-tcp-80-v6" in rules
    assert "nfproto ipv6" not in rules  # No cluster address of that family, so no node port.
    world = LabSpec(nodes=(NODE,), services=(replace(service, ports=(ServicePort(80, 8080),)),))
    settings = decode_settings(daemon_settings(world, NODE, NodeDirectories(Path("/d")), (Path("/ca"), Path("/key"))))
    assert settings.networks.virtual[2:] == (ip_network("198.51.100.9/32"), ip_network("2001:db8::9/128"))
    assert settings.networks.masquerade == NODE.addresses


def test_a_nodes_chain_is_the_shipped_one_with_its_own_networks_and_directories() -> None:
    chain = node_conflist(
        load_conflist(SHIPPED_CONFLIST), NODE.pod_networks, Path("/d/ipam"), Path("/d/run"), is_enforced=True
    )
    bridge, *_, trireme = chain["plugins"]
    assert bridge["ipam"]["ranges"] == [[{"subnet": "10.244.1.0/24"}], [{"subnet": "fd00:10:244:1::/64"}]]
    assert bridge["ipam"]["dataDir"] == "/d/ipam"
    assert trireme == {"type": "trireme", "runDir": "/d/run", "addTimeoutSeconds": ADD_TIMEOUT_S}


def test_without_enforcement_only_our_plugin_is_left_out() -> None:
    shipped = load_conflist(SHIPPED_CONFLIST)
    chain = node_conflist(shipped, NODE.pod_networks[:1], Path("/d"), Path("/d"), is_enforced=False)
    assert [p["type"] for p in chain["plugins"]] == [p["type"] for p in shipped["plugins"] if p["type"] != "trireme"]
    assert chain["plugins"][0]["ipam"]["routes"] == [{"dst": "0.0.0.0/0"}]


def test_a_conflist_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("{}")
    with pytest.raises(LabError, match="c: plugins: must be a list"):
        load_conflist(tmp_path / "c")


def test_settings_are_valid_and_a_world_can_overlay_them() -> None:
    service = ServiceSpec("x", "s", (ip_address("10.96.0.1"),), (), (ServicePort(80, 80, node_port=30080),))
    world = LabSpec(nodes=(NODE,), services=(service,), settings={"denyWith": "reset", "log": {"level": "debug"}})
    tree = daemon_settings(world, NODE, NodeDirectories(Path("/d")), (Path("/ca"), Path("/key")))
    settings = decode_settings(tree)
    assert settings.networks.enforced == NODE.pod_networks
    assert settings.networks.masquerade == NODE.addresses
    assert ip_network("192.168.60.11/32") in settings.networks.virtual
    assert settings.registration.run_dir == Path("/d/run")
    assert (settings.deny_with.value, settings.log.level.value) == ("reset", "debug")


def test_overlay_goes_group_by_group() -> None:
    assert overlay({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}, "d": 5}) == {"a": {"b": 1, "c": 4}, "d": 5}


def test_a_manifest_is_put_whole_replaced_and_removed(tmp_path: Path) -> None:
    directory, staging = tmp_path / "policy", tmp_path / "staging"
    directory.mkdir()
    staging.mkdir()
    manifest = {"kind": "NetworkPolicy", "metadata": {"namespace": "x", "name": "y"}}
    put_manifest(directory, staging, manifest)
    put_manifest(directory, staging, manifest | {"spec": {}})
    (file,) = directory.iterdir()
    assert yaml.safe_load(file.read_text()) == manifest | {"spec": {}}
    assert remove_manifest(directory, object_ref(manifest))
    assert not remove_manifest(directory, object_ref(manifest))
    assert list(staging.iterdir()) == []


def test_objects_are_named_as_kubernetes_names_them() -> None:
    assert object_ref({"kind": "Namespace", "metadata": {"name": "x"}}) == ObjectRef("Namespace", "", "x")
    assert object_ref({"kind": "Pod", "metadata": {"name": "x"}}) == ObjectRef("Pod", "default", "x")
    with pytest.raises(ScenarioError, match=r"metadata\.name: must be a name"):
        object_ref({"kind": "Pod", "metadata": {}})


def test_a_world_refuses_what_occurs_twice() -> None:
    pod = PodSpec(PodRef("x", "y"), "a")
    with pytest.raises(ScenarioError, match="pods: x/y occurs twice"):
        LabSpec(nodes=(NODE,), pods=(pod, pod))
