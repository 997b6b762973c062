# SPDX-License-Identifier: Apache-2.0
"""Connections through Services: evaluated by the pod that answers, and by the address that really dialed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.model import PodRef
from tests.e2e.operation_world import FAMILIES, HTTP, NODES, RESET, app, block, denials, outcome, pod, policy
from tests.e2e.raw_pod import RawPod, Scene, arrives, fresh_marker, hearing, plain_syn
from trireme_lab import HostSpec, Lab, LabSpec, Outcome, ServicePort, ServiceSpec, Tools
from trireme_lab.manifests import object_ref

pytestmark = pytest.mark.kernel

PORT = 80
"""The Services' port; the pods listen on 8080."""
NODE_PORT = {"web-a": 30001, "web-b": 30002}
OUTSIDE = HostSpec("outside", (ip_address("203.0.113.7"), ip_address("2001:db8::7")))
VERSIONS = [4, 6]


def _service(name: str, number: int, *pods: str) -> ServiceSpec:
    addresses = (ip_address(f"10.96.0.{number}"), ip_address(f"fd00:10:96::{number}"))
    port = ServicePort(PORT, HTTP.number, node_port=NODE_PORT.get(name))
    return ServiceSpec("x", name, addresses, tuple(PodRef("x", p) for p in pods), (port,))


PODS = (
    pod("web-a", "a", app="web"),
    pod("web-b", "b", app="web"),
    pod("client", "a"),
    pod("stranger", "a"),
    pod("to-web", "a"),
    pod("to-service-port", "a"),
    pod("to-service-address", "a"),
    pod("to-others", "a"),
)
EXTERNAL = {4: ip_address("198.51.100.9"), 6: ip_address("2001:db8:9::9")}
EXTERNAL_OPEN = {4: ip_address("198.51.100.10"), 6: ip_address("2001:db8:9::10")}
"""Those of a Service whose pod no policy selects."""
SERVICES = (
    _service("web", 10, "web-a", "web-b"),
    _service("web-a", 11, "web-a"),
    _service("web-b", 12, "web-b"),
    replace(_service("external", 13, "web-b"), external_ips=tuple(EXTERNAL.values())),
    replace(_service("open", 14, "to-web"), external_ips=tuple(EXTERNAL_OPEN.values())),
)
MANIFESTS = (
    policy("deny-all", "web", ingress=[]),
    policy("web", "web", ingress=[{"from": [app("client"), app("to-web")], "ports": [{"port": HTTP.number}]}]),
    policy("to-web", "to-web", egress=[{"to": [app("web")], "ports": [{"port": HTTP.number}]}]),
    policy("to-service-port", "to-service-port", egress=[{"to": [app("web")], "ports": [{"port": PORT}]}]),
    policy("to-service-address", "to-service-address", egress=[{"to": block("10.96.0.0/16", "fd00:10:96::/112")}]),
    policy("to-others", "to-others", egress=[{"to": [app("client")], "ports": [{"port": HTTP.number}]}]),
)
VIA_SERVICES = ("service:x/web", "service:x/web-a", "service:x/web-b")


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    world = LabSpec(NODES, {"x": {}}, PODS, (OUTSIDE,), SERVICES, MANIFESTS, RESET)
    with Lab(world, Tools(plugin=plugin, probe_timeout_s=20.0)) as lab:
        yield lab


@contextmanager
def _also(lab: Lab, name: str, peers: Sequence[object]) -> Iterator[None]:
    """Let these peers, too, reach the web pods during the block."""
    manifest = policy(name, "web", ingress=[{"from": peers, "ports": [{"port": HTTP.number}]}])
    try:
        assert lab.apply(manifest)
        yield
    finally:
        lab.remove(object_ref(manifest))


def test_the_path_drops_what_conntrack_calls_invalid_and_finds_nothing(lab: Lab) -> None:
    for target in VIA_SERVICES:
        for version in VERSIONS:
            assert outcome(lab, "x/client", target, PORT, version) is Outcome.CONNECTED
    for name in "ab":
        (rule,) = [
            line
            for line in lab.run(f"node:{name}", "nft", "list", "chain", "inet", "lab", "forward").splitlines()
            if "invalid" in line
        ]
        assert "packets 0 bytes 0 drop" in rule


@pytest.mark.stock_kernel
@pytest.mark.parametrize("version", VERSIONS)
def test_ingress_is_judged_by_the_pods_own_port_and_by_who_dialled(lab: Lab, version: int) -> None:
    allowed = lab.probe_all([lab.request("x/client", "service:x/web", PORT, version)] * 20)
    assert {r.outcome for r in allowed} == {Outcome.CONNECTED}
    assert {r.banner for r in allowed} == {"x/web-a", "x/web-b"}
    denied = lab.probe_all([lab.request("x/stranger", target, PORT, version) for target in VIA_SERVICES])
    assert all(r.outcome.is_denied for r in denied)
    assert denials(lab, "x/web-a")[-1] == denials(lab, "x/web-b")[-1] == "ingress-denied"


