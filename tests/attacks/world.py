# SPDX-License-Identifier: Apache-2.0
"""The world that the permanent attacker finds: two nodes, with all that a cluster translates and leaves untracked.

A variant is one value: which form kube-proxy's rules have, whether bridges are filtered, which backend the pods' rules
have. The lab stays; a variant is applied to it and taken away again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address, ip_network

from enforcer_daemon.dataplane.addresses import interface
from enforcer_daemon.dataplane.rtnetlink import Interface
from enforcer_daemon.handshake.frames import SYN_ACK_OVERHEAD, SYN_OVERHEAD, is_frame
from enforcer_daemon.model import IPAddress, PodRef, Protocol
from enforcer_daemon.packet.tcp import SYN, SYN_ACK
from tests.attacks.ipvs_nodes import ipvs_services
from tests.attacks.kube_proxy import Front, iptables_text, nft_text, removal
from tests.attacks.witness import Witness, is_any, is_link_level, listening
from tests.e2e.attackers import Listener, Wire, grow_old
from tests.e2e.operation_world import FAMILIES, NODES, app, block, pod, policy
from trireme_lab import HostSpec, Lab, LabSpec, ServicePort, ServiceSpec
from trireme_lab.netns import exec_prefix, netns_path, run, write_sysctls
from trireme_lab.network import POD_BRIDGE
from trireme_lab.spec import SERVICE_NETWORKS

CAGED, FREE, NEAR, FAR, ISOLATED, FAR_ISOLATED = (
    "x/caged",
    "x/free",
    "x/near",
    "x/far",
    "x/isolated",
    "x/far-isolated",
)
PARTLY = "x/partly"
"""May send to the outside host, to ALLOWED_PORTS alone."""
LABELLED = "x/labeled"
"""May send to pods of one label, of which there are none: its enforcer shows its identity to find that out."""
ALLOWED_PORTS = {6: 8080, 17: 5353}
"""By protocol."""
OUTSIDE, EXTERNAL, NEIGHBOR = "host:outside", "host:external", "host:neighbor"
FABRIC = "fabric"
NODE_PORT, HOST_NODE_PORT, SHUT_NODE_PORT, KUBELET, API_SERVER = 30_080, 30_090, 30_070, 10_250, 6_443
LOCAL_DNS = (ip_address("169.254.20.10"), ip_address("fd00:169:254::10"))
DNS_SERVICE = (ip_address("10.96.0.53"), ip_address("fd00:10:96::53"))
WEB_SERVICE = (ip_address("10.96.0.10"), ip_address("fd00:10:96::10"))
API_SERVICE = (ip_address("10.96.0.1"), ip_address("fd00:10:96::1"))
HOST_SERVICE = (ip_address("10.96.0.90"), ip_address("fd00:10:96::90"))
SHUT_SERVICE = (ip_address("10.96.0.70"), ip_address("fd00:10:96::70"))
"""Leads to the pods whose ingress nothing is allowed."""
OUTSIDE_SERVICE = (ip_address("10.96.0.20"), ip_address("fd00:10:96::20"))
GROUPS = (ip_address("224.0.0.251"), ip_address("239.1.2.3"), ip_address("ff02::fb"), ip_address("ff05::1:3"))
"""Multicast groups that every place has joined."""
LINK_GROUPS = (ip_address("ff02::1"), ip_address("ff02::fb"))
_OUTSIDE = HostSpec("outside", (ip_address("203.0.113.7"), ip_address("2001:db8::7")))
_EXTERNAL = HostSpec("external", (ip_address("198.51.100.50"), ip_address("2001:db8:bad::50")))
_WEB = ServiceSpec(
    "x", "web", WEB_SERVICE, (PodRef("x", "near"), PodRef("x", "far")), (ServicePort(80, 8080, node_port=NODE_PORT),)
)
_RATES = {"synRateLimitPerSource": 400_000}
"""So that no packet of a sweep is dropped for being one of many."""
_VIRTUAL = [
    *map(str, SERVICE_NETWORKS),
    *(f"{address}/{address.max_prefixlen}" for node in NODES for address in node.addresses),
    *(f"{address}/{address.max_prefixlen}" for address in _EXTERNAL.addresses),
]
"""What an operator may have allowed at most: node ports, and an address that a Service lists as external."""
_CLUSTERS = (ip_network("10.244.0.0/16"), ip_network("fd00:10:244::/48"))
_BRIDGE_SETTINGS = tuple(f"net/bridge/bridge-nf-call-{tool}" for tool in ("iptables", "ip6tables"))


@dataclass(frozen=True, slots=True)
class Variant:
    """How the nodes of the world are set up."""

    proxy: str = "iptables"
    """Form of kube-proxy's rules: iptables, nft, or ipvs where the kernel has it."""
    is_bridge_filtered: bool = True
    """Whether bridged packets pass the node's rules (bridge-nf-call-iptables)."""

    def __str__(self) -> str:
        return f"{self.proxy}-{'filtered' if self.is_bridge_filtered else 'unfiltered'}-bridge"


