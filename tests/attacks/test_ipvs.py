# SPDX-License-Identifier: Apache-2.0
"""Services of kube-proxy in IPVS mode: identity works, isolated pods reach nothing else, and nobody is the node.

IPVS takes a packet from the input hook and sends it on by output and postrouting, never through forward.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from enforcer_daemon.model import IPAddress, Protocol
from tests.attacks.guard_world import FORMS, Sender, Witness, fresh_port, mac, packet
from tests.attacks.ipvs_nodes import ipvs_services, require_ipvs
from tests.attacks.ipvs_world import (
    API,
    API_FAR,
    API_SERVER,
    CLUSTERS,
    LOCAL_NODE_PORT,
    MANIFESTS,
    MORTAL_ADDRESSES,
    MORTAL_NODE_PORT,
    NODE_PORTS,
    OPEN_FAR,
    OPEN_NEAR,
    OUT,
    OUTSIDE,
    PATIENCE_S,
    PODS,
    QUIET_S,
    RESET_PORT,
    SHUT,
    SHUT_LOCAL,
    SHUT_RESET,
    VIRTUAL,
    WEB_FAR,
    WEB_NEAR,
    LinkWitness,
    bridge_address,
    dial,
    fronts,
    listening,
    of,
    routed_to_node,
    witness_at,
)
from tests.e2e.attackers import Wire
from tests.e2e.operation_world import FAMILIES, NODES, RESET, denials, pod, policy, read_all
from tests.netns.lab import wait_until
from trireme_lab import Lab, LabSpec, Outcome, Tools
from trireme_lab.probe import run_probe

pytestmark = [pytest.mark.kernel, pytest.mark.slow, pytest.mark.stock_kernel]

versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
protocols = pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP], ids=["tcp", "udp"])
on_one_backend = pytest.mark.parametrize("lab", ["nft"], indirect=True)
"""For what the nodes' own rules decide, which are nft always."""


@pytest.fixture(scope="module", params=["nft", "iptables"])
def lab(request: pytest.FixtureRequest, plugin: Path) -> Iterator[Lab]:
    require_ipvs()
    settings = {**RESET, "networks": {"virtual": VIRTUAL}, "dataplane": {"rulesBackend": request.param}}
    world = LabSpec(NODES, {"x": {}}, PODS, (OUTSIDE,), (), MANIFESTS, settings)
    with (
        Lab(world, Tools(plugin=plugin, probe_timeout_s=PATIENCE_S)) as lab,
        ipvs_services(lab, fronts(lab), CLUSTERS),
    ):
        yield lab


def _outcome(lab: Lab, source: str, target: IPAddress, port: int, protocol: Protocol) -> Outcome:
    return lab.probe(source, str(target), port, target.version, protocol).outcome


# What is allowed works, and by identity.


@versions
@protocols
@pytest.mark.parametrize("front", [WEB_NEAR, WEB_FAR], ids=["same-node", "other-node"])
def test_an_allowed_pod_reaches_a_cluster_ip_by_its_identity(
    lab: Lab, front: Sequence[IPAddress], protocol: Protocol, version: int
) -> None:
    """The policies of both ends name labels alone, so that nothing but an identity lets the flow pass."""
    target, server = of(front, version), "x/web-near" if front is WEB_NEAR else "x/web-far"
    assert _outcome(lab, "x/client", target, 80, protocol) is Outcome.CONNECTED
    assert _outcome(lab, "x/stranger", target, 80, Protocol.TCP).is_denied
    assert denials(lab, server)[-1] == "ingress-denied"


@versions
@pytest.mark.parametrize("front", [WEB_NEAR, WEB_FAR], ids=["same-node", "other-node"])
def test_an_established_connection_carries_data_both_ways(lab: Lab, front: Sequence[IPAddress], version: int) -> None:
    with lab.open_socket("x/client", FAMILIES[version]) as client:
        client.settimeout(PATIENCE_S)
        client.connect((str(of(front, version)), 80))
        assert client.recv(1000).endswith(b"\n")  # the server's banner, before it echoes
        for block_of_data in (b"x" * 1_000, b"y" * 100_000):
            client.sendall(block_of_data)
            assert read_all(client, len(block_of_data)) == block_of_data


@versions
@protocols
@on_one_backend
def test_a_pod_reaches_itself_through_its_cluster_ip(lab: Lab, protocol: Protocol, version: int) -> None:
    for name, front in (("x/open-near", OPEN_NEAR), ("x/shut", SHUT)):
        assert _outcome(lab, name, of(front, version), 80, protocol) is Outcome.CONNECTED


