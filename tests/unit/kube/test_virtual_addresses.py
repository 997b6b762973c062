# SPDX-License-Identifier: Apache-2.0
"""Which addresses Services earn, what a change of one costs, and what no Service can do."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any

import pytest

from enforcer_daemon.datapath.networks import Destination, Networks
from enforcer_daemon.kube.ignored import IgnoredAddresses
from enforcer_daemon.kube.networks import MAX_NAMESPACE_PORTS, MAX_PORTS, VirtualAddresses
from enforcer_daemon.kube.resources import NodeNetworks, ServiceAddresses
from enforcer_daemon.model import IPAddress, Protocol
from enforcer_daemon.prefixes import PrefixSet
from enforcer_daemon.settings import NetworkSettings
from enforcer_daemon.virtual import NOTHING_VIRTUAL, NodePort, ServicePort, VirtualChange, VirtualEntries

WEB = ("shop", "web")
PODS = (ip_network("10.1.0.0/16"), ip_network("fd01::/64"))
NODES = [
    NodeNetworks("a", (), (ip_address("192.0.2.1"), ip_address("2001:db8:1::1"))),
    NodeNetworks("b", (), (ip_address("192.0.2.2"),)),
]
ALLOWED = NetworkSettings(enforced=PODS, external_ip_networks=(ip_network("0.0.0.0/0"), ip_network("::/0")))
SPECIAL = [
    "0.0.0.0/0".partition("/")[0],
    "127.0.0.1",
    "169.254.1.1",
    "224.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "ff02::1",
]


def book(settings: NetworkSettings = ALLOWED) -> VirtualAddresses:
    virtual = VirtualAddresses(settings)
    virtual.set_networks(settings, NODES)
    virtual.take_change()
    return virtual


def addresses(*texts: str) -> tuple[IPAddress, ...]:
    return tuple(map(ip_address, texts))


def packed(*texts: str) -> frozenset[bytes]:
    return frozenset(ip_address(text).packed for text in texts)


def stated(
    external: tuple[IPAddress, ...] = (),
    balancers: tuple[IPAddress, ...] = (),
    node_ports: tuple[NodePort, ...] = (),
    ports: tuple[NodePort, ...] = ((Protocol.TCP, 80),),
) -> ServiceAddresses:
    return ServiceAddresses(external, balancers, node_ports, ports)


def on_80(*texts: str) -> frozenset[ServicePort]:
    return frozenset((address, Protocol.TCP, 80) for address in packed(*texts))


def test_external_addresses_are_believed_nowhere_by_default_and_load_balancers_everywhere() -> None:
    virtual = book(NetworkSettings(enforced=PODS))
    virtual.put(WEB, stated(addresses("203.0.113.1", "2001:db8::1"), addresses("198.51.100.7", "2001:db8::7")))
    assert virtual.take_change().added.services == on_80("198.51.100.7", "2001:db8::7")
    told = "Service shop/web: 203.0.113.1, 2001:db8::1 are not virtual: outside networks.externalIpNetworks"
    assert virtual.refusals(10) == [told]


def test_both_are_believed_as_far_as_the_operator_allows() -> None:
    settings = NetworkSettings(
        enforced=PODS,
        load_balancer_networks=(ip_network("198.51.100.0/25"),),
        external_ip_networks=(ip_network("203.0.113.0/24"), ip_network("2001:db8:e::/48")),
    )
    virtual = book(settings)
    external = addresses("203.0.113.1", "198.51.100.1", "2001:db8:e::1", "2001:db8:f::1")
    virtual.put(WEB, stated(external, addresses("198.51.100.7", "198.51.100.200", "203.0.113.2")))
    assert virtual.take_change().added.services == on_80("203.0.113.1", "2001:db8:e::1", "198.51.100.7")


@pytest.mark.parametrize("listed", ["10.1.0.9", "fd01::9", "192.0.2.1", "192.0.2.2", "2001:db8:1::1", *SPECIAL])
def test_no_service_earns_a_pods_a_nodes_or_a_special_address(listed: str) -> None:
    virtual = book()
    virtual.put(WEB, stated(addresses(listed), addresses(listed)))
    assert virtual.take_change().is_empty
    assert len(virtual.refusals(10)) == 1


def test_an_address_that_a_node_or_its_pods_get_later_is_lost_and_comes_back() -> None:
    virtual = book()
    virtual.put(WEB, stated(addresses("203.0.113.1", "203.0.113.9")))
    virtual.take_change()
    more = [*NODES, NodeNetworks("c", (), addresses("203.0.113.1"))]
    virtual.set_networks(NetworkSettings(enforced=(*PODS, ip_network("203.0.113.8/29"))), more)
    change = virtual.take_change()
    assert (change.added.services, change.added.nodes) == (frozenset(), packed("203.0.113.1"))
    assert change.removed.services == on_80("203.0.113.1", "203.0.113.9")
    virtual.set_networks(ALLOWED, NODES)
    assert virtual.take_change().added.services == on_80("203.0.113.1", "203.0.113.9")


def test_an_address_of_two_services_stays_until_both_are_gone() -> None:
    virtual = book()
    ports = ((Protocol.TCP, 30080),)
    for name in ("web", "other"):
        virtual.put(("shop", name), stated(addresses("203.0.113.1"), (), ports))
    added = VirtualEntries(on_80("203.0.113.1"), frozenset(), frozenset(ports))
    assert virtual.take_change() == VirtualChange(added)
    virtual.put(WEB, None)
    assert virtual.take_change().is_empty
    virtual.put(("shop", "other"), ServiceAddresses())
    assert virtual.take_change() == VirtualChange(removed=added)


def test_what_comes_and_goes_between_two_looks_is_no_change() -> None:
    virtual = book()
    virtual.put(WEB, stated(addresses("203.0.113.1")))
    virtual.put(WEB, None)
    assert virtual.take_change().is_empty
    virtual.put(WEB, stated(addresses("203.0.113.1")))
    virtual.take_change()
    virtual.put(WEB, stated(addresses("203.0.113.2")))
    virtual.put(WEB, stated(addresses("203.0.113.1")))
    assert virtual.take_change().is_empty


def many(first: int, count: int) -> tuple[IPAddress, ...]:
    return tuple(IPv4Address(int(IPv4Address("203.0.0.0")) + first + number) for number in range(count))


def test_a_namespace_has_no_more_than_its_share() -> None:
    virtual = book()
    for number in range(MAX_NAMESPACE_PORTS // 256 + 1):
        virtual.put(("shop", f"s{number}"), stated(many(number * 256, 256)))
    assert len(virtual) == MAX_NAMESPACE_PORTS
    assert "its namespace has 1024 virtual ports of addresses already" in virtual.refusals(1)[0]
    virtual.put(("other", "web"), stated(addresses("198.51.100.1")))
    assert len(virtual) == MAX_NAMESPACE_PORTS + 1


def test_addresses_times_ports_are_no_more_than_the_share() -> None:
    virtual = book()
    ports = tuple((Protocol.TCP, 1 + number) for number in range(1_000))
    virtual.put(WEB, stated(many(0, 64), ports=ports))
    assert len(virtual) == MAX_NAMESPACE_PORTS
    assert len(virtual.take_change().added.services) == MAX_NAMESPACE_PORTS
    everywhere = NetworkSettings(enforced=(ip_network("203.0.0.0/16"),))
    virtual.set_networks(everywhere, NODES)
    assert len(virtual) == 0
    assert virtual.refusals(1) == [
        (
            "Service shop/web: not all is virtual: its namespace has 1024 virtual ports of addresses already; "
            "203.0.0.0, 203.0.0.1 are not virtual: inside the pods' networks"
        )
    ]
    virtual.set_networks(ALLOWED, NODES)
    assert len(virtual) == MAX_NAMESPACE_PORTS
    virtual.put(WEB, None)
    assert len(virtual) == 0


def test_the_cluster_has_no_more_than_fit() -> None:
    virtual = book()
    for number in range(MAX_PORTS // 256 + 1):
        virtual.put((f"n{number // 4}", f"s{number}"), stated(many(number * 256, 256)))
    assert len(virtual) == MAX_PORTS
    assert "the cluster has 16384 virtual ports of addresses already" in virtual.refusals(1)[0]


def test_a_change_of_one_service_looks_at_its_own_addresses_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One namespace's updates, however often, cost the loop what they state."""
    virtual = book()
    for number in range(50):
        virtual.put((f"n{number}", "s"), stated(many(number * 256, 256)))
    virtual.take_change()
    looked_at: list[bytes] = []
    blocked = VirtualAddresses._blocked

    def count(addresses: VirtualAddresses, address: bytes) -> str:
        looked_at.append(address)
        return blocked(addresses, address)

    monkeypatch.setattr(VirtualAddresses, "_blocked", count)
    virtual.put(("n0", "s"), stated(many(256_000, 3)))
    assert len(looked_at) == 3
    change = virtual.take_change()
    assert (len(change.added.services), len(change.removed.services)) == (3, 256)


