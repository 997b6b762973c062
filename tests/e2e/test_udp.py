# SPDX-License-Identifier: Apache-2.0
"""UDP by identity, with real sockets: who may exchange datagrams with whom, within a node and across, both families."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.model import PodRef, Protocol
from tests.e2e.operation_world import FAMILIES, NODES, app, denials, pod, policy, queued_packets
from trireme_lab import HostSpec, Lab, LabSpec, PortSpec, ServicePort, ServiceSpec, Tools

pytestmark = pytest.mark.kernel

ECHO = PortSpec(7007, Protocol.UDP)
SERVICE_PORT = 53
PATIENCE_S = 10.0
QUIET_S = 1.5
"""Longer than anything waits in a queue, seconds."""
UDP_SEGMENT = 103  # linux/udp.h
VERSIONS = [4, 6]
CLIENTS = ["x/client", "x/far-client"]


def _allowing(direction: str, name: str) -> list[object]:
    ports = [{"port": ECHO.number, "protocol": "UDP"}, {"port": 9_000, "endPort": 9_999, "protocol": "UDP"}]
    return [{direction: [app(name)], "ports": ports}]


PODS = (
    pod("server", "a", ECHO),
    pod("far-server", "b", ECHO, app="server"),
    pod("client", "a"),
    pod("far-client", "b", app="client"),
    pod("stranger", "a"),
    pod("bound", "b"),
    pod("bound-elsewhere", "b"),
    pod("open", "a", ECHO),
)


def _service(name: str, number: int, *pods: str) -> ServiceSpec:
    addresses = ip_address(f"10.96.0.{number}"), ip_address(f"fd00:10:96::{number}")
    port = ServicePort(SERVICE_PORT, ECHO.number, Protocol.UDP)
    return ServiceSpec("x", name, addresses, tuple(PodRef("x", p) for p in pods), (port,))


SERVICES = _service("echo", 10, "server", "far-server"), _service("open", 11, "open")
MANIFESTS = (
    policy("server", "server", ingress=[*_allowing("from", "client"), *_allowing("from", "bound")]),
    policy("bound", "bound", egress=_allowing("to", "server")),
    policy("bound-elsewhere", "bound-elsewhere", egress=_allowing("to", "client")),
)


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    hosts = (HostSpec("unenforced", node="a", ports=(ECHO,)), HostSpec("outside", (ip_address("203.0.113.7"),)))
    with Lab(LabSpec(NODES, {"x": {}}, PODS, hosts, SERVICES, MANIFESTS), Tools(plugin=plugin)) as lab:
        yield lab


def _is_denied(lab: Lab, source: str, target: str, port: int, version: int) -> bool:
    request = replace(lab.request(source, target, port, version), protocol=Protocol.UDP, timeout_s=1.2)
    return lab.probe_all([request])[0].outcome.is_denied


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("server", ["x/server", "x/far-server"])
@pytest.mark.parametrize("client", [*CLIENTS, "x/bound"])
def test_an_allowed_pod_gets_its_answer(lab: Lab, client: str, server: str, version: int) -> None:
    result = lab.probe(client, server, ECHO.number, version, Protocol.UDP)
    assert (result.outcome.value, result.banner) == ("connected", server)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("server", ["x/server", "x/far-server"])
def test_a_stranger_gets_none(lab: Lab, server: str, version: int) -> None:
    assert _is_denied(lab, "x/stranger", server, ECHO.number, version)
    assert denials(lab, server)[-1] == "ingress-denied"


_ports = itertools.count(9_000)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A client's socket and a server's, neither of which has said anything yet."""

    client: socket.socket
    server: socket.socket

    def ask(self, payload: bytes, within_s: float = PATIENCE_S) -> bool:
        """Send a datagram and wait for it; answer it, and wait for that."""
        self.client.send(payload)
        if not self.arrives(payload, within_s):
            return False
        self.client.settimeout(within_s)
        return self.client.recv(65_536) == b"re: " + payload[:1_000]

    def arriving(self, count: int) -> list[bytes]:
        """Return so many datagrams as they arrive at the server, sorted, and answer them.

        Those that come in the moment of the release can overtake those that waited for it.
        """
        self.server.settimeout(PATIENCE_S)
        found = []
        for _ in range(count):
            received, source = self.server.recvfrom(65_536)
            self.server.sendto(b"re: " + received[:1_000], source)
            found.append(received)
        return sorted(found)

    def arrives(self, payload: bytes, within_s: float) -> bool:
        """Return whether the next datagram at the server is this one, and answer it."""
        self.server.settimeout(within_s)
        try:
            received, source = self.server.recvfrom(65_536)
        except TimeoutError:
            return False
        assert received == payload
        self.server.sendto(b"re: " + received[:1_000], source)
        return True


