# SPDX-License-Identifier: Apache-2.0
"""An isolated pod with CAP_NET_RAW, and what translation makes of its packets: policy holds for where they end.

The attackers are a pod that may reach nothing, and one that may reach other pods by their labels. Each form of packet
reaches the same place from a pod that no policy isolates.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.model import IPAddress, PodRef, Protocol
from enforcer_daemon.packet.tcp import Segment
from tests.attacks.guard_world import (
    FORMS,
    Sender,
    Witness,
    bridge_hooks,
    fresh_port,
    mac,
    packet,
    translation,
)
from tests.e2e.attackers import Wire
from tests.e2e.operation_world import FAMILIES, HTTP, NODES, RESET, app, block, pod, policy
from trireme_lab import HostSpec, Lab, LabSpec, PortSpec, ServicePort, ServiceSpec, Tools

pytestmark = pytest.mark.kernel

OUTSIDE = HostSpec("outside", (ip_address("203.0.113.7"), ip_address("2001:db8::7")), (HTTP,))
INSIDE, BESIDE = HostSpec("inside", node="b"), HostSpec("beside", node="a")
VIP = {4: ip_address("10.96.0.50"), 6: ip_address("fd00:10:96::50")}
FRONT = 443
OWN_PORT = 10250
"""As kubelet's: a port of the node's own."""
ATTACKERS = ("x/caged", "x/to-web")
CACHE = {4: ip_address("169.254.20.10"), 6: ip_address("fd00:20::10")}
"""Where NodeLocal DNSCache listens."""
WEB = ServiceSpec(
    "x",
    "web",
    (ip_address("10.96.0.10"), ip_address("fd00:10:96::10")),
    (PodRef("x", "web"),),
    (ServicePort(80, HTTP.number, node_port=30_001),),
)
NEAR_NODE_PORT = 30_002
NEAR = ServiceSpec(
    "x",
    "near",
    (ip_address("10.96.0.11"), ip_address("fd00:10:96::11")),
    (PodRef("x", "near"),),
    (ServicePort(5353, 5353, Protocol.UDP, node_port=NEAR_NODE_PORT),),
)
DNS = PortSpec(53, Protocol.UDP)
PODS = (
    pod("caged", "a"),
    pod("to-web", "a"),
    pod("to-vip", "a"),
    pod("to-cache", "a"),
    pod("free", "a"),
    pod("web", "b"),
    pod("near", "a"),
    pod("answers", "a", DNS),
)
MANIFESTS = (
    policy("caged", "caged", egress=[]),
    policy("to-web", "to-web", egress=[{"to": [app("web")]}]),
    policy(
        "to-vip", "to-vip", egress=[{"to": block("10.96.0.50/32", "fd00:10:96::50/128"), "ports": [{"port": FRONT}]}]
    ),
    policy(
        "to-cache",
        "to-cache",
        egress=[
            {
                "to": block("169.254.20.10/32", "fd00:20::10/128"),
                "ports": [{"port": 53, "protocol": "UDP"}, {"port": 53}],
            }
        ],
    ),
    policy("answers", "answers", egress=[]),
)
versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
attackers = pytest.mark.parametrize("attacker", ATTACKERS)
hooks = pytest.mark.parametrize("hooked", [True, False], ids=["bridge-nf", "no-bridge-nf"])
tools = pytest.mark.parametrize("tool", ["iptables", "nftables"])


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    world = LabSpec(NODES, {"x": {}}, PODS, (OUTSIDE, INSIDE, BESIDE), (WEB, NEAR), MANIFESTS, RESET)
    with Lab(world, Tools(plugin=plugin)) as lab:
        yield lab


def _bridge(lab: Lab, version: int, node: str = "a") -> IPAddress:
    """Return the address of a node's bridge, which lies inside the pod networks."""
    (network,) = [network for network in lab.node(node).spec.pod_networks if network.version == version]
    return network[1]