def test_what_is_ignored_is_told_for_each_service_until_it_is_resolved() -> None:
    virtual = book(NetworkSettings(enforced=PODS, external_ip_networks=(ip_network("198.51.100.0/24"),)))
    virtual.put(WEB, stated(addresses("203.0.113.1", "203.0.113.2", "10.1.0.9", "198.51.100.1")))
    virtual.put(("farm", "db"), stated(addresses("203.0.113.1")))
    why = "outside networks.externalIpNetworks"
    assert virtual.refusals(10) == [
        f"Service shop/web: 203.0.113.1, 203.0.113.2, 10.1.0.9 are not virtual: {why}",
        f"Service farm/db: 203.0.113.1 is not virtual: {why}",
    ]
    virtual.put(WEB, stated(addresses("198.51.100.1")))
    assert virtual.refusals(10) == [f"Service farm/db: 203.0.113.1 is not virtual: {why}"]
    virtual.set_networks(NetworkSettings(enforced=PODS), [*NODES, NodeNetworks("c", (), addresses("198.51.100.1"))])
    assert virtual.refusals(10)[1] == "Service shop/web: 198.51.100.1 is not virtual: a node's own address"
    virtual.set_networks(NetworkSettings(enforced=PODS), NODES)
    virtual.put(("farm", "db"), None)
    assert virtual.refusals(10) == []


