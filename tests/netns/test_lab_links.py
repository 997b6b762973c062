# SPDX-License-Identifier: Apache-2.0
"""The lab's namespaces, links, addresses and routes, as ip(8) shows them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest

from trireme_lab.errors import LabError
from trireme_lab.links import AddAddress, AddBridge, AddRoute, AddVeth, SetUp
from trireme_lab.netns import add_netns, delete_all, netns_path, run, set_up

pytestmark = pytest.mark.kernel

NAMES = tuple(f"trireme-links-{os.getpid()}-{end}" for end in ("a", "b"))


@pytest.fixture
def netns() -> Iterator[str]:
    """Yield a namespace with a link to a second one."""
    for name in NAMES:
        add_netns(name)
    try:
        set_up(NAMES[0], [AddVeth("port0", "eth0", netns_path(NAMES[1])), SetUp("port0")])
        set_up(NAMES[1], [SetUp("eth0")])
        yield NAMES[0]
    finally:
        delete_all(NAMES)


def shown(netns: str, *arguments: str) -> Any:
    return json.loads(run(["ip", "-n", netns, "-json", *arguments]))


def test_both_ends_of_a_pair_are_where_they_belong(netns: str) -> None:
    for name, link in zip(NAMES, ("port0", "eth0"), strict=True):
        (found,) = shown(name, "link", "show", "dev", link)
        assert "UP" in found["flags"]


def test_addresses_are_usable_at_once(netns: str) -> None:
    for text in ("169.254.0.1/32", "fe80::1/64"):
        set_up(netns, [AddAddress(ip_interface(text), "port0")])
    (link,) = shown(netns, "address", "show", "dev", "port0")
    found = {each["local"]: each for each in link["addr_info"]}
    assert found["169.254.0.1"]["prefixlen"] == 32
    assert found["fe80::1"]["prefixlen"] == 64
    assert "tentative" not in found["fe80::1"]


def test_routes_are_those_that_ip_makes(netns: str) -> None:
    link = "port0"
    addresses = [AddAddress(ip_interface(text), link) for text in ("10.9.0.1/32", "fd09::1/128")]
    for version, address, gateway, network, default in (
        ("-4", "10.9.0.1", "10.8.0.1", "10.7.0.0/24", "0.0.0.0/0"),
        ("-6", "fd09::1", "fe80::9", "fd07::/64", "::/0"),
    ):
        commands = (
            f"route add {network} via {gateway} dev {link} onlink",
            f"route add {'10.8.0.1/32' if version == '-4' else 'fd08::/64'} dev {link} src {address}",
            f"route add default via {gateway} dev {link}",
        )
        steps = [
            AddRoute(ip_network(network), link, ip_address(gateway), is_onlink=True),
            AddRoute(ip_network("10.8.0.1/32" if version == "-4" else "fd08::/64"), link, source=ip_address(address)),
            AddRoute(ip_network(default), link, ip_address(gateway)),
        ]
        set_up(netns, [each for each in addresses if str(each.address.ip) == address])
        for command in commands:
            run(["ip", "-n", netns, *command.split()])
        expected = shown(netns, version, "route")
        run(["ip", "-n", netns, version, "route", "flush", "proto", "boot"])
        set_up(netns, steps)
        assert shown(netns, version, "route") == expected


def test_a_step_that_the_kernel_refuses_is_named(netns: str) -> None:
    set_up(netns, [AddBridge("br0")])
    with pytest.raises(LabError, match=r"AddBridge\(link='br0'\): .*File exists"):
        set_up(netns, [AddBridge("br0")])
    with pytest.raises(LabError, match=r"SetUp\(link='none'\): .*No such device"):
        set_up(netns, [SetUp("none")])


def test_a_namespace_is_made_once_and_removed_whole(netns: str) -> None:
    with pytest.raises(LabError, match=f"network namespace {netns}: File exists"):
        add_netns(netns)
    delete_all(NAMES)
    assert not any(netns_path(name).exists() for name in NAMES)
    delete_all(NAMES)


def test_no_descriptor_is_left(netns: str) -> None:
    directory = Path("/proc/self/fd")
    set_up(netns, [AddBridge("br")])
    before = sorted(path.name for path in directory.iterdir())
    for number in range(20):
        set_up(netns, [AddBridge(f"br{number}"), SetUp(f"br{number}")])
    assert sorted(path.name for path in directory.iterdir()) == before