def _nothing_arrives(lab: Lab, attacker: str, place: str, target: IPAddress, port: int) -> None:
    """Send every form from an attacker, and from a free pod, which arrives."""
    gate = mac(lab, "node:a")
    with Witness(lab, place) as witness, Sender(lab, attacker) as caged, Sender(lab, "x/free") as free:
        sent = []
        for form in FORMS:
            attack, control = fresh_port(), fresh_port()
            own = lab.place(attacker).address(target.version), lab.place("x/free").address(target.version)
            caged.send(gate, [packet(form, own[0], target, attack, port)])
            free.send(gate, [packet(form, own[1], target, control, port)])
            sent.append((form, attack, control))
        assert [form for form, _, control in sent if not witness.sees(control)] == []
        assert [form for form, attack, _ in sent if witness.has_seen(attack)] == []


def _backends(lab: Lab, version: int) -> dict[str, tuple[str, IPAddress, int]]:
    return {
        "own-port": ("node:a", lab.place("node:a").address(version), OWN_PORT),
        "bridge-port": ("node:a", _bridge(lab, version), OWN_PORT),
        "other-node": ("node:b", lab.place("node:b").address(version), OWN_PORT),
        "outside": ("host:outside", lab.place("host:outside").address(version), 8080),
    }


@tools
@hooks
@versions
@attackers
@pytest.mark.parametrize("backend", ["own-port", "bridge-port", "other-node", "outside"])
def test_a_service_leads_an_isolated_pod_nowhere_else(
    lab: Lab, attacker: str, backend: str, version: int, hooked: bool, tool: str
) -> None:
    place, address, port = _backends(lab, version)[backend]
    front = VIP[version], FRONT
    with bridge_hooks(lab, "node:a", are_on=hooked), translation(lab, "node:a", tool, front, (address, port)):
        _nothing_arrives(lab, attacker, place, *front)


@hooks
@versions
@attackers
@pytest.mark.parametrize("node", ["a", "b"])
def test_a_nodes_own_port_is_no_node_port(lab: Lab, attacker: str, node: str, version: int, hooked: bool) -> None:
    """That there is a Service with a node port makes no other port of the nodes an address of a Service."""
    with bridge_hooks(lab, "node:a", are_on=hooked):
        _nothing_arrives(lab, attacker, f"node:{node}", lab.place(f"node:{node}").address(version), OWN_PORT)
    _nothing_arrives(lab, attacker, "node:a", _bridge(lab, version), OWN_PORT)


@versions
def test_a_pod_that_may_reach_nothing_reaches_no_node_port_by_a_frame_either(lab: Lab, version: int) -> None:
    target = lab.place("node:b").address(version)
    _nothing_arrives(lab, "x/caged", "node:b", target, 31_999)


@tools
@hooks
@versions
def test_a_rule_for_what_was_dialed_holds_behind_the_translation(
    lab: Lab, version: int, hooked: bool, tool: str
) -> None:
    """As a pod reaches the API server: by the ClusterIP, which a rule by address names, at the node's own port."""
    back = lab.place("node:a").address(version), 6443
    with ExitStack() as stack:
        stack.enter_context(bridge_hooks(lab, "node:a", are_on=hooked))
        stack.enter_context(translation(lab, "node:a", tool, (VIP[version], FRONT), back))
        server = stack.enter_context(lab.open_socket("node:a", FAMILIES[version]))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((str(back[0]), back[1]))
        server.listen()
        server.settimeout(10)
        client = stack.enter_context(lab.open_socket("x/to-vip", FAMILIES[version]))
        client.settimeout(10)
        client.connect((str(VIP[version]), FRONT))
        served = stack.enter_context(server.accept()[0])
        client.sendall(b"hello")
        assert served.recv(10) == b"hello"
    with lab.open_socket("x/to-vip", FAMILIES[version]) as direct:
        direct.settimeout(1)
        with pytest.raises(OSError, match=r"refused|timed out"):
            direct.connect((str(back[0]), back[1]))