@versions
@on_one_backend
def test_a_rule_for_the_api_servers_cluster_ip_holds_at_the_nodes_own_port(lab: Lab, version: int) -> None:
    with listening(lab, "node:a", lab.place("node:a").address(version), API_SERVER) as server:
        with dial(lab, "x/to-api", of(API, version), 443) as client, server.accept()[0] as served:
            client.sendall(b"hello")
            assert served.recv(10) == b"hello"
        direct = lab.request("x/to-api", "node:a", API_SERVER, version)
        assert run_probe(replace(direct, timeout_s=QUIET_S)).outcome.is_denied


@versions
@on_one_backend
def test_the_nodes_kernel_refuses_a_cluster_ips_other_ports(lab: Lab, version: int) -> None:
    """An ICMP error under the ClusterIP, which is an address of the node's dummy interface."""
    outcome = _outcome(lab, "x/stranger", of(OPEN_NEAR, version), 81, Protocol.TCP)
    assert outcome in (Outcome.REFUSED, Outcome.UNREACHABLE)


@versions
@on_one_backend
def test_a_masqueraded_client_is_evaluated_by_where_it_came_from(lab: Lab, version: int) -> None:
    """Also when the policy changes; the pod itself sees the node's address alone."""
    node, port = lab.place("node:a").address(version), NODE_PORTS["by-block"]
    for protocol in (Protocol.TCP, Protocol.UDP):
        assert _outcome(lab, "host:outside", node, port, protocol) is Outcome.CONNECTED
    assert run_probe(replace(lab.request("node:b", "node:a", port, version), timeout_s=QUIET_S)).outcome.is_denied
    with dial(lab, "host:outside", node, port) as client:
        assert client.recv(1_000).endswith(b"\n")  # the server's banner
        try:
            assert lab.apply(policy("by-block", "by-block", ingress=[]))
            with pytest.raises(ConnectionError):
                client.recv(1_000)
        finally:
            lab.apply(MANIFESTS[-1])


# Who speaks for the node.


@versions
@protocols
def test_the_node_reaches_its_pods_through_a_cluster_ip(lab: Lab, protocol: Protocol, version: int) -> None:
    """As through no Service, whatever policy says: its source is the ClusterIP, which kube-proxy masquerades."""
    assert _outcome(lab, "node:a", of(SHUT, version), 80, protocol) is Outcome.CONNECTED
    assert _outcome(lab, "node:a", lab.place("node:a").address(version), NODE_PORTS["shut"], protocol) is (
        Outcome.CONNECTED
    )
    assert _outcome(lab, "node:b", of(SHUT, version), 80, Protocol.TCP).is_denied


@versions
def test_a_reset_of_the_nodes_kernel_reaches_the_pod(lab: Lab, version: int) -> None:
    """The second block of data meets a socket that is gone: no process of the node sends the RST."""
    with (
        listening(lab, "x/shut", lab.place("x/shut").address(version), RESET_PORT) as listener,
        dial(lab, "node:a", of(SHUT_RESET, version), 80) as client,
        listener.accept()[0] as served,
    ):
        client.close()
        assert served.recv(1) == b""
        with pytest.raises((ConnectionResetError, BrokenPipeError)):  # noqa: PT012 - how many it takes, is TCP's affair
            while True:
                served.sendall(b"to nobody")
                time.sleep(0.05)


@dataclass(frozen=True)
class Forgery:
    """A packet that a host outside sends to a node under one of the node's addresses."""

    source: IPAddress
    target: IPAddress
    port: int
    is_masqueraded: bool
    """By kube-proxy, as for any client outside: the pod's enforcer then evaluates it by where it came from."""


