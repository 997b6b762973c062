# SPDX-License-Identifier: Apache-2.0
"""The world of the tests of IPVS: pods of every isolation, Services that lead to each, and who reads what arrives."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address, ip_network

from enforcer_daemon.model import IPAddress, Protocol
from tests.attacks.guard_world import Witness
from tests.attacks.kube_proxy import Front
from tests.e2e.operation_world import FAMILIES, HTTP, NODES, app, block, pod, policy
from trireme_lab import HostSpec, Lab, PortSpec
from trireme_lab.netns import exec_prefix, run, write_sysctls

CLUSTERS = (ip_network("10.244.0.0/16"), ip_network("fd00:10:244::/48"))
UDP = PortSpec(HTTP.number, Protocol.UDP)
OUTSIDE = HostSpec("outside", (ip_address("203.0.113.7"), ip_address("2001:db8::7")), (HTTP, UDP))
API_SERVER = 6443
PATIENCE_S = 20.0
QUIET_S = 0.5
"""For what must not happen."""
PODS = (
    pod("client", "a", app="client"),
    pod("stranger", "a"),
    pod("caged", "a"),
    pod("to-web", "a"),
    pod("to-api", "a"),
    pod("web-near", "a", HTTP, UDP, app="web"),
    pod("web-far", "b", HTTP, UDP, app="web"),
    pod("open-near", "a", HTTP, UDP),
    pod("open-far", "b", HTTP, UDP),
    pod("shut", "a", HTTP, UDP),
    pod("by-block", "a", HTTP, UDP),
)


def vip(number: int) -> tuple[IPAddress, IPAddress]:
    """Return a ClusterIP of each version."""
    return ip_address(f"10.96.0.{number}"), ip_address(f"fd00:10:96::{number}")


API, API_FAR, OUT, WEB_NEAR, WEB_FAR, OPEN_NEAR, OPEN_FAR, SHUT = map(vip, (1, 2, 3, 10, 11, 12, 13, 14))
NODE_PORTS = {"open-near": 30_003, "open-far": 30_004, "shut": 30_005, "by-block": 30_008}
LOCAL_NODE_PORT = 30_006
"""Of `shut`, for clients that keep their address (externalTrafficPolicy: Local)."""
SHUT_LOCAL = vip(15)
SHUT_RESET, RESET_PORT = vip(16), 9090
BY_BLOCK = vip(18)
MORTAL, MORTAL_NODE_PORT = vip(17), 30_007
MORTAL_ADDRESSES = ip_address("10.244.1.77"), ip_address("fd00:10:244:1::77")
"""Of pods on node a that come and go."""
MORTAL_TARGETS = tuple((address, RESET_PORT) for address in MORTAL_ADDRESSES)
MANIFESTS = (
    policy("caged", "caged", egress=[]),
    policy("to-web", "to-web", egress=[{"to": [app("web")]}]),
    policy("client", "client", egress=[{"to": [app("web")]}]),
    policy("to-api", "to-api", egress=[{"to": block(f"{API[0]}/32", f"{API[1]}/128"), "ports": [{"port": 443}]}]),
    policy("web", "web", ingress=[{"from": [app("client")]}]),
    policy("shut", "shut", ingress=[]),
    policy("by-block", "by-block", ingress=[{"from": block("203.0.113.7/32", "2001:db8::7/128")}]),
)
VIRTUAL = [
    "10.96.0.0/16",
    "fd00:10:96::/112",
    *(f"{address}/{address.max_prefixlen}" for node in NODES for address in node.addresses),
]
"""What an operator may have allowed at most: node ports too."""


def fronts(lab: Lab) -> list[Front]:
    """Return the Services: backends on pods, on nodes, and outside."""

    def at(port: int, place: str) -> tuple[tuple[IPAddress, int], ...]:
        return tuple((lab.place(place).address(version), port) for version in (4, 6))

    pods = {"web-near": WEB_NEAR, "web-far": WEB_FAR, "open-near": OPEN_NEAR, "open-far": OPEN_FAR, "shut": SHUT}
    pods |= {"by-block": BY_BLOCK}
    return [
        Front("api", API, 443, at(API_SERVER, "node:a")),
        Front("api-far", API_FAR, 443, at(API_SERVER, "node:b")),
        Front("out", OUT, 80, at(HTTP.number, "host:outside")),
        *(
            Front(name, front, 80, at(HTTP.number, f"x/{name}"), NODE_PORTS.get(name, 0))
            for name, front in pods.items()
        ),
        Front("shut-local", SHUT_LOCAL, 80, at(HTTP.number, "x/shut"), LOCAL_NODE_PORT, keeps_source=True),
        Front("shut-reset", SHUT_RESET, 80, at(RESET_PORT, "x/shut")),
        Front("mortal", MORTAL, 80, MORTAL_TARGETS, MORTAL_NODE_PORT, keeps_source=True),
    ]


def of(addresses: Sequence[IPAddress], version: int) -> IPAddress:
    """Return the address of that version."""
    return next(address for address in addresses if address.version == version)


def bridge_address(lab: Lab, version: int, node: str = "a") -> IPAddress:
    """Return the address of a node's bridge, which lies inside the pod networks."""
    (network,) = [network for network in lab.node(node).spec.pod_networks if network.version == version]
    return network[1]


class LinkWitness(Witness):
    """Notes from which source ports packets came to a place's interface, before all rules of the place."""

    def __init__(self, lab: Lab, place: str) -> None:
        super().__init__(lab, place, table="netdev attack_witness", hook='ingress device "eth0" priority -500')


def witness_at(lab: Lab, place: str) -> Witness:
    """Return a witness on the link of a pod, or behind the rules of another place."""
    return LinkWitness(lab, place) if lab.has_pod(place) else Witness(lab, place)


@contextmanager
def listening(lab: Lab, place: str, address: IPAddress, port: int) -> Iterator[socket.socket]:
    """Listen at a place."""
    with lab.open_socket(place, FAMILIES[address.version]) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((str(address), port))
        server.listen()
        server.settimeout(PATIENCE_S)
        yield server


def dial(lab: Lab, source: str, target: IPAddress, port: int) -> socket.socket:
    """Connect from a place. The caller owns the connection."""
    client = lab.open_socket(source, FAMILIES[target.version])
    client.settimeout(PATIENCE_S)
    client.connect((str(target), port))
    return client


@contextmanager
def routed_to_node(lab: Lab, version: int) -> Iterator[None]:
    """Route the ClusterIPs to node a, as where machines outside may use them; let the node take any source in."""
    node, fabric = lab.place("node:a"), f"{lab.name}-fabric"
    names = [f"net/ipv4/conf/{name}/{what}" for name in ("all", "eth0") for what in ("accept_local", "rp_filter")]
    (network,) = [network for network in map(ip_network, VIRTUAL[:2]) if network.version == version]
    link = _port_of(fabric, node.address(version))
    route = f"ip route add {network} via {node.address(version)} dev {link} onlink"
    before = {name: lab.run("node:a", "cat", f"/proc/sys/{name}").strip() for name in names}
    try:
        write_sysctls(node.netns, {name: str(int(name.endswith("accept_local"))) for name in names})
        run([*exec_prefix(fabric), *route.split()])
        yield
    finally:
        run([*exec_prefix(fabric), "ip", "route", "delete", str(network)])
        write_sysctls(node.netns, before)


def _port_of(fabric: str, address: IPAddress) -> str:
    """Return the fabric's interface towards an address."""
    words = run([*exec_prefix(fabric), "ip", "route", "get", str(address)]).split()
    return words[words.index("dev") + 1]