def world_spec(rules_backend: str = "auto") -> LabSpec:
    """Return the world, with the given backend of the pods' rules."""
    return LabSpec(
        NODES,
        {"x": {}},
        pods=(
            pod("caged", "a"),
            pod("partly", "a"),
            pod("labeled", "a"),
            pod("free", "a"),
            pod("near", "a"),
            pod("isolated", "a"),
            pod("far", "b"),
            pod("far-isolated", "b"),
        ),
        hosts=(_OUTSIDE, _EXTERNAL, HostSpec("neighbor", node="a")),
        services=(_WEB,),
        manifests=(
            policy("caged", "caged", egress=[]),
            policy(
                "partly",
                "partly",
                egress=[
                    {
                        "to": block("203.0.113.7/32", "2001:db8::7/128"),
                        "ports": [
                            {"protocol": Protocol(number).name, "port": port} for number, port in ALLOWED_PORTS.items()
                        ],
                    }
                ],
            ),
            policy("labeled", "labeled", egress=[{"to": [app("nowhere")]}]),
            policy("isolated", "isolated", ingress=[]),
            policy("far-isolated", "far-isolated", ingress=[]),
        ),
        settings={"networks": {"virtual": _VIRTUAL}, "dataplane": {**_RATES, "rulesBackend": rules_backend}},
    )


@dataclass(slots=True)
class AttackWorld:
    """The running lab, and what an attacker has learned in it."""

    lab: Lab
    own_blocks: dict[str, bytes] = field(default_factory=dict)
    """Identity block of each attacking pod, as it answers any connection to it."""
    copied_block: bytes = b""
    """Identity block of the free pod, as it shows it to whom it dials."""
    macs: dict[str, bytes] = field(default_factory=dict)

    def address(self, place: str, version: int) -> IPAddress:
        return self.lab.place(place).address(version)

    def netns(self, place: str) -> str:
        return f"{self.lab.name}-fabric" if place == FABRIC else self.lab.place(place).netns

    def link_local(self, place: str, ifname: str = "eth0") -> IPv6Address:
        """Return an interface's link-local address."""
        found = [address for address in _interface(self, place, ifname).addresses if address.is_link_local]
        return next(address for address in found if isinstance(address, IPv6Address))


def mac_of(world: AttackWorld, place: str, ifname: str = "eth0") -> bytes:
    """Return an interface's MAC."""
    return _interface(world, place, ifname).mac