def _is_for(port: int, segment: Segment) -> bool:
    return segment.dport == port


@hooks
@versions
@pytest.mark.parametrize("target", ["bridge-of-b", "host:inside"])
def test_the_bare_answer_to_a_frame_does_not_come_back(lab: Lab, target: str, version: int, hooked: bool) -> None:
    """Inside the pod networks are addresses that no enforcer stands before; only an answer shows which these are."""
    place = "node:b" if target == "bridge-of-b" else target
    address = _bridge(lab, version, "b") if target == "bridge-of-b" else lab.place(target).address(version)
    gate = mac(lab, "node:a")
    heard = {}
    with bridge_hooks(lab, "node:a", are_on=hooked), lab.open_socket(place, FAMILIES[version]) as server:
        server.bind((str(address), 0))
        server.listen()
        port = server.getsockname()[1]
        for source in ("x/to-web", "x/free"):
            own, sport = lab.place(source).address(version), fresh_port()
            with Sender(lab, source) as sender, Wire(lab, source, version) as wire:
                sender.send(gate, [packet("framed-syn", own, address, sport, port)])
                answer = wire.find_segment(partial(_is_for, sport), 1.0)
                heard[source] = answer is not None
    assert heard == {"x/to-web": False, "x/free": True}


# Rules that keep flows out of conntrack.


@contextmanager
def _untracked(lab: Lab, version: int, address: IPAddress, port: int) -> Iterator[None]:
    program = "iptables" if version == 4 else "ip6tables"
    rules = [
        f"{chain} {side} {address} -p {protocol} {which} {port} -j CT --notrack"
        for protocol in ("udp", "tcp")
        for chain, side, which in (
            ("PREROUTING", "-d", "--dport"),
            ("OUTPUT", "-d", "--dport"),
            ("PREROUTING", "-s", "--sport"),
            ("OUTPUT", "-s", "--sport"),
        )
    ]
    try:
        for rule in rules:
            lab.run("node:a", program, "-t", "raw", "-A", *rule.split())
        yield
    finally:
        for rule in rules:
            lab.run("node:a", program, "-t", "raw", "-D", *rule.split())


@contextmanager
def _dns_cache(lab: Lab, version: int) -> Iterator[socket.socket]:
    """Run what NodeLocal DNSCache is to the network: an address of its own on the node, and flows out of conntrack."""
    lab.run("node:a", "ip", "link", "add", "nodelocaldns", "type", "bridge")
    try:
        length = 32 if version == 4 else 128
        lab.run("node:a", "ip", "addr", "add", f"{CACHE[version]}/{length}", "dev", "nodelocaldns")
        lab.run("node:a", "ip", "link", "set", "nodelocaldns", "up")
        with (
            _untracked(lab, version, CACHE[version], 53),
            lab.open_socket("node:a", FAMILIES[version], socket.SOCK_DGRAM) as cache,
        ):
            cache.bind((str(CACHE[version]), 53))
            cache.settimeout(10)
            yield cache
    finally:
        lab.run("node:a", "ip", "link", "del", "nodelocaldns")


@hooks
@versions
@attackers
def test_what_conntrack_does_not_see_is_no_reply(lab: Lab, attacker: str, version: int, hooked: bool) -> None:
    with bridge_hooks(lab, "node:a", are_on=hooked), _dns_cache(lab, version):
        _nothing_arrives(lab, attacker, "node:a", CACHE[version], 53)


@hooks
@versions
def test_a_pod_that_may_asks_the_dns_cache_of_its_node(lab: Lab, version: int, hooked: bool) -> None:
    with (
        bridge_hooks(lab, "node:a", are_on=hooked),
        _dns_cache(lab, version) as cache,
        lab.open_socket("x/to-cache", FAMILIES[version], socket.SOCK_DGRAM) as client,
    ):
        client.settimeout(10)
        for question in (b"first", b"second"):
            client.sendto(question, (str(CACHE[version]), 53))
            asked, asker = cache.recvfrom(100)
            assert asked == question
            cache.sendto(b"answer", asker)
            assert client.recv(100) == b"answer"


