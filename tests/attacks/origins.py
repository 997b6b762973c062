# SPDX-License-Identifier: Apache-2.0
"""Where attackers stand in the world, and every kind of address that they can send to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address

from enforcer_daemon.model import IPAddress
from tests.attacks import world as places
from tests.attacks.world import AttackWorld, mac_of
from trireme_lab.network import POD_BRIDGE

BROADCAST_MAC = b"\xff" * 6


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of destination: its address of each version, ports worth trying, MACs that lead there."""

    kind: str
    addresses: Mapping[int, IPAddress]
    ports: tuple[int, ...]
    macs: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an attacker sends from."""

    place: str
    link: str
    mac: bytes
    own: Mapping[int, IPAddress]
    spoofed: Mapping[int, Sequence[IPAddress]]
    """Addresses that are not its own, which it may state."""


def targets(world: AttackWorld, spare: Sequence[str] = ()) -> list[Target]:
    """Return every kind of destination that the world has, seen from a pod on node a, but the kinds in `spare`."""
    gateway = world.macs["node:a"]

    def at(place: str) -> dict[int, IPAddress]:
        return {version: world.address(place, version) for version in (4, 6)}

    def pair(addresses: Sequence[IPAddress]) -> dict[int, IPAddress]:
        return {address.version: address for address in addresses}

    def multicast_macs(four: IPv4Address) -> tuple[bytes, ...]:
        return b"\x01\x00\x5e" + bytes((four.packed[1] & 0x7F,)) + four.packed[2:], BROADCAST_MAC

    common = (8080, 5353, 53, 4789, 8472)
    near, neighbor = world.macs[places.NEAR], world.macs[places.NEIGHBOR]
    bridge_local = world.link_local("node:a", POD_BRIDGE)
    four = world.address(places.CAGED, 4)
    subnet = ip_address(int(four) | 0xFF)
    found = [
        Target("near-pod", at(places.NEAR), common, (near, gateway)),
        Target("far-pod", at(places.FAR), common, (gateway,)),
        Target("isolated-pod", at(places.ISOLATED), common, (world.macs[places.ISOLATED], gateway)),
        Target("neighbor", at(places.NEIGHBOR), common, (neighbor, gateway)),
        Target("outside", at(places.OUTSIDE), common, (gateway,)),
        Target("own-node", at("node:a"), (places.KUBELET, 22, places.API_SERVER, *common), (gateway,)),
        Target("other-node", at("node:b"), (places.KUBELET, 22, places.API_SERVER), (gateway,)),
        Target("node-port-own", at("node:a"), (places.NODE_PORT, places.HOST_NODE_PORT), (gateway,)),
        Target("node-port-other", at("node:b"), (places.NODE_PORT, places.HOST_NODE_PORT), (gateway,)),
        Target("service-pods", pair(places.WEB_SERVICE), (80,), (gateway,)),
        Target("service-nodes", pair(places.API_SERVICE), (443,), (gateway,)),
        Target("service-outside", pair(places.OUTSIDE_SERVICE), (80,), (gateway,)),
        Target("service-unknown-port", pair(places.WEB_SERVICE), (81, 10_250), (gateway,)),
        Target("external-ip", at(places.EXTERNAL), (80,), (gateway,)),
        Target("external-ip-unknown-port", at(places.EXTERNAL), (8080, 5353), (gateway,)),
        Target("dns-local", pair(places.LOCAL_DNS), (53, 9253), (gateway,)),
        Target("dns-service", pair(places.DNS_SERVICE), (53,), (gateway,)),
        Target("gateway", {4: ip_address(int(subnet) - 254), 6: bridge_local}, (places.KUBELET, 53), (gateway,)),
        Target("link-local", {6: world.link_local(places.NEAR)}, common, (near,)),
        Target("broadcast", {4: ip_address("255.255.255.255")}, common, (BROADCAST_MAC, near, gateway)),
        Target("subnet-broadcast", {4: subnet}, common, (BROADCAST_MAC, near, gateway)),
        Target("multicast", pair(places.GROUPS[::2]), common, multicast_macs(IPv4Address("224.0.0.251"))),
        Target("multicast-wide", pair(places.GROUPS[1::2]), common, multicast_macs(IPv4Address("239.1.2.3"))),
        Target("all-nodes", {4: ip_address("224.0.0.1"), 6: ip_address("ff02::1")}, common, (b"\x33\x33\0\0\0\1",)),
        Target("loopback", pair((ip_address("127.0.0.1"), ip_address("::1"))), (places.KUBELET, 53), (gateway, near)),
        Target("unspecified", pair((ip_address(0), ip_address("::"))), common, (gateway, near)),
    ]
    return [target for target in found if target.kind not in spare]


def pod_origin(world: AttackWorld, pod: str) -> Origin:
    """Return a pod, or a pod-like host, on node a as an attacker."""
    others = [place for place in (places.NEAR, places.FREE, places.ISOLATED, places.FAR) if place != pod]
    known = [world.address(place, version) for place in (*others, *_ROUND) for version in (4, 6)]
    local = (world.link_local(pod), world.link_local("node:a", POD_BRIDGE))
    stated = (*known, *local, *_ODD_SOURCES, *places.WEB_SERVICE, *places.LOCAL_DNS)
    four = world.address(pod, 4)
    gateway = ip_address(int(four) & ~0xFF | 1)
    return Origin(
        pod,
        "eth0",
        world.macs[pod],
        {version: world.address(pod, version) for version in (4, 6)},
        {version: [a for a in (*stated, gateway) if a.version == version] for version in (4, 6)},
    )


def outside_origin(world: AttackWorld) -> Origin:
    """Return a machine on node a's own segment: it may state any address, also those of the node and its pods."""
    stated = [world.address(place, version) for place in _EVERYBODY for version in (4, 6)]
    stated += [*_ODD_SOURCES, *places.WEB_SERVICE, *places.LOCAL_DNS, world.link_local("node:a", "eth0")]
    return Origin(
        places.FABRIC,
        "port0",
        mac_of(world, places.FABRIC, "port0"),
        {4: ip_address("169.254.0.1"), 6: ip_address("fe80::1")},
        {version: [address for address in stated if address.version == version] for version in (4, 6)},
    )