@versions
@on_one_backend
def test_what_ipvs_sends_on_never_speaks_for_the_node(lab: Lab, version: int) -> None:
    """A host outside sends under each address of the node, to every place that leads to a pod of `ingress: []`.

    The node is told to take such packets in, as Linux does for IPv6 anyway.
    """
    node, bridge = lab.place("node:a").address(version), bridge_address(lab, version)
    forgeries = [
        Forgery(source, target, port, is_masqueraded=is_node_port or (source is node and port == 80))
        for source in (node, bridge)
        for target, port, is_node_port in (
            (of(SHUT, version), 80, False),
            (of(SHUT_LOCAL, version), 80, False),
            (node, NODE_PORTS["shut"], True),
            (node, LOCAL_NODE_PORT, False),
            (bridge, LOCAL_NODE_PORT, False),
        )
    ]
    with (
        routed_to_node(lab, version),
        LinkWitness(lab, "x/shut") as link,
        Witness(lab, "x/shut") as sockets,
        LinkWitness(lab, "x/open-near") as control_witness,
        Wire(lab, "host:outside", version) as wire,
    ):
        sent: dict[int, tuple[str, Forgery]] = {}
        for forgery in forgeries:
            for form in FORMS:
                sport = fresh_port()
                sent[sport] = form, forgery
                wire.send(packet(form, forgery.source, forgery.target, sport, forgery.port))
        controls = []
        for target, port in ((of(OPEN_NEAR, version), 80), (node, NODE_PORTS["open-near"])):
            for form in ("syn", "datagram"):
                controls.append(fresh_port())
                wire.send(packet(form, wire.ip, target, controls[-1], port))
        assert wait_until(lambda: control_witness.seen() >= set(controls)), (controls, control_witness.seen())
        on_link = [sent[sport] for sport in sorted(link.seen() & sent.keys())]
        assert [
            (form, forgery)
            for form, forgery in on_link
            if not (forgery.is_masqueraded and form in ("framed-syn", "syn-with-data"))
        ] == []
        assert [sent[sport] for sport in sorted(sockets.seen() & sent.keys())] == []


@versions
@on_one_backend
def test_a_packet_that_ipvs_sends_on_is_dropped_under_the_nodes_address_whatever_policy_says(
    lab: Lab, version: int
) -> None:
    """Not masqueraded, it would be the node to the pod: also a pod that no policy isolates gets none of it."""
    bridge = bridge_address(lab, version)
    with (
        routed_to_node(lab, version),
        LinkWitness(lab, "x/open-near") as witness,
        Wire(lab, "host:outside", version) as wire,
    ):
        attacks = {fresh_port(): form for form in FORMS}
        for sport, form in attacks.items():
            wire.send(packet(form, bridge, of(OPEN_NEAR, version), sport, 80))
        control = fresh_port()
        wire.send(packet("syn", wire.ip, of(OPEN_NEAR, version), control, 80))
        assert wait_until(lambda: control in witness.seen())
        assert [attacks[sport] for sport in sorted(witness.seen() & attacks.keys())] == []


# Isolated pods.


def _ways(lab: Lab, version: int) -> list[tuple[str, IPAddress, int, str]]:
    """Return what an isolated pod can dial: a name, address and port, and where that leads."""
    node_a, node_b = (lab.place(f"node:{name}").address(version) for name in "ab")
    return [
        ("ClusterIP, same node", of(OPEN_NEAR, version), 80, "x/open-near"),
        ("ClusterIP, other node", of(OPEN_FAR, version), 80, "x/open-far"),
        ("node port of its node", node_a, NODE_PORTS["open-near"], "x/open-near"),
        ("node port at the bridge's address", bridge_address(lab, version), NODE_PORTS["open-far"], "x/open-far"),
        ("node port of the other node", node_b, NODE_PORTS["open-far"], "x/open-far"),
        ("API server on its node", of(API, version), 443, "node:a"),
        ("API server on the other node", of(API_FAR, version), 443, "node:b"),
        ("host outside", of(OUT, version), 80, "host:outside"),
    ]


VOUCHED = {"x/caged": frozenset({"standalone-message"}), "x/to-web": frozenset({"standalone-message", "framed-syn"})}
"""Forms that the guard lets an isolated pod send to pods, whose enforcers decide: messages without data, and SYNs with
a frame if a rule names pods (docs/guard.md, Egress)."""
UNTRANSLATED = frozenset({"segment"})
"""Forms that IPVS leaves alone: TCP in the middle of no connection."""