@pytest.mark.stock_kernel
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", VIA_SERVICES)
def test_egress_is_judged_by_the_pod_that_answers(lab: Lab, target: str, version: int) -> None:
    assert outcome(lab, "x/to-web", target, PORT, version) is Outcome.CONNECTED
    for source in ("x/to-service-port", "x/to-service-address", "x/to-others"):
        assert outcome(lab, source, target, PORT, version).is_denied


@pytest.mark.parametrize("version", VERSIONS)
def test_external_addresses_lead_to_the_pods_by_identity_and_outsiders_there_by_address(lab: Lab, version: int) -> None:
    address, open_address = str(EXTERNAL[version]), str(EXTERNAL_OPEN[version])
    for source in ("x/client", "x/to-web"):
        assert outcome(lab, source, address, PORT, version) is Outcome.CONNECTED
    assert outcome(lab, "x/stranger", address, PORT, version).is_denied
    assert denials(lab, "x/web-b")[-1] == "ingress-denied"
    assert outcome(lab, "x/to-others", address, PORT, version).is_denied
    assert outcome(lab, "host:outside", address, PORT, version).is_denied
    assert outcome(lab, "host:outside", open_address, PORT, version) is Outcome.CONNECTED


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", ["service:x/web-a", "service:x/web-b"])
def test_established_flows_are_judged_again_by_the_pod_behind_the_service(lab: Lab, target: str, version: int) -> None:
    """The initiator's kernel knows the virtual address alone."""
    to_web = {"to": [app("web")], "ports": [{"port": HTTP.number}]}
    address = str(lab.address_of(target, version))
    with lab.open_socket("x/to-web", FAMILIES[version]) as client:
        client.settimeout(3.0)
        client.connect((address, PORT))
        assert client.recv(100).startswith(b"x/web-")
        assert lab.apply(policy("to-web", "to-web", egress=[to_web, {"to": [app("client")]}]))
        client.sendall(b"still here")
        assert client.recv(100) == b"still here"
        try:
            assert lab.apply(policy("to-web", "to-web", egress=[{"to": block("10.96.0.0/16", "fd00:10:96::/112")}]))
            with pytest.raises(ConnectionError):
                client.recv(100)
        finally:
            lab.apply(policy("to-web", "to-web", egress=[to_web]))


@pytest.mark.stock_kernel
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["web-a", "web-b"])
def test_a_pod_reaches_itself_through_its_service_whatever_the_policies(lab: Lab, name: str, version: int) -> None:
    result = lab.probe(f"x/{name}", f"service:x/{name}", PORT, version)
    assert (result.outcome, result.banner) == (Outcome.CONNECTED, f"x/{name}")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_pod_does_not_pass_for_itself_at_the_other_pod_of_its_service(lab: Lab, version: int) -> None:
    assert outcome(lab, "x/web-a", "service:x/web-b", PORT, version).is_denied
    assert outcome(lab, "x/web-b", "service:x/web-a", PORT, version).is_denied


@pytest.mark.parametrize("version", VERSIONS)
def test_a_nodes_own_process_reaches_its_own_pods_through_a_service(lab: Lab, version: int) -> None:
    assert outcome(lab, "node:a", "service:x/web-a", PORT, version) is Outcome.CONNECTED
    assert outcome(lab, "node:b", "service:x/web-b", PORT, version) is Outcome.CONNECTED


def test_another_node_is_an_address_like_any_other(lab: Lab) -> None:
    for version in VERSIONS:
        assert outcome(lab, "node:b", "service:x/web-a", PORT, version).is_denied
        assert outcome(lab, "node:b", "x/web-a", HTTP.number, version).is_denied
    with _also(lab, "node-b", block(*_cidrs(lab, "node:b"))):
        for version in VERSIONS:
            assert outcome(lab, "node:b", "service:x/web-a", PORT, version) is Outcome.CONNECTED


def _cidrs(lab: Lab, place: str) -> list[str]:
    return [f"{address}/{address.max_prefixlen}" for address in lab.place(place).addresses]


EVERY_WAY = [("a", "web-a"), ("b", "web-a"), ("b", "web-b"), ("a", "web-b")]
"""Which node is dialed, and which Service's node port; the Service's one pod is on the node of its name."""