@hooks
@versions
@pytest.mark.parametrize("client", ["node:a", "host:outside"])
def test_a_pod_that_may_reach_nothing_answers_whoever_asks_it_untracked(
    lab: Lab, client: str, version: int, hooked: bool
) -> None:
    """The pod's datagrams pass to those that asked, from the port that was asked; to no other, and from no other."""
    pod_address, asker_address = lab.place("x/answers").address(version), lab.place(client).address(version)
    if client == "node:a":
        asker_address = _bridge(lab, version)
    with (
        bridge_hooks(lab, "node:a", are_on=hooked),
        _untracked(lab, version, pod_address, 53),
        Witness(lab, client) as witness,
        Sender(lab, "x/answers") as raw,
        lab.open_socket(client, FAMILIES[version], socket.SOCK_DGRAM) as asker,
    ):
        gate, unasked = mac(lab, "node:a"), fresh_port()
        raw.send(gate, [packet("datagram", pod_address, asker_address, 53, unasked)])
        asker.settimeout(10)
        asker.sendto(b"question", (str(pod_address), 53))
        assert asker.recv(100)
        assert witness.has_seen(53)
        other = fresh_port()
        raw.send(gate, [packet("datagram", pod_address, asker_address, other, asker.getsockname()[1])])
        asker.sendto(b"question", (str(pod_address), 53))
        assert asker.recv(100)
        assert not witness.has_seen(other)


# Messages of the handshake for UDP.


@hooks
@versions
@attackers
def test_a_message_comes_masqueraded_to_no_pod(lab: Lab, attacker: str, version: int, hooked: bool) -> None:
    """Answered, it would open a flow that the pod behind the node port takes for its node's."""
    target, port = lab.place("node:a").address(version), NEAR_NODE_PORT
    with (
        bridge_hooks(lab, "node:a", are_on=hooked),
        Witness(lab, "x/near") as witness,
        Sender(lab, attacker) as sender,
        lab.open_socket("host:outside", FAMILIES[version], socket.SOCK_DGRAM) as control,
    ):
        own = lab.place(attacker).address(version)
        message = packet("standalone-message", own, target, fresh_port(), port)
        forms = [message] if version == 4 else [message, _behind_options(message)]
        for form in forms:
            sender.send(mac(lab, "node:a"), [form])
        assert not witness.has_seen_any()
        control.sendto(b"control", (str(target), port))
        assert witness.sees_any()


@versions
@attackers
def test_a_message_to_everybody_on_the_link_reaches_nobody(lab: Lab, attacker: str, version: int) -> None:
    own = lab.place(attacker).address(version)
    target = own if version == 4 else ip_address("ff02::1")
    if version == 4:
        (network,) = [network for network in lab.node("a").spec.pod_networks if network.version == 4]
        target = network.broadcast_address
    group = b"\xff" * 6 if version == 4 else b"\x33\x33\x00\x00\x00\x01"
    with (
        bridge_hooks(lab, "node:a", are_on=True),
        Witness(lab, "host:beside") as witness,
        Sender(lab, attacker) as caged,
        Sender(lab, "x/free") as free,
    ):
        attack, control = fresh_port(), fresh_port()
        caged.send(group, [packet("standalone-message", own, target, attack, 5353)])
        free.send(group, [packet("standalone-message", lab.place("x/free").address(version), target, control, 5353)])
        assert witness.sees(control)
        assert not witness.has_seen(attack)


def _behind_options(whole: bytes) -> bytes:
    """Put an empty header of destination options before what an IPv6 packet carries."""
    options = bytes((whole[6], 0)) + b"\x01\x04" + bytes(4)
    length = int.from_bytes(whole[4:6], "big") + len(options)
    return whole[:4] + length.to_bytes(2, "big") + bytes((60,)) + whole[7:40] + options + whole[40:]