def _interface(world: AttackWorld, place: str, ifname: str) -> Interface:
    descriptor = os.open(netns_path(world.netns(place)), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return interface(descriptor, ifname)
    finally:
        os.close(descriptor)


def forget_neighbors(world: AttackWorld) -> None:
    """Have the places of node a's bridge ask anew where an address is."""
    for place in ("node:a", CAGED, FREE, NEAR, ISOLATED, NEIGHBOR):
        for family in ("-4", "-6"):
            run([*exec_prefix(world.netns(place)), "ip", family, "neigh", "flush", "all"])


def prepare(lab: Lab) -> AttackWorld:
    """Make the lab the attackers' world: listeners, tolerant paths, blocks that an attacker has seen."""
    world = AttackWorld(lab)
    for node in ("node:a", "node:b"):
        lab.run(node, "nft", "delete table inet lab")  # its Services; and it drops what conntrack calls invalid
        for address in (*LOCAL_DNS, *DNS_SERVICE):
            if address == LOCAL_DNS[0]:
                lab.run(node, "ip", "link", "add", "nodelocaldns", "type", "bridge")
                lab.run(node, "ip", "link", "set", "nodelocaldns", "up")
            extra = ("nodad",) if address.version == 6 else ()
            cidr = f"{address}/{address.max_prefixlen}"
            lab.run(node, "ip", "address", "add", cidr, "dev", "nodelocaldns", *extra)
        write_sysctls(lab.place(node).netns, {"net/ipv4/conf/all/route_localnet": "1"})
    for place in (CAGED, PARTLY, LABELLED, FREE, NEAR, ISOLATED, NEIGHBOR, FAR, FAR_ISOLATED):
        world.macs[place] = mac_of(world, place)
    world.macs["node:a"] = mac_of(world, "node:a", POD_BRIDGE)
    for pod_name in (CAGED, PARTLY, LABELLED):
        _learn_blocks(world, pod_name)
    grow_old(lab)
    return world


def _learn_blocks(world: AttackWorld, pod: str) -> None:
    """Watch one connection to a pod: both sides show their identity in it."""
    lab = world.lab
    with Wire(lab, pod) as wire, Listener(lab, pod, 8_090) as listener, lab.open_socket(FREE) as client:
        client.settimeout(5)
        client.connect((str(listener.ip), listener.port))
        listener.accept()
        syn = wire.await_segment(lambda found: found.flags == SYN and is_frame(found.payload))
        answer = wire.await_segment(lambda found: found.flags & SYN_ACK == SYN_ACK and is_frame(found.payload))
        world.own_blocks[FREE] = world.copied_block = syn.payload[SYN_OVERHEAD:]
        world.own_blocks[pod] = answer.payload[SYN_ACK_OVERHEAD:]


def fronts(world: AttackWorld) -> list[Front]:
    """Return the Services of the world: backends on pods, on nodes, and outside."""

    def at(port: int, *places: str) -> tuple[tuple[IPAddress, int], ...]:
        return tuple((world.address(place, version), port) for version in (4, 6) for place in places)

    external = _EXTERNAL.addresses
    return [
        Front("web", WEB_SERVICE, 80, at(8080, NEAR, FAR), node_port=NODE_PORT, external=external),
        Front("api", API_SERVICE, 443, at(API_SERVER, "node:a", "node:b")),
        Front("out", OUTSIDE_SERVICE, 80, at(8080, OUTSIDE)),
        Front("hostnet", HOST_SERVICE, 90, at(KUBELET, "node:b"), HOST_NODE_PORT),
        Front("shut", SHUT_SERVICE, 80, at(8080, ISOLATED, FAR_ISOLATED), SHUT_NODE_PORT),
        Front("dns", DNS_SERVICE, 53, at(5353, NEAR, FAR)),
    ]


@contextmanager
def applied(world: AttackWorld, variant: Variant) -> Iterator[None]:
    """Set the nodes up as the variant says for the time of the block."""
    bridged = {name: str(int(variant.is_bridge_filtered)) for name in _BRIDGE_SETTINGS}
    with ExitStack() as stack:
        for node in ("node:a", "node:b"):
            netns = world.netns(node)
            write_sysctls(netns, bridged)
            stack.callback(write_sysctls, netns, dict.fromkeys(_BRIDGE_SETTINGS, "1"))
            stack.callback(_forget_flows, world, node)
            if variant.proxy != "ipvs":
                _apply_proxy(stack, world, netns, variant.proxy)
            _forget_flows(world, node)
        if variant.proxy == "ipvs":
            stack.enter_context(ipvs_services(world.lab, fronts(world), _CLUSTERS))
        yield


def _apply_proxy(stack: ExitStack, world: AttackWorld, netns: str, proxy: str) -> None:
    text = iptables_text if proxy == "iptables" else nft_text
    for version in (4, 6):
        rendered = text(fronts(world), [*LOCAL_DNS, *DNS_SERVICE], version)
        stack.callback(_remove_proxy, netns, proxy, version)
        run([*exec_prefix(netns), *_loader(proxy, version)], rendered)


def _loader(proxy: str, version: int) -> list[str]:
    if proxy == "nft":
        return ["nft", "-f", "-"]
    return ["iptables-restore" if version == 4 else "ip6tables-restore"]


def _remove_proxy(netns: str, proxy: str, version: int) -> None:
    if proxy == "nft":
        run([*exec_prefix(netns), "nft", "-f", "-"], removal(version))
        return
    empty = "\n".join(f"*{table}\nCOMMIT" for table in ("raw", "nat")) + "\n"
    run([*exec_prefix(netns), *_loader(proxy, version)], empty)


def _forget_flows(world: AttackWorld, node: str) -> None:
    for family in ("ipv4", "ipv6"):
        run([*exec_prefix(world.netns(node)), "sh", "-c", f"conntrack -F -f {family} 2>&1 || true"])


@contextmanager
def witnesses(world: AttackWorld, tag: bytes, *places: str) -> Iterator[Mapping[str, Witness]]:
    """Have witnesses at the places: on the link too where nothing is enforced; all have joined the groups."""
    with ExitStack() as stack:
        found = {}
        for place in places:
            link = POD_BRIDGE if place.startswith("node:") else "port0" if place == FABRIC else "eth0"
            counts = is_any if place.startswith("host:") else is_link_level
            found[place] = stack.enter_context(listening(world.netns(place), place, tag, link=link, counts=counts))
            _join_groups(stack, world, place, link)
        yield found


def _join_groups(stack: ExitStack, world: AttackWorld, place: str, link: str) -> None:
    for version, family in FAMILIES.items():
        if place == FABRIC:
            continue
        sock = stack.enter_context(world.lab.open_socket(place, family, socket.SOCK_DGRAM))
        index = int(run([*exec_prefix(world.netns(place)), "cat", f"/sys/class/net/{link}/ifindex"]))
        for group in GROUPS:
            if group.version != version:
                continue
            if version == 4:
                request = group.packed + bytes(4) + index.to_bytes(4, "little")
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
            else:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group.packed + index.to_bytes(4, "little"))
