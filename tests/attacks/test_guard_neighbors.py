# SPDX-License-Identifier: Apache-2.0
"""A neighbor on a pod's bridge that nobody enforces speaks under the node's address, in every form of delivery.

The node may always reach a pod (kubelet's probes), also one with `ingress: []`. Each form arrives from the neighbor's
own address at a pod that no policy isolates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.model import IPAddress
from tests.attacks.guard_world import (
    BROADCAST_MAC,
    Sender,
    Witness,
    bridge_hooks,
    fragments,
    fresh_port,
    mac,
    packet,
)
from tests.e2e.operation_world import HTTP, NODES, RESET, pod, policy
from trireme_lab import HostSpec, Lab, LabSpec, Outcome, Tools
from trireme_lab.network import POD_BRIDGE

pytestmark = pytest.mark.kernel

UDP_PORT = 5353
PRIORITY_TAG = b"\x81\x00\x00\x00"
"""A VLAN tag that numbers no VLAN: receivers take it off."""
DELIVERIES = {
    4: (
        "unicast",
        "unicast-to-all",
        "broadcast",
        "subnet-broadcast",
        "multicast",
        "tagged",
        "twice-tagged",
        "fragments",
    ),
    6: ("unicast", "unicast-to-all", "multicast", "link-local", "tagged", "twice-tagged", "fragments"),
}
SOURCES = {4: ("bridge", "uplink"), 6: ("bridge", "uplink", "link-local")}
CASES = [
    pytest.param(version, source, delivery, id=f"ipv{version}-{source}-{delivery}")
    for version in (4, 6)
    for source in SOURCES[version]
    for delivery in DELIVERIES[version]
]
hooks = pytest.mark.parametrize("hooked", [True, False], ids=["bridge-nf", "no-bridge-nf"])


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    world = LabSpec(
        NODES,
        {"x": {}},
        (pod("quiet", "a"), pod("open", "a")),
        (HostSpec("beside", node="a"),),
        manifests=(policy("quiet", "quiet", ingress=[]),),
        settings=RESET,
    )
    with Lab(world, Tools(plugin=plugin)) as lab:
        yield lab


def _link_local(lab: Lab, place: str, ifname: str) -> IPAddress:
    shown = json.loads(lab.run(place, "ip", "-j", "-6", "addr", "show", "dev", ifname, "scope", "link"))
    return ip_address(next(a["local"] for link in shown for a in link.get("addr_info", ()) if a))


def _node_source(lab: Lab, version: int, source: str) -> IPAddress:
    if source == "uplink":
        return lab.place("node:a").address(version)
    if source == "link-local":
        return _link_local(lab, "node:a", POD_BRIDGE)
    (network,) = [network for network in lab.node("a").spec.pod_networks if network.version == version]
    return network[1]


def _target(lab: Lab, name: str, version: int, delivery: str) -> tuple[bytes, IPAddress]:
    """Return the MAC and the address that a form of delivery goes to."""
    own = lab.place(name).address(version)
    (network,) = [network for network in lab.node("a").spec.pod_networks if network.version == version]
    match delivery:
        case "broadcast":
            return BROADCAST_MAC, ip_address("255.255.255.255")
        case "subnet-broadcast":
            return BROADCAST_MAC, network.broadcast_address
        case "multicast" if version == 4:
            return b"\x01\x00\x5e\x00\x00\x01", ip_address("224.0.0.1")
        case "multicast":
            return b"\x33\x33\x00\x00\x00\x01", ip_address("ff02::1")
        case "link-local":
            return mac(lab, name), _link_local(lab, name, "eth0")
        case "unicast-to-all":
            return BROADCAST_MAC, own
    return mac(lab, name), own


def _send(
    lab: Lab, sender: Sender, name: str, source: IPAddress, delivery: str, port: int, own_macs: Sequence[bytes]
) -> None:
    to, target = _target(lab, name, source.version, delivery)
    packets = [packet("datagram", source, target, port, UDP_PORT)]
    if delivery == "fragments":
        packets = fragments(packets[0])
    tag = PRIORITY_TAG * {"tagged": 1, "twice-tagged": 2}.get(delivery, 0)
    for own in own_macs:
        sender.send(to, packets, own, tag)


@hooks
@pytest.mark.parametrize(("version", "source", "delivery"), CASES)
def test_a_neighbor_never_speaks_for_the_node(lab: Lab, version: int, source: str, delivery: str, hooked: bool) -> None:
    with ExitStack() as stack:
        stack.enter_context(bridge_hooks(lab, "node:a", are_on=hooked))
        quiet, open_pod = (stack.enter_context(Witness(lab, name)) for name in ("x/quiet", "x/open"))
        beside = stack.enter_context(Sender(lab, "host:beside"))
        attack, control = fresh_port(), fresh_port()
        forged = _node_source(lab, version, source)
        own = (
            _link_local(lab, "host:beside", "eth0")
            if forged.is_link_local
            else lab.place("host:beside").address(version)
        )
        for name in ("x/quiet", "x/open"):
            _send(lab, beside, name, forged, delivery, attack, [b"", mac(lab, "node:a")])
        if "tagged" in delivery:
            # Nobody sends such frames to a pod by right: the plain form is the control.
            delivery = "unicast"
        _send(lab, beside, "x/open", own, delivery, control, [b""])
        assert open_pod.sees(control)
        assert [each for each in (quiet, open_pod) if each.has_seen(attack)] == []


@hooks
@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("source", ["bridge", "uplink"])
def test_by_way_of_the_node_it_does_not_either(lab: Lab, version: int, source: str, hooked: bool) -> None:
    """To the node's MAC: the node routes what it would not send itself."""
    with (
        bridge_hooks(lab, "node:a", are_on=hooked),
        Witness(lab, "x/open") as witness,
        Sender(lab, "host:beside") as beside,
    ):
        attack, control = fresh_port(), fresh_port()
        target, gate = lab.place("x/open").address(version), mac(lab, "node:a")
        beside.send(gate, [packet("datagram", _node_source(lab, version, source), target, attack, UDP_PORT)])
        beside.send(gate, [packet("datagram", lab.place("host:beside").address(version), target, control, UDP_PORT)])
        assert witness.sees(control)
        assert not witness.has_seen(attack)


@hooks
@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
def test_the_node_itself_reaches_the_pod(lab: Lab, version: int, hooked: bool) -> None:
    with bridge_hooks(lab, "node:a", are_on=hooked):
        assert lab.probe("node:a", "x/quiet", HTTP.number, version).outcome is Outcome.CONNECTED
