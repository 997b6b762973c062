# SPDX-License-Identifier: Apache-2.0
"""Peers without an enforcer, outside the enforced networks and inside them: addresses, and no more than that."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.handshake.frames import is_frame
from enforcer_daemon.model import Protocol
from enforcer_daemon.packet.tcp import ACK, SYN, SYN_ACK, build
from enforcer_daemon.packet.udp import build_udp
from enforcer_daemon.reasons import Reason
from tests.e2e.attackers import SYN_OPTIONS, Wire, await_denial, silenced
from tests.e2e.operation_world import FAMILIES, HTTP, NODES, RESET, block, denials, outcome, pod, policy, segments
from trireme_lab import HostSpec, Lab, LabSpec, Outcome, PodSpec, PortSpec, Tools
from trireme_lab.netns import write_sysctls

pytestmark = pytest.mark.kernel

OTHER = PortSpec(9090)
OUTSIDE = HostSpec("outside", (ip_address("203.0.113.7"), ip_address("2001:db8::7")), (HTTP, OTHER))
INSIDE = HostSpec("inside", (ip_address("10.244.2.200"), ip_address("fd00:10:244:2::200")), (HTTP, OTHER), node="b")
HOSTS = ("host:outside", "host:inside")
BESIDE = HostSpec("beside", node="a")

ANY_POD: list[dict[str, object]] = [{"podSelector": {}, "namespaceSelector": {}}]
THEIR_BLOCKS = block("203.0.113.0/24", "10.244.2.200/32", "2001:db8::/64", "fd00:10:244:2::200/128")
ALL_BUT_THEM: list[dict[str, object]] = [
    {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["203.0.113.0/24", "10.244.2.200/32"]}},
    {"ipBlock": {"cidr": "::/0", "except": ["2001:db8::/64", "fd00:10:244:2::200/128"]}},
]
CLOSED = 9_099
"""A port on which nothing listens."""
MSG_FASTOPEN = 0x20000000
CLIENT_FAST_OPEN, SERVER_FAST_OPEN_WITHOUT_COOKIE = 0x1, 0x602
HTTP_ONLY: list[dict[str, object]] = [{"port": HTTP.number}]


def _rules(peers_key: str) -> dict[str, list[dict[str, object]]]:
    """Pods by name, and what their one policy says of peers; each rule is for port 8080 alone."""
    return {
        "closed": [],
        "for-pods": [{peers_key: ANY_POD, "ports": HTTP_ONLY}],
        "for-anyone": [{"ports": HTTP_ONLY}],
        "for-their-blocks": [{peers_key: THEIR_BLOCKS, "ports": HTTP_ONLY}],
        "for-other-blocks": [{peers_key: ALL_BUT_THEM, "ports": HTTP_ONLY}],
    }


REACHABLE = {"open", "for-anyone", "for-their-blocks"}


def _pods() -> Iterator[PodSpec]:
    yield pod("open", "a", HTTP, OTHER)
    for name in _rules(""):
        yield pod(f"in-{name}", "a", HTTP, OTHER)
        yield pod(f"out-{name}", "a", HTTP, OTHER)


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    manifests = (
        *(policy(f"in-{name}", f"in-{name}", ingress=rules) for name, rules in _rules("from").items()),
        *(policy(f"out-{name}", f"out-{name}", egress=rules) for name, rules in _rules("to").items()),
    )
    world = LabSpec(NODES, {"x": {}}, tuple(_pods()), (OUTSIDE, INSIDE, BESIDE), manifests=manifests, settings=RESET)
    with Lab(world, Tools(plugin=plugin)) as lab:
        yield lab


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("host", HOSTS)
def test_a_host_reaches_a_pod_by_address_rules_alone(lab: Lab, host: str, version: int) -> None:
    names = {"open": "x/open", **{name: f"x/in-{name}" for name in _rules("")}}
    probes = [lab.request(host, target, HTTP.number, version) for target in names.values()]
    results = dict(zip(names, lab.probe_all(probes), strict=True))
    assert {name for name, result in results.items() if result.outcome is Outcome.CONNECTED} == REACHABLE
    assert all(result.outcome.is_denied for name, result in results.items() if name not in REACHABLE)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("host", HOSTS)
def test_a_pod_reaches_a_host_by_address_rules_alone(lab: Lab, host: str, version: int) -> None:
    names = {"open": "x/open", **{name: f"x/out-{name}" for name in _rules("")}}
    probes = [lab.request(source, host, HTTP.number, version) for source in names.values()]
    results = dict(zip(names, lab.probe_all(probes), strict=True))
    assert {name for name, result in results.items() if result.outcome is Outcome.CONNECTED} == REACHABLE
    assert all(result.outcome.is_denied for name, result in results.items() if name not in REACHABLE)


@pytest.mark.parametrize("host", HOSTS)
def test_address_rules_are_for_their_ports_alone(lab: Lab, host: str) -> None:
    assert outcome(lab, host, "x/open", OTHER.number).is_allowed
    assert outcome(lab, host, "x/in-for-anyone", OTHER.number).is_denied
    assert outcome(lab, host, "x/in-for-their-blocks", OTHER.number).is_denied
    assert outcome(lab, "x/out-for-anyone", host, OTHER.number).is_denied
    assert outcome(lab, "x/out-for-their-blocks", host, OTHER.number).is_denied


def test_labels_are_never_guessed_from_an_address(lab: Lab) -> None:
    """The very same pods are reached by the pods that the rules mean."""
    assert outcome(lab, "x/open", "x/in-for-pods", HTTP.number).is_allowed
    assert outcome(lab, "x/out-for-pods", "x/open", HTTP.number).is_allowed


@pytest.mark.parametrize(("host", "reason"), [("host:outside", "unidentified-peer"), ("host:inside", "egress-denied")])
def test_denials_say_why(lab: Lab, host: str, reason: str) -> None:
    """Where a pod with an identity could be, all that is known before the SYN leaves is that egress is denied."""
    assert outcome(lab, host, "x/in-for-pods", HTTP.number).is_denied
    assert denials(lab, "x/in-for-pods")[-1] == "unidentified-peer"
    assert outcome(lab, "x/out-closed", host, HTTP.number).is_denied
    assert denials(lab, "x/out-closed")[-1] == reason


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("host", "has_frame"), [("host:outside", False), ("host:inside", True)])
def test_a_frame_leaves_for_the_enforced_networks_only(lab: Lab, host: str, version: int, *, has_frame: bool) -> None:
    with lab.capture(host) as capture:
        assert outcome(lab, "x/open", host, HTTP.number, version).is_allowed
        time.sleep(0.02)
        syns = [s for s in segments(capture.close(), HTTP.number) if s.flags & SYN]
    assert [is_frame(s.payload) for s in syns] == [has_frame, False]  # SYN, and the host's own SYN-ACK


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("host", HOSTS)
def test_a_host_that_dials_gets_no_frame_in_the_answer(lab: Lab, host: str, version: int) -> None:
    with lab.capture(host) as capture:
        assert outcome(lab, host, "x/open", HTTP.number, version).is_allowed
        time.sleep(0.02)
        syns = [s for s in segments(capture.close(), HTTP.number) if s.flags & SYN]
    assert [s.payload for s in syns] == [b"", b""]


@pytest.mark.parametrize("host", HOSTS)
def test_a_pod_that_may_reach_no_address_shows_its_identity_to_no_stranger(lab: Lab, host: str) -> None:
    """A SYN that no rule could allow does not leave the pod."""
    with lab.capture(host) as capture:
        assert outcome(lab, "x/out-closed", host, HTTP.number).is_denied
        time.sleep(0.02)
        assert segments(capture.close(), HTTP.number) == []


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("host", [*HOSTS, "host:beside"])
def test_a_host_that_states_the_nodes_address_is_not_the_node(lab: Lab, host: str, version: int) -> None:
    hook = f"/proc/sys/net/bridge/bridge-nf-call-{'iptables' if version == 4 else 'ip6tables'}"
    if host == "host:beside" and lab.run("node:a", "sh", "-c", f"cat {hook} || true").strip() != "1":
        pytest.skip("this kernel's bridges switch past netfilter")
    node, target = lab.place("node:a").address(version), lab.place("x/in-closed").address(version)
    with (
        lab.open_socket("x/in-closed", FAMILIES[version], socket.SOCK_DGRAM) as service,
        lab.open_socket("node:a", FAMILIES[version], socket.SOCK_DGRAM) as true_node,
        Wire(lab, host, version) as wire,
    ):
        service.bind((str(target), 0))
        service.settimeout(10)
        port = service.getsockname()[1]
        wire.send(build_udp(node.packed, target.packed, (port, port), b"forged"))
        wire.send(build(node.packed, target.packed, (port, HTTP.number), (1, 0), SYN, 64_240))
        time.sleep(0.1)
        true_node.sendto(b"true", (str(target), port))
        assert service.recv(100) == b"true"
    entries = lab.run("x/in-closed", "conntrack", "-L", "-p", "tcp", "--orig-port-src", str(port))
    assert entries.strip() == ""


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("pod", "is_allowed"), [("x/out-for-pods", False), ("x/out-for-their-blocks", True)])
def test_a_host_that_answers_a_syn_by_a_syn_is_judged_as_one_that_answers(
    lab: Lab, pod: str, version: int, *, is_allowed: bool
) -> None:
    """To the pod's kernel both have opened at once: connect() returns, whoever may connect to the pod."""
    port, isn = HTTP.number, 77_000
    with (
        silenced(lab, "host:inside", version),
        Wire(lab, "host:inside", version) as wire,
        lab.open_socket(pod, FAMILIES[version]) as client,
    ):
        client.setblocking(False)
        client.connect_ex((str(wire.ip), port))
        syn = wire.await_segment(lambda found: found.flags == SYN and found.dport == port)
        wire.send(build(wire.address, syn.src, (port, syn.sport), (isn, 0), SYN, 64_240, SYN_OPTIONS))
        if not is_allowed:
            await_denial(lab, pod, Reason.UNIDENTIFIED_PEER, port, address=wire.ip)
            assert wire.find_segment(lambda found: found.flags == SYN_ACK and found.dport == port, 0.2) is None
            return
        answer = wire.await_segment(lambda found: found.flags == SYN_ACK and found.dport == port)
        numbers = isn + 1, answer.seq + 1 & 0xFFFF_FFFF
        wire.send(build(wire.address, syn.src, (port, syn.sport), numbers, ACK, 64_240))
        client.settimeout(10)
        assert client.send(b"hello") == 5
        wire.await_segment(lambda found: found.dport == port and found.payload == b"hello")


