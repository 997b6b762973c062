# SPDX-License-Identifier: Apache-2.0
"""A host outside, or a neighbor on the bridge, sends under a pod's address: own traffic comes by the pod's own link.

The pods that listen may be reached by nobody (`ingress: []`), so whatever arrives was taken for the pod itself or for
its node.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.model import PodRef, Protocol
from tests.attacks.guard_world import Sender, Witness, bridge_hooks, fresh_port, mac, packet
from tests.e2e.attackers import Wire
from tests.e2e.operation_world import FAMILIES, HTTP, NODES, RESET, pod, policy
from trireme_lab import HostSpec, Lab, LabSpec, Outcome, ServicePort, ServiceSpec, Tools

pytestmark = pytest.mark.kernel

UDP_PORT = 5353
NODE_PORTS = {"quiet": (30_010, 30_011), "open": (30_020, 30_021)}
OUTSIDE = HostSpec("outside", (ip_address("203.0.113.7"), ip_address("2001:db8::7")))
BESIDE = HostSpec("beside", node="a")
FORMS = ("datagram", "syn", "syn-with-data")
versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
filters = pytest.mark.parametrize("rp_filter", ["0", "2"])
hooks = pytest.mark.parametrize("hooked", [True, False], ids=["bridge-nf", "no-bridge-nf"])


def _service(name: str, number: int) -> ServiceSpec:
    tcp, udp = NODE_PORTS[name]
    return ServiceSpec(
        "x",
        name,
        (ip_address(f"10.96.0.{number}"), ip_address(f"fd00:10:96::{number}")),
        (PodRef("x", name),),
        (
            ServicePort(80, HTTP.number, node_port=tcp),
            ServicePort(UDP_PORT, UDP_PORT, Protocol.UDP, node_port=udp),
        ),
    )


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    world = LabSpec(
        NODES,
        {"x": {}},
        (pod("quiet", "a"), pod("open", "a"), pod("other", "a"), pod("far", "b")),
        (OUTSIDE, BESIDE),
        (_service("quiet", 10), _service("open", 20)),
        (policy("quiet", "quiet", ingress=[]),),
        RESET,
    )
    with Lab(world, Tools(plugin=plugin)) as lab:
        yield lab


@contextmanager
def _source_checks(lab: Lab, value: str) -> Iterator[None]:
    names = [f"net.ipv4.conf.{name}.rp_filter" for name in ("all", "eth0", "trireme0")]
    before = [lab.run("node:a", "sysctl", "-n", name).strip() for name in names]
    try:
        lab.run("node:a", "sysctl", "-qw", *(f"{name}={value}" for name in names))
        yield
    finally:
        lab.run("node:a", "sysctl", "-qw", *(f"{name}={was}" for name, was in zip(names, before, strict=True)))


@filters
@versions
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["quiet", "other", "far"])
def test_from_outside_under_a_pods_address_to_its_node_port(
    lab: Lab, form: str, name: str, version: int, rp_filter: str
) -> None:
    """The pod behind the node port, a neighbor of it, one of another node: none of them may reach it."""
    port = NODE_PORTS["quiet"][form == "datagram"]
    node, forged = lab.place("node:a").address(version), lab.place(f"x/{name}").address(version)
    with (
        _source_checks(lab, rp_filter),
        Witness(lab, "x/quiet") as witness,
        Witness(lab, "x/open") as open_witness,
        Wire(lab, "host:outside", version) as wire,
    ):
        attack, control = fresh_port(), fresh_port()
        wire.send(packet(form, forged, node, attack, port))
        # What the node masquerades may get another port: so the control is counted at a pod that all may reach.
        wire.send(packet(form, wire.ip, node, control, NODE_PORTS["open"][form == "datagram"]))
        assert open_witness.sees(control)
        assert not witness.has_seen_any()


@versions
@pytest.mark.parametrize("form", FORMS)
def test_from_outside_under_a_pods_address_to_the_pod(lab: Lab, form: str, version: int) -> None:
    target, port = lab.place("x/open").address(version), UDP_PORT if form == "datagram" else HTTP.number
    with (
        _source_checks(lab, "0"),
        Witness(lab, "x/open") as witness,
        Wire(lab, "host:outside", version) as wire,
    ):
        attacks = {name: fresh_port() for name in ("x/open", "x/other", "x/quiet")}
        for name, attack in attacks.items():
            wire.send(packet(form, lab.place(name).address(version), target, attack, port))
        control = fresh_port()
        wire.send(packet(form, wire.ip, target, control, port))
        assert witness.sees(control)
        assert [name for name, attack in attacks.items() if witness.has_seen(attack)] == []


@hooks
@versions
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", ["x/open", "node:a", "host:outside"])
def test_a_neighbor_that_nobody_enforces_speaks_for_no_pod(
    lab: Lab, target: str, form: str, version: int, hooked: bool
) -> None:
    to, port = lab.place(target).address(version), UDP_PORT if form == "datagram" else HTTP.number
    gate = mac(lab, target if target == "x/open" else "node:a")
    with (
        bridge_hooks(lab, "node:a", are_on=hooked),
        Witness(lab, target) as witness,
        Sender(lab, "host:beside") as beside,
    ):
        attack, control = fresh_port(), fresh_port()
        beside.send(gate, [packet(form, lab.place("x/other").address(version), to, attack, port)])
        beside.send(gate, [packet(form, lab.place("host:beside").address(version), to, control, port)])
        assert witness.sees(control)
        assert not witness.has_seen(attack)


@hooks
@versions
def test_a_pod_still_reaches_itself_through_its_service(lab: Lab, version: int, hooked: bool) -> None:
    with bridge_hooks(lab, "node:a", are_on=hooked):
        assert lab.probe("x/quiet", "service:x/quiet", 80, version).outcome is Outcome.CONNECTED
        assert lab.probe("x/quiet", "node:a", NODE_PORTS["quiet"][0], version).outcome is Outcome.CONNECTED
        with lab.open_socket("node:a", FAMILIES[version]) as own:
            own.settimeout(5)
            own.connect((str(lab.place("x/quiet").address(version)), HTTP.number))