def _attempts(lab: Lab, ways: Sequence[tuple[str, str]]) -> list[bool | None]:
    """Dial node ports from outside, all at once; say for each whether it was allowed (None: neither nor)."""
    probes = [
        replace(lab.request("host:outside", f"node:{node}", NODE_PORT[service], version), timeout_s=0.5)
        for node, service in ways
        for version in VERSIONS
    ]
    outcomes = [result.outcome for result in lab.probe_all(probes)]
    return [True if o.is_allowed else False if o.is_denied else None for o in outcomes]


def test_a_client_outside_does_not_pass_for_the_node_that_masquerades_it(lab: Lab) -> None:
    assert _attempts(lab, EVERY_WAY) == [False] * 8


@pytest.mark.parametrize("node", ["a", "b"])
def test_a_client_outside_is_judged_by_its_own_address_at_the_pods_node(lab: Lab, node: str) -> None:
    way = [(node, f"web-{node}")]
    of_the_node = [*_cidrs(lab, f"node:{node}"), "10.244.0.0/16", "fd00:10:244::/48"]
    with _also(lab, "the-node", block(*of_the_node)):
        assert _attempts(lab, way) == [False] * 2
    with _also(lab, "the-client", block(*_cidrs(lab, "host:outside"))):
        assert _attempts(lab, way) == [True] * 2
    assert _attempts(lab, way) == [False] * 2


@pytest.mark.parametrize("version", VERSIONS)
def test_a_masqueraded_connection_is_ended_by_a_change_and_the_nodes_own_is_not(lab: Lab, version: int) -> None:
    dialed = str(lab.place("node:a").address(version)), NODE_PORT["web-a"]
    with (
        lab.open_socket("host:outside", FAMILIES[version]) as client,
        lab.open_socket("node:a", FAMILIES[version]) as node,
    ):
        with _also(lab, "the-client", block(*_cidrs(lab, "host:outside"))):
            for end in (client, node):
                end.settimeout(20)
                end.connect(dialed)
                assert end.recv(100) == b"x/web-a\n"
        with pytest.raises(ConnectionError):
            assert client.recv(100) == b""
        node.sendall(b"still here\n")
        assert node.recv(100) == b"still here\n"


def test_through_another_node_a_client_outside_is_that_nodes_address(lab: Lab) -> None:
    """Only the node that masquerades knows the client; what the pod's node sees is what is evaluated."""
    way = [("b", "web-a")]
    with _also(lab, "the-client", block(*_cidrs(lab, "host:outside"))):
        assert _attempts(lab, way) == [False] * 2
    with _also(lab, "node-b", block(*_cidrs(lab, "node:b"))):
        assert _attempts(lab, way) == [True] * 2


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("dialed", "service"), EVERY_WAY)
def test_a_pod_is_judged_by_its_identity_through_any_node_port(
    lab: Lab, dialed: str, service: str, version: int
) -> None:
    port = NODE_PORT[service]
    result = lab.probe("x/client", f"node:{dialed}", port, version)
    assert (result.outcome, result.banner) == (Outcome.CONNECTED, f"x/{service}")
    assert outcome(lab, "x/to-web", f"node:{dialed}", port, version) is Outcome.CONNECTED
    assert outcome(lab, "x/stranger", f"node:{dialed}", port, version, timeout_s=0.3).is_denied
    assert outcome(lab, "x/to-others", f"node:{dialed}", port, version, timeout_s=0.3).is_denied


@pytest.mark.parametrize("version", VERSIONS)
def test_a_pod_does_not_pass_for_the_node_by_a_node_port_where_bridges_are_filtered(lab: Lab, version: int) -> None:
    """With br_netfilter a packet that is translated to a pod of the same bridge shows no input interface."""
    marker = fresh_marker()
    scene = Scene(lab, "x/stranger", "node:a", "", "node:a", version)
    (syn,) = plain_syn(scene, marker)
    syn.payload.dport = NODE_PORT["web-a"]
    with _filtered_bridges(lab, "node:a"):
        assert outcome(lab, "x/client", "node:a", NODE_PORT["web-a"], version) is Outcome.CONNECTED
        assert outcome(lab, "node:a", "node:a", NODE_PORT["web-a"], version) is Outcome.CONNECTED
        with hearing(lab, "x/web-a") as heard, RawPod(lab, "x/stranger") as raw:
            raw.send("node:a", [syn])
            assert not arrives(lab, heard, marker[:4], ("node:a", "x/web-a"))


@contextmanager
def _filtered_bridges(lab: Lab, node: str) -> Iterator[None]:
    settings = [f"net.bridge.bridge-nf-call-{tool}" for tool in ("iptables", "ip6tables")]
    before = [lab.run(node, "sysctl", "-n", name).strip() for name in settings]
    try:
        lab.run(node, "sysctl", "-qw", *(f"{name}=1" for name in settings))
        yield
    finally:
        lab.run(node, "sysctl", "-qw", *(f"{name}={value}" for name, value in zip(settings, before, strict=True)))
