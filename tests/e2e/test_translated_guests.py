# SPDX-License-Identifier: Apache-2.0
"""What reaches and leaves a virtual machine whose pod translates its addresses (KubeVirt's masquerade binding)."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.e2e.operation_world import FAMILIES, NODES, app, block, denials, endpoint, pod, policy
from trireme_lab import HostSpec, Lab, LabSpec, Tools
from trireme_lab.netns import exec_prefix, open_socket, run

pytestmark = [pytest.mark.kernel, pytest.mark.stock_kernel]

OUTSIDE = HostSpec("outside", (ip_address("203.0.113.7"), ip_address("2001:db8::7")))
PARTNER = HostSpec("partner", (ip_address("203.0.113.9"), ip_address("2001:db8::9")))
NEIGHBOR = HostSpec("neighbor", node="a")
FORBIDDEN = {"x/other": "ingress-denied", "host:neighbor": "unidentified-peer", "host:outside": "unidentified-peer"}
"""Who may not reach the guest, nor be reached, and why not."""
VERSIONS = (4, 6)
INSIDE = {4: ("10.0.2.1", "10.0.2.2", 24), 6: ("fd10:0:2::1", "fd10:0:2::2", 64)}
"""Addresses of the bridge in the pod and of the guest, as KubeVirt gives them."""
PEERS = [app("client"), *block(*(f"{address}/{address.max_prefixlen}" for address in PARTNER.addresses))]
PORT = 5_005
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
PATIENCE_S, DENIED_S = 10.0, 1.5
ATTEMPTS = 5


@contextmanager
def guest(lab: Lab) -> Iterator[str]:
    """Yield a namespace behind a bridge of pod x/vm, which translates as KubeVirt's masquerade binding does."""
    netns, name = lab.place("x/vm").netns, f"tt-{secrets.token_hex(4)}"

    def in_pod(words: str) -> None:
        run([*exec_prefix(netns), *words.split()])

    def in_guest(words: str) -> None:
        run([*exec_prefix(name), *words.split()])

    run(["ip", "netns", "add", name])
    try:
        in_pod("ip link add k6t-eth0 type bridge forward_delay 0")
        in_pod(f"ip link add tap0 type veth peer name eth0 netns {name}")
        in_pod("ip link set tap0 master k6t-eth0 up")
        in_pod("ip link set k6t-eth0 up")
        in_guest("ip link set eth0 up")
        in_pod("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
        for version, (gateway, address, length) in INSIDE.items():
            tool, nodad = ("iptables", "") if version == 4 else ("ip6tables", " nodad")
            in_pod(f"ip addr add {gateway}/{length} dev k6t-eth0{nodad}")
            in_guest(f"ip addr add {address}/{length} dev eth0{nodad}")
            in_guest(f"ip -{version} route add default via {gateway}")
            for protocol in ("tcp", "udp"):
                in_pod(f"{tool} -w -t nat -A PREROUTING -i eth0 -p {protocol} -j DNAT --to-destination {address}")
            in_pod(f"{tool} -w -t nat -A POSTROUTING -s {address} -o eth0 -j MASQUERADE")
        yield name
    finally:
        run(["ip", "netns", "del", name])


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    spec = LabSpec(
        NODES, {"x": {}},
        (pod("vm", "a"), pod("near", "a", app="client"), pod("far", "b", app="client"), pod("other", "b")),
        (OUTSIDE, PARTNER, NEIGHBOR),
        manifests=(policy("vm", "vm", ingress=[{"from": PEERS}], egress=[{"to": PEERS}]),),
    )  # fmt: skip
    with Lab(spec, Tools(plugin=plugin)) as lab:
        yield lab


@pytest.fixture(scope="module")
def vm(lab: Lab) -> Iterator[str]:
    with guest(lab) as name:
        yield name


@pytest.fixture(scope="module")
def plain(plugin: Path) -> Iterator[tuple[Lab, str]]:
    spec = LabSpec(NODES, {"x": {}}, (pod("vm", "a"), pod("other", "b")), (OUTSIDE, NEIGHBOR), enforcer=False)
    with Lab(spec, Tools(plugin=plugin)) as lab, guest(lab) as name:
        yield lab, name


@contextmanager
def server(netns: str, kind: int, version: int) -> Iterator[socket.socket]:
    """Yield a socket that serves in a namespace."""
    with open_socket(netns, FAMILIES[version], kind) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("", PORT))
        if kind == TCP:
            sock.listen()
        yield sock