def shut_targets(world: AttackWorld, *, is_outside: bool) -> list[Target]:
    """Return every way to the pods whose ingress nothing is allowed, from node a's bridge or from outside of it."""
    gateway = mac_of(world, "node:a", "eth0") if is_outside else world.macs["node:a"]
    ports = (8080, 5353, 53)

    def at(place: str) -> dict[int, IPAddress]:
        return {version: world.address(place, version) for version in (4, 6)}

    def pair(addresses: Sequence[IPAddress]) -> dict[int, IPAddress]:
        return {address.version: address for address in addresses}

    found = [
        Target("isolated-pod", at(places.ISOLATED), ports, (gateway,)),
        Target("node-port-own", at("node:a"), (places.SHUT_NODE_PORT,), (gateway,)),
        Target("service-pods", pair(places.SHUT_SERVICE), (80,), (gateway,)),
    ]
    if is_outside:
        return found
    own = world.macs[places.ISOLATED]
    subnet = ip_address(int(world.address(places.ISOLATED, 4)) | 0xFF)
    multicast = (b"\x01\x00\x5e\0\0\xfb", BROADCAST_MAC, own)
    return [
        *found,
        Target("isolated-direct", at(places.ISOLATED), ports, (own, BROADCAST_MAC)),
        Target("far-isolated-pod", at(places.FAR_ISOLATED), ports, (gateway,)),
        Target("node-port-other", at("node:b"), (places.SHUT_NODE_PORT,), (gateway,)),
        Target("link-local", {6: world.link_local(places.ISOLATED)}, ports, (own, BROADCAST_MAC)),
        Target("broadcast", {4: ip_address("255.255.255.255")}, ports, (BROADCAST_MAC, own)),
        Target("subnet-broadcast", {4: subnet}, ports, (BROADCAST_MAC, own, gateway)),
        Target("multicast", pair(places.GROUPS[::2]), ports, multicast),
        Target("all-nodes", {4: ip_address("224.0.0.1"), 6: ip_address("ff02::1")}, ports, (BROADCAST_MAC, own)),
        Target("loopback", pair((ip_address("127.0.0.1"), ip_address("::1"))), ports, (own,)),
        Target("unspecified", pair((ip_address(0), ip_address("::"))), ports, (own,)),
    ]


_EVERYBODY = (
    *("node:a", "node:b", places.NEAR, places.FAR, places.FREE, places.ISOLATED, places.FAR_ISOLATED),
    *(places.OUTSIDE, places.NEIGHBOR),
)
_ROUND = ("node:a", "node:b", places.OUTSIDE, places.NEIGHBOR)
_ODD_SOURCES = (
    ip_address(0),
    *map(ip_address, ("127.0.0.1", "255.255.255.255", "224.0.0.1", "169.254.7.7")),
    *map(ip_address, ("::", "::1", "fe80::bad", "ff02::1")),
)
