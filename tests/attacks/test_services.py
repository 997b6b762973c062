# SPDX-License-Identifier: Apache-2.0
"""A user of a namespace writes Services: no address that they name becomes a way out, or loses what protects it."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import TCP, UDP
from scapy.packet import Raw

from enforcer_daemon.handshake.frames import MAGIC
from enforcer_daemon.kube.resources import MAX_EXTERNAL_IPS
from enforcer_daemon.model import Protocol
from tests.e2e.operation_world import HTTP, NODES, RESET, outcome, pod, policy
from tests.e2e.raw_pod import RawPod, Scene, arrives, fresh_marker, hearing, is_heard
from tests.kube.lab import KubeLab
from trireme_lab import HostSpec, LabSpec, Outcome, PortSpec, Tools
from trireme_lab.manifests import ObjectRef
from trireme_lab.spec import Manifest

pytestmark = pytest.mark.kernel

UDP_PORT = PortSpec(5353, Protocol.UDP)
OUTSIDE = HostSpec("outside", (ip_address("203.0.113.7"), ip_address("2001:db8::7")), (HTTP, UDP_PORT))
ALLOWED = HostSpec("allowed", (ip_address("198.51.100.9"), ip_address("2001:db8:9::9")), (HTTP, UDP_PORT))
"""A host whose addresses the operator has set apart for Services, though it is there."""
NEAR = HostSpec("near", node="a")
"""A pod that nobody enforces."""
PODS = (pod("caged", "a"), pod("free", "a"), pod("server", "b"))
CAGED = policy("caged", "caged", egress=[])
NODE_PORT, KUBELET_PORT = 30080, 10250
_PATIENCE_S = 20.0
both = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[KubeLab]:
    # The operator allows external addresses where pods are, too: none of a pod's is earned by that.
    allowed = [str(address) for address in ALLOWED.addresses]
    allowed += [str(network) for node in NODES for network in node.pod_networks]
    settings = {**RESET, "networks": {"requireIdentity": True, "externalIpNetworks": allowed}}
    world = LabSpec(NODES, {"x": {}}, pods=PODS, hosts=(OUTSIDE, ALLOWED, NEAR), manifests=(CAGED,), settings=settings)
    with KubeLab(world, Tools(plugin=plugin)) as lab:
        yield lab


def service(name: str, **spec: object) -> Manifest:
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "x"}, "spec": spec}


@contextmanager
def stating(lab: KubeLab, **spec: object) -> Iterator[None]:
    """Have a Service that states this in force on all nodes."""
    assert lab.apply(service("mine", **{"ports": [{"port": 80, "targetPort": 8080}], **spec}))
    try:
        yield
    finally:
        assert lab.remove(ObjectRef("Service", "x", "mine"))


def listing(lab: KubeLab, place: str) -> Any:
    """Have a Service that lists the addresses of a place."""
    ports = [{"name": f"p{number}", "port": number, "protocol": protocol} for number, protocol in
             ((HTTP.number, "TCP"), (HTTP.number, "UDP"))]  # fmt: skip
    return stating(lab, externalIPs=[str(address) for address in lab.place(place).addresses], ports=ports)


Form = Callable[[Scene, bytes, int], Sequence[Any]]
"""(scene, marker, port) -> packets."""


def framed_syn(scene: Scene, marker: bytes, port: int) -> Sequence[Any]:
    seq, ack = struct.unpack("!II", marker)
    sport = 20_000 + int.from_bytes(marker[-2:], "big") % 10_000
    segment = TCP(sport=sport, dport=port, seq=seq, ack=ack, flags="S")
    return [scene.packet(scene.attacker, scene.target) / segment / (MAGIC + b"x" * 600)]


def lone_message(scene: Scene, marker: bytes, port: int) -> Sequence[Any]:
    return [scene.packet(scene.attacker, scene.target) / UDP(sport=2345, dport=port, len=8) / Raw(marker + MAGIC)]


def gets_out(lab: KubeLab, form: Form, attacker: str, target: str, port: int, version: int, *, must: bool) -> bool:
    """Send one packet of a form by packet socket; tell whether it comes to the target's interface."""
    scene, marker = Scene(lab, attacker, target, attacker, "node:a", version), fresh_marker()
    with hearing(lab, target) as sock, RawPod(lab, attacker) as raw:
        raw.send(target, form(scene, marker, port))
        if must:
            return is_heard(sock, marker)
        return arrives(lab, sock, marker, ("node:a", target), version)


@both
@pytest.mark.parametrize("form", [framed_syn, lone_message])
def test_an_external_address_of_a_service_is_no_way_out_for_a_caged_pod(lab: KubeLab, form: Form, version: int) -> None:
    with listing(lab, "host:outside"):
        assert gets_out(lab, form, "x/free", "host:outside", 8080, version, must=True)
        assert not gets_out(lab, form, "x/caged", "host:outside", 8080, version, must=False)


@both
def test_nobodys_token_leaves_the_cluster_because_a_service_names_a_host(lab: KubeLab, version: int) -> None:
    assert True in _frames_heard(lab, "x/server", version)
    with listing(lab, "host:outside"):
        found = _frames_heard(lab, "host:outside", version)
        assert found
        assert True not in found