def exchanges(source: str, target: tuple[str, str], kind: int, version: int, timeout_s: float) -> bool:
    """Send from one namespace to a server in another, by the address given; return whether it comes back.

    A datagram is sent again after a while, as by a resolver.
    """
    netns, address = target
    ask = secrets.token_bytes(16)
    with server(netns, kind, version) as listener, open_socket(source, FAMILIES[version], kind) as client:
        for sock in (listener, client):
            sock.settimeout(timeout_s if kind == TCP else timeout_s / ATTEMPTS)
        for _ in range(1 if kind == TCP else ATTEMPTS):
            try:
                client.connect((address, PORT))
                return _is_echoed(client, listener, kind, ask)
            except (TimeoutError, ConnectionRefusedError):
                continue
    return False


def _is_echoed(client: socket.socket, listener: socket.socket, kind: int, ask: bytes) -> bool:
    if kind == TCP:
        serving, _ = listener.accept()
        with serving:
            client.sendall(ask)
            serving.sendall(serving.recv(100))
            return client.recv(100) == ask
    client.send(ask)
    received, sender = listener.recvfrom(100)
    listener.sendto(received, sender)
    return client.recv(100) == ask


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture(params=(TCP, UDP), ids=["tcp", "udp"])
def kind(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


def to_guest(lab: Lab, source: str, vm: str, kind: int, version: int, timeout_s: float = PATIENCE_S) -> bool:
    """Return whether a place and the guest exchange data if the place begins."""
    target = vm, str(lab.address_of("x/vm", version))
    return exchanges(lab.place(source).netns, target, kind, version, timeout_s)


def from_guest(lab: Lab, vm: str, peer: str, kind: int, version: int, timeout_s: float = PATIENCE_S) -> bool:
    """Return whether the guest and a place exchange data if the guest begins."""
    place = lab.place(peer)
    return exchanges(vm, (place.netns, str(place.address(version))), kind, version, timeout_s)


@pytest.mark.parametrize("client", ["x/near", "x/far"])
def test_a_guest_answers_udp_of_pods_that_its_policy_allows(lab: Lab, vm: str, client: str, version: int) -> None:
    assert to_guest(lab, client, vm, UDP, version)


def test_a_guest_and_an_allowed_address_reach_each_other(lab: Lab, vm: str, kind: int, version: int) -> None:
    assert to_guest(lab, "host:partner", vm, kind, version)
    assert from_guest(lab, vm, "host:partner", kind, version)


@pytest.mark.parametrize("source", FORBIDDEN)
def test_nobody_else_reaches_a_guest(lab: Lab, vm: str, source: str, kind: int, version: int) -> None:
    assert not to_guest(lab, source, vm, kind, version, DENIED_S)
    assert FORBIDDEN[source] in denials(lab, "x/vm")
    assert endpoint(lab, "x/vm")["state"] == "enforced"


@pytest.mark.parametrize("peer", FORBIDDEN)
def test_a_guest_reaches_nobody_else(lab: Lab, vm: str, peer: str, kind: int, version: int) -> None:
    assert not from_guest(lab, vm, peer, kind, version, DENIED_S)


def test_what_a_guest_opens_reaches_no_enforced_pod(lab: Lab, vm: str, kind: int, version: int) -> None:
    """A limit (docs/dataplane.md): the rules see what the guest sends before it is translated."""
    assert not from_guest(lab, vm, "x/far", kind, version, DENIED_S)


def test_no_enforced_pod_connects_to_a_guest(lab: Lab, vm: str, version: int) -> None:
    """The same limit: the guest's SYN-ACK shows its own address."""
    assert not to_guest(lab, "x/far", vm, TCP, version, DENIED_S)


@pytest.mark.parametrize("other", FORBIDDEN)
def test_without_an_enforcer_all_exchange_with_a_guest(
    plain: tuple[Lab, str], other: str, kind: int, version: int
) -> None:
    """Else the tests of what is denied show nothing."""
    lab, vm = plain
    assert to_guest(lab, other, vm, kind, version)
    assert from_guest(lab, vm, other, kind, version)