@versions
@on_one_backend
@pytest.mark.parametrize("attacker", ["x/caged", "x/to-web"])
def test_raw_packets_of_an_isolated_pod_reach_nothing_by_ipvs(lab: Lab, attacker: str, version: int) -> None:
    """With our magic and without; each form that IPVS translates reaches the same place from an unrestricted pod.

    Behind the rules of the pods nothing arrives at all, and on their links what their enforcers decide on.
    """
    ways, gate = _ways(lab, version), mac(lab, "node:a")
    places = dict.fromkeys(place for *_, place in ways)
    attacks: dict[int, tuple[str, str, str]] = {}
    controls: dict[int, tuple[str, str, str]] = {}
    with ExitStack() as stack:
        witnesses = {place: stack.enter_context(witness_at(lab, place)) for place in places}
        sockets = [stack.enter_context(Witness(lab, place)) for place in places if lab.has_pod(place)]
        caged, free = (stack.enter_context(Sender(lab, name)) for name in (attacker, "x/stranger"))
        for name, target, port, place in ways:
            for form in FORMS:
                attack, control = fresh_port(), fresh_port()
                attacks[attack] = controls[control] = form, name, place
                caged.send(gate, [packet(form, lab.place(attacker).address(version), target, attack, port)])
                free.send(gate, [packet(form, lab.place("x/stranger").address(version), target, control, port)])
        expected = {sport for sport, (form, name, _) in controls.items() if _arrives(form, name)}

        def missing() -> list[tuple[str, str, str]]:
            seen = set().union(*(witness.seen() for witness in witnesses.values()))
            return [controls[sport] for sport in sorted(expected - seen)]

        assert wait_until(lambda: not missing()), missing()
        arrived = [attacks[sport] for witness in witnesses.values() for sport in witness.seen() if sport in attacks]
        assert [each for each in arrived if each[0] not in VOUCHED[attacker] or not lab.has_pod(each[2])] == []
        assert [attacks[sport] for witness in sockets for sport in witness.seen() if sport in attacks] == []


def _arrives(form: str, name: str) -> bool:
    """Tell whether a form from an unrestricted pod arrives."""
    if form in UNTRANSLATED:
        return False
    # Masqueraded, a message would open a flow that the pod takes for its node's.
    return form != "standalone-message" or "node port" not in name


@versions
def test_plain_sockets_of_a_caged_pod_reach_nothing_by_ipvs(lab: Lab, version: int) -> None:
    ways = _ways(lab, version)
    with ExitStack() as stack:
        places = dict.fromkeys(place for *_, place in ways)
        witnesses = {place: stack.enter_context(witness_at(lab, place)) for place in places}
        for place in ("node:a", "node:b"):
            address = lab.place(place).address(version)
            stack.enter_context(listening(lab, place, address, API_SERVER))
        sports: dict[int, tuple[str, str]] = {}
        for source, kind in (("x/caged", "attack"), ("x/stranger", "control")):
            for name, target, port, _ in ways:
                for sock_kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    sock = stack.enter_context(lab.open_socket(source, FAMILIES[version], sock_kind))
                    sports[_try(sock, target, port)] = kind, name

        def seen() -> set[int]:
            return set().union(*(witness.seen() for witness in witnesses.values()))

        controls = {sport for sport, (kind, _) in sports.items() if kind == "control"}
        assert wait_until(lambda: seen() >= controls), [sports[sport] for sport in controls - seen()]
        assert [sports[sport] for sport in sorted((seen() & sports.keys()) - controls)] == []
    assert denials(lab, "x/caged")[-1] == "egress-denied"


def _try(sock: socket.socket, target: IPAddress, port: int) -> int:
    """Send without waiting, from a port that no other packet of the run has; return it."""
    sport = fresh_port()
    sock.bind(("", sport))
    sock.setblocking(False)
    sock.connect_ex((str(target), port))
    if sock.type == socket.SOCK_DGRAM:
        sock.send(b"datagram")
    return sport


# A pod that died.


@versions
@on_one_backend
def test_a_segment_for_a_dead_server_is_refused_before_its_successor_sees_it(lab: Lab, version: int) -> None:
    """IPVS still leads the client there, whose kernel takes the server for alive: the numbers are worth its data."""
    with (
        _mortal_pod(lab, "old"),
        listening(lab, "x/old", of(MORTAL_ADDRESSES, version), RESET_PORT) as listener,
        dial(lab, "x/open-far", lab.place("node:a").address(version), MORTAL_NODE_PORT) as client,
        listener.accept()[0] as served,
    ):
        client.sendall(b"question")
        assert served.recv(100) == b"question"
        served.sendall(b"answer")
        assert client.recv(100) == b"answer"
        sport = client.getsockname()[1]
        # It dies without a word, as with a power failure of its sandbox.
        for tool in ("iptables", "ip6tables"):
            lab.run("x/old", tool, "-t", "raw", "-I", "OUTPUT", "-p", "tcp", "-j", "DROP")
        survivor = client.dup()
    with survivor, _mortal_pod(lab, "new"), LinkWitness(lab, "x/new") as witness:
        survivor.sendall(b"a secret for the old pod")
        with pytest.raises(ConnectionResetError):
            survivor.recv(100)
        assert sport not in witness.seen()


@contextmanager
def _mortal_pod(lab: Lab, name: str) -> Iterator[None]:
    lab.add_pod(replace(pod(name, "a"), addresses=MORTAL_ADDRESSES))
    try:
        yield
    finally:
        lab.remove_pod(f"x/{name}")