@both
def test_an_allowed_address_is_virtual_on_the_services_ports_alone(lab: KubeLab, version: int) -> None:
    """Nobody translates what goes to another port: it leaves the cluster, for whoever has the address there."""
    addresses = [str(address) for address in ALLOWED.addresses]
    with stating(lab, externalIPs=addresses, ports=[{"port": 80}]):
        found = _frames_heard(lab, "host:allowed", version)
        assert found
        assert True not in found
        for form in (framed_syn, lone_message):
            assert gets_out(lab, form, "x/free", "host:allowed", HTTP.number, version, must=True)
            assert not gets_out(lab, form, "x/caged", "host:allowed", HTTP.number, version, must=False)


def _frames_heard(lab: KubeLab, place: str, version: int) -> list[bool]:
    """Connect from a pod to a place; tell of each SYN that came there whether it carries a frame."""
    with hearing(lab, place) as sock:
        assert outcome(lab, "x/free", place, HTTP.number, version) is Outcome.CONNECTED
        return [MAGIC in frame for frame in _drain(sock) if MAGIC in frame or _is_syn(frame, version)]


def _drain(sock: socket.socket) -> list[bytes]:
    frames, deadline = [], time.monotonic() + _PATIENCE_S
    sock.settimeout(0.2)
    while time.monotonic() < deadline:
        try:
            frames.append(sock.recv(65_536))
        except TimeoutError:
            break
    return frames


def _is_syn(frame: bytes, version: int) -> bool:
    tcp = 14 + (20 if version == 4 else 40)
    protocol = frame[23] if version == 4 else frame[20]
    return len(frame) > tcp + 13 and protocol == Protocol.TCP and frame[tcp + 13] & 0x12 == 0x02


@both
def test_a_pod_that_nobody_vouches_for_is_refused_although_a_service_lists_its_address(
    lab: KubeLab, version: int
) -> None:
    assert outcome(lab, "host:near", "x/server", HTTP.number, version) is not Outcome.CONNECTED
    with listing(lab, "host:near"):
        assert outcome(lab, "host:near", "x/server", HTTP.number, version) is not Outcome.CONNECTED
        assert outcome(lab, "x/free", "x/server", HTTP.number, version) is Outcome.CONNECTED


@both
def test_a_node_port_opens_no_other_port_of_a_node(lab: KubeLab, version: int) -> None:
    with stating(lab, type="NodePort", ports=[{"port": 80, "nodePort": NODE_PORT}]):
        assert gets_out(lab, framed_syn, "x/free", "node:b", KUBELET_PORT, version, must=True)
        for port in (KUBELET_PORT, 22, NODE_PORT + 1):
            assert not gets_out(lab, framed_syn, "x/caged", "node:b", port, version, must=False)


def test_a_service_with_very_many_addresses_is_refused_and_its_author_is_told(lab: KubeLab) -> None:
    addresses = [f"198.18.{number // 250}.{number % 250}" for number in range(20_000)]
    with stating(lab, externalIPs=addresses):
        problems = [str(problem) for problem in lab.node("a").status()["snapshot"]["problems"]]  # type: ignore[index]
        assert any("Service x/mine" in problem and f"at most {MAX_EXTERNAL_IPS}" in problem for problem in problems)
        deadline = time.monotonic() + _PATIENCE_S
        while not (told := [event for event in lab.api.all("Event") if event["reason"] == "ServiceRefused"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert (told[0]["regarding"]["kind"], told[0]["regarding"]["name"]) == ("Service", "mine")


def test_addresses_that_are_not_virtual_are_told_for_each_service_until_it_is_mended(lab: KubeLab) -> None:
    def told() -> list[str]:
        cluster = lab.node("a").status()["cluster"]
        assert isinstance(cluster, dict)
        return [str(warning) for warning in cluster["warnings"]]

    def about(name: str) -> list[str]:
        events = [event for event in lab.api.all("Event") if event["reason"] == "AddressNotVirtual"]
        return [event["note"] for event in events if event["regarding"]["name"] == name]

    other = ObjectRef("Service", "x", "other")
    ports = [{"port": 80, "targetPort": 8080}]
    wrong = service("other", ports=ports, externalIPs=["203.0.113.99", "10.77.0.1"])
    why = "outside networks.externalIpNetworks"
    try:
        with stating(lab, externalIPs=["203.0.113.98"]):
            assert lab.apply(wrong)
            assert told() == [
                f"Service x/mine: 203.0.113.98 is not virtual: {why}",
                f"Service x/other: 203.0.113.99, 10.77.0.1 are not virtual: {why}",
            ]
            expected = {
                "mine": f"203.0.113.98 is not virtual: {why}",
                "other": f"203.0.113.99, 10.77.0.1 are not virtual: {why}",
            }
            deadline = time.monotonic() + _PATIENCE_S
            while not all(note in about(name) for name, note in expected.items()):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert lab.apply(service("other", ports=ports, externalIPs=[str(ALLOWED.addresses[0])]))
        assert told() == []
    finally:
        lab.remove(other)