# What the answer of a host without an enforcer says of our SYN, which was longer than its sender's kernel knows.


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
def test_a_closed_port_of_a_host_refuses_at_once(lab: Lab, host: str, protocol: Protocol, version: int) -> None:
    assert lab.probe("x/open", host, CLOSED, version, protocol).outcome is Outcome.REFUSED


@pytest.mark.parametrize("version", [4, 6])
def test_a_closed_port_of_a_host_refuses_fast_open_at_once(lab: Lab, version: int) -> None:
    write_sysctls(lab.place("x/open").netns, {"net/ipv4/tcp_fastopen": str(CLIENT_FAST_OPEN)})
    with lab.open_socket("x/open", FAMILIES[version]) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 10, 0))
        with pytest.raises(ConnectionRefusedError):
            client.sendto(b"hello", MSG_FASTOPEN, (str(lab.place("host:inside").address(version)), CLOSED))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("reject", ["tcp reset", "icmpx type port-unreachable"])
def test_a_hosts_firewall_refuses_at_once(lab: Lab, reject: str, version: int) -> None:
    """The ICMP error quotes our SYN with its frame."""
    chain = "add chain inet refusing input { type filter hook input priority 0; }"
    lab.run("host:inside", "nft", f"add table inet refusing; {chain}")
    try:
        lab.run("host:inside", "nft", f"add rule inet refusing input tcp dport {HTTP.number} reject with {reject}")
        assert outcome(lab, "x/open", "host:inside", HTTP.number, version) is Outcome.REFUSED
    finally:
        lab.run("host:inside", "nft", "delete table inet refusing")


@pytest.mark.parametrize("version", [4, 6])
def test_a_host_that_takes_data_of_a_syn_gets_the_clients_words_all_the_same(lab: Lab, version: int) -> None:
    """Fast Open without a cookie: our frame comes to the application, in a connection that ends at once."""
    write_sysctls(lab.place("host:inside").netns, {"net/ipv4/tcp_fastopen": str(SERVER_FAST_OPEN_WITHOUT_COOKIE)})
    address = str(lab.place("host:inside").address(version))
    with (
        lab.open_socket("host:inside", FAMILIES[version]) as listener,
        lab.open_socket("x/open", FAMILIES[version]) as client,
    ):
        listener.bind((address, 0))
        listener.listen()
        client.settimeout(10)
        client.connect(listener.getsockname()[:2])
        client.sendall(b"hello")
        listener.settimeout(10)
        words = []
        while b"hello" not in words:
            server, _ = listener.accept()
            with server, suppress(ConnectionResetError):
                server.settimeout(10)
                words.append(server.recv(100))
        assert len(words) <= 2