def test_an_address_that_one_of_both_lists_earns_is_not_called_ignored() -> None:
    virtual = book(NetworkSettings(enforced=PODS))
    virtual.put(WEB, stated(addresses("203.0.113.1"), addresses("203.0.113.1")))
    assert virtual.take_change().added.services == on_80("203.0.113.1")
    assert virtual.refusals(10) == []


def test_long_lists_of_addresses_are_cut() -> None:
    virtual = book(NetworkSettings(enforced=PODS))
    virtual.put(WEB, stated(many(0, 64)))
    (told,) = virtual.refusals(10)
    assert "203.0.0.0, 203.0.0.1, 203.0.0.2, 203.0.0.3 and 60 more are not virtual: outside" in told


def test_no_namespace_hides_what_another_is_told() -> None:
    virtual = book(NetworkSettings(enforced=PODS))
    for number in range(500):
        virtual.put(("greedy", f"s{number}"), stated(addresses("203.0.113.1")))
    virtual.put(("shy", "web"), stated(addresses("203.0.113.1")))
    told = virtual.refusals(10)
    assert len(told) == 11
    assert told[1].startswith("Service shy/web: ")
    assert told[10] == "491 more Services with addresses that are not virtual"


def test_services_that_share_an_address_cost_a_change_of_nodes_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand Services with a port each of one address: told once for each, not for each port."""
    virtual = book()
    for number in range(MAX_NAMESPACE_PORTS):
        virtual.put(("shop", f"s{number}"), stated(addresses("203.0.113.1"), ports=((Protocol.TCP, 1 + number),)))
    noted: list[object] = []
    put = IgnoredAddresses.put

    def note(self: IgnoredAddresses, *what: Any) -> None:
        noted.append(what)
        put(self, *what)

    monkeypatch.setattr(IgnoredAddresses, "put", note)
    virtual.set_networks(ALLOWED, [*NODES, NodeNetworks("c", (), addresses("203.0.113.1"))])
    assert len(noted) == MAX_NAMESPACE_PORTS
    assert len(virtual.take_change().added.services) == 0


# What the datapath makes of it.


def destination(networks: Networks, text: str, port: int = 80, protocol: Protocol = Protocol.TCP) -> Destination:
    return networks.destination(ip_address(text).packed, port, protocol)


def test_a_nodes_address_is_virtual_on_node_ports_in_use_alone() -> None:
    networks = Networks(NetworkSettings(enforced=PODS))
    ports = frozenset({(Protocol.TCP, 30080), (Protocol.UDP, 30053)})
    networks.change_virtual(VirtualChange(VirtualEntries(nodes=packed("192.0.2.1"), ports=ports)))
    assert destination(networks, "192.0.2.1", 30080) is Destination.VIRTUAL
    assert destination(networks, "192.0.2.1", 30053, Protocol.UDP) is Destination.VIRTUAL
    for port, protocol in ((30053, Protocol.TCP), (30080, Protocol.UDP), (10250, Protocol.TCP), (22, Protocol.TCP)):
        assert destination(networks, "192.0.2.1", port, protocol) is Destination.EXTERNAL
    assert destination(networks, "192.0.2.9", 30080) is Destination.EXTERNAL
    networks.change_virtual(VirtualChange(removed=VirtualEntries(ports=ports)))
    assert destination(networks, "192.0.2.1", 30080) is Destination.EXTERNAL


def test_a_listed_address_of_a_pod_stays_a_pods_and_must_show_its_identity() -> None:
    networks = Networks(NetworkSettings(enforced=PODS, require_identity=True))
    networks.change_virtual(VirtualChange(VirtualEntries(on_80("10.1.0.9", "203.0.113.1"), packed("10.1.0.8"))))
    assert destination(networks, "10.1.0.9") is Destination.ENFORCED
    assert destination(networks, "203.0.113.1") is Destination.VIRTUAL
    for port, protocol in ((81, Protocol.TCP), (80, Protocol.UDP)):  # Nobody translates these.
        assert destination(networks, "203.0.113.1", port, protocol) is Destination.EXTERNAL
    for pod in ("10.1.0.8", "10.1.0.9"):
        assert networks.must_show_identity(ip_address(pod).packed)
    assert not networks.must_show_identity(ip_address("203.0.113.1").packed)


def test_a_change_of_services_classes_no_other_address_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who changes a Service once a second and sends to 20,000 addresses makes nobody else's connects slower."""
    asked: list[bytes] = []
    contains = PrefixSet.__contains__

    def count(prefixes: PrefixSet, address: bytes) -> bool:
        asked.append(address)
        return contains(prefixes, address)

    monkeypatch.setattr(PrefixSet, "__contains__", count)
    networks = Networks(NetworkSettings(enforced=PODS, virtual=(IPv4Network("10.96.0.0/12"),)))
    ours = [address.packed for address in many(0, 1_000)]
    for address in ours:
        networks.destination(address, 80)
    asked.clear()
    for number in range(20):
        added = VirtualEntries(on_80(*map(str, many(100_000 + 256 * number, 256))))
        networks.change_virtual(VirtualChange(added))
        for address in ours:
            networks.destination(address, 80)
    assert asked == []


