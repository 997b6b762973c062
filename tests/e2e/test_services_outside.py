# SPDX-License-Identifier: Apache-2.0
"""Services that lead out of the cluster, such as the API server's: a rule may name the address behind them."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from scapy.layers.sctp import SCTP, SCTPChunkCookieEcho, SCTPChunkInit, SCTPChunkInitAck

from enforcer_daemon.model import Protocol
from tests.e2e.operation_world import FAMILIES, NODES, RESET, app, block, denials, pod, policy
from trireme_lab import HostSpec, Lab, LabSpec, Outcome, ServicePort, ServiceSpec, Tools
from trireme_lab.netns import open_socket
from trireme_lab.spec import PortSpec

pytestmark = pytest.mark.kernel

PORT, TARGET = 443, 6_443
UDP_PORT, UDP_TARGET = 53, 5_353
SCTP_PORT, SCTP_TARGET = 36_412, 36_413
FRONTS = (ip_address("10.96.0.1"), ip_address("fd00:10:96::1"))
BEHIND = (ip_address("203.0.113.7"), ip_address("2001:db8::7"))
API = HostSpec("api", BEHIND, (PortSpec(TARGET), PortSpec(UDP_TARGET, Protocol.UDP)))
SERVICE = ServiceSpec(
    "default",
    "kubernetes",
    FRONTS,
    (),
    (
        ServicePort(PORT, TARGET),
        ServicePort(UDP_PORT, UDP_TARGET, Protocol.UDP),
        ServicePort(SCTP_PORT, SCTP_TARGET, Protocol.SCTP),
    ),
    hosts=("api",),
)
VIA = "service:default/kubernetes"
BEHIND_BLOCK = block("203.0.113.7/32", "2001:db8::7/128")


def _ports(tcp: int, udp: int, sctp: int) -> list[dict[str, object]]:
    numbers = {"TCP": tcp, "UDP": udp, "SCTP": sctp}
    return [{"port": number, "protocol": protocol} for protocol, number in numbers.items()]


EGRESS: dict[str, list[object]] = {
    "to-behind": [{"to": BEHIND_BLOCK, "ports": _ports(TARGET, UDP_TARGET, SCTP_TARGET)}],
    "to-behind-and-pods": [{"to": BEHIND_BLOCK}, {"to": [app("other")]}],
    "to-front": [{"to": block("10.96.0.1/32", "fd00:10:96::1/128"), "ports": _ports(PORT, UDP_PORT, SCTP_PORT)}],
    "to-front-port-behind": [{"to": BEHIND_BLOCK, "ports": _ports(PORT, UDP_PORT, SCTP_PORT)}],
    "to-elsewhere": [{"to": block("203.0.113.8/32", "2001:db8::8/128")}],
    "caged": [],
}
ALLOWED = {"to-behind", "to-behind-and-pods", "to-front"}
VERSIONS = [4, 6]


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    spec = LabSpec(
        NODES, {"x": {}}, tuple(pod(name, "a") for name in EGRESS), (API,), (SERVICE,),
        tuple(policy(name, name, egress=rules) for name, rules in EGRESS.items()), RESET,
    )  # fmt: skip
    with Lab(spec, Tools(plugin=plugin, probe_timeout_s=10.0)) as lab:
        yield lab


def _connected(lab: Lab, port: int, protocol: Protocol, version: int) -> set[str]:
    """Try the Service from all pods at once; return those that reach it."""
    requests = [replace(lab.request(f"x/{name}", VIA, port, version), protocol=protocol) for name in EGRESS]
    results = zip(EGRESS, lab.probe_all(requests), strict=True)
    return {name for name, result in results if result.outcome is Outcome.CONNECTED}


@pytest.mark.stock_kernel
@pytest.mark.parametrize("version", VERSIONS)
def test_a_connection_is_decided_by_either_address(lab: Lab, version: int) -> None:
    assert _connected(lab, PORT, Protocol.TCP, version) == ALLOWED
    assert denials(lab, "x/to-elsewhere")[-1] == "egress-denied"  # By the guard, which sees where the SYN goes.


@pytest.mark.stock_kernel
@pytest.mark.parametrize("version", VERSIONS)
def test_a_datagram_is_decided_by_either_address(lab: Lab, version: int) -> None:
    assert _connected(lab, UDP_PORT, Protocol.UDP, version) == ALLOWED


@pytest.mark.parametrize("version", VERSIONS)
def test_an_established_connection_goes_on_by_either_address(lab: Lab, version: int) -> None:
    with lab.open_socket("x/to-behind", FAMILIES[version]) as client:
        client.settimeout(20.0)
        client.connect((str(lab.address_of(VIA, version)), PORT))
        assert client.recv(100)
        try:
            assert lab.apply(policy("to-behind", "to-behind", egress=[{"to": BEHIND_BLOCK}]))
            client.sendall(b"still here")
            assert client.recv(100) == b"still here"
            assert lab.apply(policy("to-behind", "to-behind", egress=EGRESS["to-elsewhere"]))
            with pytest.raises(ConnectionError):
                client.recv(100)
        finally:
            assert lab.apply(policy("to-behind", "to-behind", egress=EGRESS["to-behind"]))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_association_is_decided_by_either_address(lab: Lab, version: int) -> None:
    """Raw sockets, so that the kernel needs no SCTP of its own: INIT, INIT-ACK, and what the pod sends then."""
    for name in EGRESS:
        assert _associates(lab, f"x/{name}", version) is (name in ALLOWED), name


def _associates(lab: Lab, name: str, version: int) -> bool:
    """Return whether what follows INIT and INIT-ACK arrives."""
    port, number = 40_000 + secrets.randbelow(20_000), socket.IPPROTO_SCTP
    front, behind = str(lab.address_of(VIA, version)), lab.place("host:api")
    own = str(lab.address_of(name, version))
    with (
        open_socket(lab.place(name).netns, FAMILIES[version], socket.SOCK_RAW, number) as pod,
        open_socket(behind.netns, FAMILIES[version], socket.SOCK_RAW, number) as server,
    ):
        server.settimeout(10.0 if name.removeprefix("x/") in ALLOWED else 1.0)
        pod.settimeout(10.0)
        tag = secrets.randbits(32)
        init = SCTPChunkInit(init_tag=tag, a_rwnd=1_500, n_out_streams=1, n_in_streams=1)
        pod.sendto(bytes(SCTP(sport=port, dport=SCTP_PORT) / init), (front, 0))
        if _arrives(server, tag.to_bytes(4, "big")) is None:
            return False
        answer = SCTPChunkInitAck(init_tag=7, a_rwnd=1_500, n_out_streams=1, n_in_streams=1)
        server.sendto(bytes(SCTP(sport=SCTP_TARGET, dport=port, tag=tag) / answer), (own, 0))
        if _arrives(pod, tag.to_bytes(4, "big")) is None:
            return False
        marker = secrets.token_bytes(8)
        echo = SCTPChunkCookieEcho(cookie=marker)
        pod.sendto(bytes(SCTP(sport=port, dport=SCTP_PORT, tag=7) / echo), (front, 0))
        return _arrives(server, marker) is not None


def _arrives(sock: socket.socket, wanted: bytes) -> bytes | None:
    try:
        while wanted not in (packet := sock.recv(2_048)):
            pass
    except TimeoutError:
        return None
    return packet
