# SPDX-License-Identifier: Apache-2.0
"""UDP where it is odd, on real sockets through real enforcers: docs/udp.md has the cases."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.model import PodRef, Protocol
from tests.e2e.operation_world import FAMILIES, NODES, app, block, denials, pod, policy
from trireme_lab import HostSpec, Lab, LabSpec, PortSpec, ServicePort, ServiceSpec, Tools
from trireme_lab.netns import open_socket

pytestmark = pytest.mark.kernel

PATIENCE_S = 10.0
QUIET_S = 1.5
"""Longer than anything waits in a queue, seconds."""
ECHO = PortSpec(7007, Protocol.UDP)
GROUP, GROUP_6, GROUP_PORT = "239.1.2.3", "ff05::1:7100", 7_100
UDP_SEGMENT = 103  # linux/udp.h
VERSIONS = [4, 6]
BETWEEN = [("x/one", "x/two"), ("x/one", "x/far"), ("x/bound", "x/far")]
versions = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    addresses = ip_address("10.96.0.10"), ip_address("fd00:10:96::10")
    service = ServiceSpec("x", "echo", addresses, (PodRef("x", "two"),), (ServicePort(53, ECHO.number, Protocol.UDP),))
    peers = [app("one"), app("two"), app("far"), app("bound")]
    pods = (
        pod("one", "a"),
        pod("two", "a", ECHO),
        pod("far", "b"),
        pod("bound", "a"),
        pod("open", "a"),
        pod("by-address", "a"),
    )
    manifests = (
        *(policy(name, name, ingress=[{"from": peers}]) for name in ("one", "two", "far")),
        policy("bound", "bound", ingress=[{"from": peers}], egress=[{"to": peers}]),
        policy("by-address", "by-address", ingress=[{"from": block("10.0.0.0/8", "fd00::/8")}]),
    )
    hosts = HostSpec("plain", node="a"), HostSpec("other", node="a")
    world = LabSpec(NODES, {"x": {}}, pods, hosts, (service,), manifests)
    with Lab(world, Tools(plugin=plugin)) as lab:
        yield lab


@contextmanager
def _bound(lab: Lab, *places: str, version: int = 4) -> Iterator[list[socket.socket]]:
    """Yield a socket at each place, on a port of its own."""
    with ExitStack() as stack:
        socks = []
        for place in places:
            sock = stack.enter_context(open_socket(lab.place(place).netns, FAMILIES[version], socket.SOCK_DGRAM))
            sock.bind((str(lab.address_of(place, version)), 0))
            sock.settimeout(PATIENCE_S)
            socks.append(sock)
        yield socks


def _is_silent(sock: socket.socket) -> bool:
    sock.settimeout(QUIET_S)
    try:
        sock.recv(2_048)
    except TimeoutError:
        return True
    return False


@versions
@pytest.mark.parametrize(("one", "other"), BETWEEN)
def test_both_send_first(lab: Lab, one: str, other: str, version: int) -> None:
    """Neither side's datagram is an answer to the other's, and for each conntrack the other's is one."""
    for _ in range(3):
        with _bound(lab, one, other, version=version) as ends:
            ends[0].connect(ends[1].getsockname()[:2])
            ends[1].connect(ends[0].getsockname()[:2])
            for end in ends:
                end.send(b"first")
            assert [end.recv(100) for end in ends] == [b"first", b"first"]
            for end in ends:
                end.send(b"second")
            assert [end.recv(100) for end in ends] == [b"second", b"second"]


@versions
@pytest.mark.parametrize(("client", "other"), [("x/one", "x/far"), ("x/one", "x/open")])
def test_an_answer_from_another_port_is_a_flow_of_its_own(lab: Lab, client: str, other: str, version: int) -> None:
    with _bound(lab, client, other, other, version=version) as (asking, asked, answering):
        asking.sendto(b"who?", asked.getsockname()[:2])
        _, source = asked.recvfrom(100)
        answering.sendto(b"me", source[:2])
        if other == "x/far":
            assert asking.recv(100) == b"me"
        else:
            assert _is_silent(asking)
            assert denials(lab, client)[-1] == "ingress-denied"
        asked.sendto(b"me", source[:2])
        asking.settimeout(PATIENCE_S)
        assert asking.recv(100) == b"me"


@versions
@pytest.mark.parametrize("size", [0, 1_200, 20_000])
def test_a_pod_reaches_itself_past_every_policy(lab: Lab, version: int, size: int) -> None:
    with _bound(lab, "x/bound", "x/bound", version=version) as (one, other):
        one.sendto(bytes(size), other.getsockname()[:2])
        assert other.recv(65_535) == bytes(size)


@versions
def test_a_pod_reaches_itself_through_its_service(lab: Lab, version: int) -> None:
    result = lab.probe("x/two", "service:x/echo", 53, version, Protocol.UDP)
    assert (result.outcome.value, result.banner) == ("connected", "x/two")


@pytest.mark.parametrize("to", [GROUP, GROUP_6, "255.255.255.255"], ids=["group", "group-ipv6", "everybody"])
def test_a_datagram_to_many_is_judged_by_address(lab: Lab, to: str) -> None:
    version = ip_address(to).version
    with ExitStack() as stack:
        ends = {name: stack.enter_context(_member(lab, f"x/{name}", version)) for name in ("one", "by-address", "open")}
        (sender,) = stack.enter_context(_bound(lab, "x/two", version=version))
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if version == 4:
            own = socket.inet_aton(str(lab.address_of("x/two")))
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, own)
        sender.sendto(b"all of you", (to, GROUP_PORT))
        assert ends["open"].recv(100) == b"all of you"
        assert ends["by-address"].recv(100) == b"all of you"
        assert _is_silent(ends["one"])
    assert denials(lab, "x/one")[-1] == "unidentified-peer"


@contextmanager
def _member(lab: Lab, place: str, version: int) -> Iterator[socket.socket]:
    """Yield a socket that hears what is sent to the group, or to everybody."""
    with open_socket(lab.place(place).netns, FAMILIES[version], socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE_S)
        if version == 4:
            own = socket.inet_aton(str(lab.address_of(place)))
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(GROUP) + own)
        else:
            # On whatever interface has the route to it: the pod has one.
            group = socket.inet_pton(socket.AF_INET6, GROUP_6)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group + bytes(4))
        sock.bind(("", GROUP_PORT))
        yield sock


@versions
def test_two_without_an_enforcer_on_a_node_speak_as_if_there_were_none(lab: Lab, version: int) -> None:
    """Beside pods that are enforced: plain datagrams, large ones, and sends that the kernel cuts."""
    with _bound(lab, "host:plain", "host:other", version=version) as (one, other):
        other.connect(one.getsockname()[:2])
        for payload in (b"", b"small", bytes(4_000)):
            other.send(payload)
            received, source = one.recvfrom(65_535)
            assert (received, source[:2]) == (payload, other.getsockname()[:2])
            one.sendto(payload, source)
            assert other.recv(65_535) == payload
        other.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 100)
        other.send(bytes(1_000))
        assert [len(one.recv(65_535)) for _ in range(10)] == [100] * 10
