# SPDX-License-Identifier: Apache-2.0
"""What takes a pod's interface from its IP stack, as the kernel lists links."""

from __future__ import annotations

import struct

import pytest

from enforcer_daemon.dataplane.netlink import encode_attribute, encode_nested
from enforcer_daemon.dataplane.rtnetlink import Interface
from enforcer_daemon.dataplane.takeover import decode_departures, find_takeover, render_bridge_table


def link(name: str, index: int, kind: str = "", *, peer: int = 0, master: int = 0) -> Interface:
    return Interface(name, index, 1_500, (), kind=kind, peer=peer, master=master)


LO, ETH0 = link("lo", 1), link("eth0", 2, "veth", peer=9)


@pytest.mark.parametrize(
    ("links", "found"),
    [
        ([LO, ETH0], ""),
        ([LO, ETH0, link("docker0", 3, "bridge"), link("veth1", 4, "veth", peer=5, master=3)], ""),
        ([LO, link("eth0", 2, "veth", master=3), link("k6t-eth0", 3, "bridge")], "eth0 is a port of bridge k6t-eth0"),
        ([LO, link("eth0", 2, "veth", master=3), link("bond0", 3, "bond")], "eth0 is a port of bond bond0"),
        ([LO, link("eth0", 2, "veth", master=3), link("red", 3, "vrf")], ""),
        ([LO, link("eth0", 2, "veth", master=3)], "eth0 is a port of another interface"),
        ([LO, ETH0, link("mac0", 3, "macvlan", peer=2)], "macvlan mac0 is on top of eth0"),
        ([LO, ETH0, link("tap0", 3, "macvtap", peer=2)], "macvtap tap0 is on top of eth0"),
        ([LO, ETH0, link("ip0", 3, "ipvlan", peer=2)], "ipvlan ip0 is on top of eth0"),
        ([LO, ETH0, link("mac0", 3, "macvlan", peer=1)], ""),
        ([LO, ETH0, link("eth0.7", 3, "vlan", peer=2)], ""),
        ([LO, link("net0", 2, "veth", peer=9)], "eth0 was moved out of the pod's network namespace, or renamed"),
    ],
)
def test_what_takes_an_interface_is_named(links: list[Interface], found: str) -> None:
    assert find_takeover(links, ("eth0",)) == found


def test_each_registered_interface_counts() -> None:
    links = [LO, ETH0, link("net1", 3, master=4), link("br0", 4, "bridge")]
    assert find_takeover(links, ("eth0", "net1")) == "net1 is a port of bridge br0"
    assert find_takeover(links, ("eth0",)) == ""


def test_bridges_are_shut_both_ways_for_all_interfaces() -> None:
    text = render_bridge_table(("eth0", "net1"))
    assert 'iifname { "eth0", "net1" } counter drop' in text
    assert 'oifname { "eth0", "net1" } counter drop' in text


def message(kind: int, ifname: str, driver: str, *, is_moved: bool) -> bytes:
    attributes = encode_attribute(3, ifname.encode() + b"\0") + encode_nested(
        18, encode_attribute(1, driver.encode() + b"\0")
    )
    if is_moved:
        attributes += encode_attribute(45, (-1).to_bytes(4, "little", signed=True))
    body = bytes(16) + attributes
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


@pytest.mark.parametrize(
    ("kind", "driver", "is_moved", "found"),
    [
        (17, "macvlan", True, ["macvlan mac0"]),
        (17, "ipvtap", True, ["ipvtap mac0"]),
        (17, "macvlan", False, []),
        (16, "macvlan", True, []),
        (17, "veth", True, []),
    ],
)
def test_what_leaves_for_another_namespace_is_noticed(kind: int, driver: str, is_moved: bool, found: list[str]) -> None:
    assert decode_departures(message(kind, "mac0", driver, is_moved=is_moved)) == found