@contextmanager
def exchange(lab: Lab, client: str, server: str, version: int = 4) -> Iterator[Exchange]:
    address = str(lab.address_of(server, version)), next(_ports)
    with (
        lab.open_socket(client, FAMILIES[version], socket.SOCK_DGRAM) as one,
        lab.open_socket(server, FAMILIES[version], socket.SOCK_DGRAM) as other,
    ):
        other.bind(address)
        one.connect(address)
        yield Exchange(one, other)


WAYS = [("x/client", "x/server"), ("x/client", "x/far-server"), ("x/bound", "x/server"), ("x/bound", "x/far-server")]
"""From pods whose datagrams leave at once with the offer beside them, and from pods whose wait for the answer."""
ways = pytest.mark.parametrize(("client", "server"), WAYS)
versions = pytest.mark.parametrize("version", VERSIONS)


@versions
@ways
def test_many_at_once_on_one_flow_arrive_and_are_answered(lab: Lab, client: str, server: str, version: int) -> None:
    """As a resolver asks for A and AAAA."""
    for _ in range(5):
        with exchange(lab, client, server, version) as flow:
            payloads = [b"%d" % n for n in range(8)]
            for payload in payloads:
                flow.client.send(payload)
            assert flow.arriving(len(payloads)) == payloads
            flow.client.settimeout(PATIENCE_S)
            assert sorted(flow.client.recv(100) for _ in payloads) == [b"re: " + payload for payload in payloads]


@versions
@ways
@pytest.mark.parametrize("size", [0, 1_400, 20_000])
def test_datagrams_of_any_size_open_a_flow(lab: Lab, client: str, server: str, version: int, size: int) -> None:
    with exchange(lab, client, server, version) as flow:
        assert flow.ask(bytes(size))
        assert flow.ask(b"small")
        assert flow.ask(bytes(size))


@versions
@ways
def test_a_burst_that_the_kernel_segments_opens_a_flow(lab: Lab, client: str, server: str, version: int) -> None:
    with exchange(lab, client, server, version) as flow:
        flow.client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 100)
        flow.client.send(b"".join(bytes((n,)) * 100 for n in range(10)))
        assert flow.arriving(10) == [bytes((n,)) * 100 for n in range(10)]


@versions
@ways
def test_a_closed_port_is_refused(lab: Lab, client: str, server: str, version: int) -> None:
    with exchange(lab, client, server, version) as flow:
        flow.server.close()
        flow.client.send(b"anybody there?")
        flow.client.settimeout(PATIENCE_S)
        with pytest.raises(ConnectionRefusedError):
            flow.client.recv(100)


@versions
@ways
def test_a_released_flow_runs_in_the_kernel(lab: Lab, client: str, server: str, version: int) -> None:
    with exchange(lab, client, server, version) as flow:
        assert flow.ask(b"first")
        assert flow.ask(b"second")
        before = queued_packets(lab, client), queued_packets(lab, server)
        for n in range(20):
            assert flow.ask(b"%d" % n)
        assert (queued_packets(lab, client), queued_packets(lab, server)) == before