def test_a_look_up_costs_a_step_for_each_prefix_length_and_not_for_each_network() -> None:
    singles = [IPv4Network((int(address), 32)) for address in many(0, 20_000)]
    networks = PrefixSet([*singles, IPv4Network("10.0.0.0/8"), IPv6Network("fd00::/8"), IPv6Network("fd01::/64")])
    assert networks.steps(packed_one("203.0.0.9")) == networks.steps(packed_one("fd00::1")) == 2
    for inside in ("203.0.0.9", "10.255.0.1", "fd00::1"):
        assert packed_one(inside) in networks
    for outside in ("204.0.0.1", "11.0.0.1", "fe00::1"):
        assert packed_one(outside) not in networks
    assert packed_one("10.0.0.1") not in PrefixSet()


def packed_one(text: str) -> bytes:
    return ip_address(text).packed


def test_a_change_beyond_what_is_known() -> None:
    known = VirtualEntries(on_80("203.0.113.1"), packed("192.0.2.1"), frozenset({(Protocol.TCP, 30080)}))
    change = VirtualChange(known, VirtualEntries(on_80("203.0.113.2")))
    assert change.beyond(known).is_empty
    assert change.beyond(NOTHING_VIRTUAL) == VirtualChange(known)
    assert change.applied_to(VirtualEntries(on_80("203.0.113.2"))) == known