@versions
@ways
def test_a_responder_that_lost_its_state_asks_to_shake_hands_again(
    lab: Lab, client: str, server: str, version: int
) -> None:
    with exchange(lab, client, server, version) as flow:
        assert flow.ask(b"first")
        for _ in range(3):
            port = str(flow.server.getsockname()[1])
            family = "ipv4" if version == 4 else "ipv6"
            lab.run(server, "conntrack", "-D", "-f", family, "-p", "udp", "--dport", port)
            assert flow.ask(b"still the same flow")


@versions
@ways
def test_an_initiator_that_lost_its_state_shakes_hands_again(lab: Lab, client: str, server: str, version: int) -> None:
    with exchange(lab, client, server, version) as flow:
        assert flow.ask(b"first")
        for _ in range(3):
            port = str(flow.server.getsockname()[1])
            family = "ipv4" if version == 4 else "ipv6"
            lab.run(client, "conntrack", "-D", "-f", family, "-p", "udp", "--dport", port)
            assert flow.ask(b"still the same flow")


@versions
@pytest.mark.parametrize("client", ["x/client", "x/bound"])
def test_through_a_service_both_backends_answer_and_are_judged_by_their_own_port(
    lab: Lab, client: str, version: int
) -> None:
    results = [lab.probe(client, "service:x/echo", SERVICE_PORT, version, Protocol.UDP) for _ in range(16)]
    assert {result.outcome.value for result in results} == {"connected"}
    assert {result.banner for result in results} == {"x/server", "x/far-server"}


@versions
def test_egress_is_judged_by_who_answers(lab: Lab, version: int) -> None:
    for target, port in (("x/open", ECHO.number), ("service:x/open", SERVICE_PORT)):
        assert _is_denied(lab, "x/bound-elsewhere", target, port, version)
        # On a busy machine the offer went twice, and the second answer is of no flow any more.
        assert "egress-denied" in denials(lab, "x/bound-elsewhere")[-2:]
        assert lab.probe("x/client", target, port, version, Protocol.UDP).outcome.is_allowed


@versions
def test_a_pod_without_an_enforcer_is_an_address(lab: Lab, version: int) -> None:
    assert lab.probe("x/client", "host:unenforced", ECHO.number, version, Protocol.UDP).outcome.is_allowed
    assert lab.probe("host:unenforced", "x/open", ECHO.number, version, Protocol.UDP).outcome.is_allowed
    for source, target in (("x/bound", "host:unenforced"), ("host:unenforced", "x/server")):
        assert _is_denied(lab, source, target, ECHO.number, version)
    assert denials(lab, "x/server")[-1] == "unidentified-peer"


@ways
def test_a_change_of_policy_stops_a_flow_and_lets_it_go_on(lab: Lab, client: str, server: str) -> None:
    with exchange(lab, client, server) as flow:
        assert flow.ask(b"first")
        assert lab.apply(policy("server", "server", ingress=_allowing("from", "nobody")))
        try:
            flow.client.send(b"denied")
            assert not flow.arrives(b"denied", QUIET_S)
        finally:
            assert lab.apply(MANIFESTS[0])
        deadline = time.monotonic() + PATIENCE_S
        while not flow.ask(b"again", 0.5):
            assert time.monotonic() < deadline


@pytest.mark.parametrize(("client", "server"), [("x/client", "x/far-server"), ("x/bound", "x/server")])
def test_restarts_of_the_enforcers_break_no_flow(lab: Lab, client: str, server: str) -> None:
    with exchange(lab, client, server) as flow:
        assert flow.ask(b"first")
        for name in {lab.pod_node(client).name, lab.pod_node(server).name}:
            lab.node(name).restart()
            assert flow.ask(b"after a restart")
            assert flow.ask(b"and once more")
    with exchange(lab, client, server) as flow:
        assert flow.ask(b"a new one")
