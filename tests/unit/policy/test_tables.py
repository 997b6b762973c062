# SPDX-License-Identifier: Apache-2.0
"""The look-up tables against a plain search, and their size against what was put in."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from enforcer_daemon.model import Protocol
from enforcer_daemon.policy.objects import IPBlock, PortName, PortRange
from enforcer_daemon.policy.tables import AddressSet, PortSet, PortTable

_NUMBERS = st.one_of(st.integers(0, 65_535), st.sampled_from([0, 1, 2, 3, 32_767, 32_768, 65_534, 65_535]))
_RANGES = st.tuples(_NUMBERS, _NUMBERS).map(lambda ends: PortRange(Protocol.TCP, min(ends), max(ends)))
_PORTS = st.lists(_RANGES | st.sampled_from("ab").map(lambda name: PortName(Protocol.TCP, name)), max_size=4)


@given(st.lists(_PORTS, max_size=12), _NUMBERS, st.lists(st.sampled_from("abc"), max_size=2))
def test_a_port_is_found_in_exactly_the_rules_that_hold_it(
    rules: list[list[PortRange | PortName]], port: int, names: list[str]
) -> None:
    table, sets = PortTable(), [PortSet(ports) for ports in rules]
    for number, ports in enumerate(sets):
        table.add(ports, number)

    expected = {
        number
        for number, ports in enumerate(rules)
        if not ports or any(p.name in names if isinstance(p, PortName) else p.first <= port <= p.last for p in ports)
    }
    assert set().union(*table.find(Protocol.TCP, port, names)) == expected
    assert {number for number, ports in enumerate(sets) if ports.holds(Protocol.TCP, port, names)} == expected
    possible = {n for n, ports in enumerate(rules) if any(isinstance(p, PortName) for p in ports)}
    possible |= set().union(*table.find(Protocol.TCP, port, ()))
    assert set().union(*table.possible(Protocol.TCP, port)) == possible
    assert set().union(*table.possible(Protocol.TCP, None)) == set(range(len(rules)))
    assert set().union(*table.find(Protocol.UDP, port, ())) == {n for n, ports in enumerate(rules) if not ports}


_SMALL = st.tuples(st.integers(0, 255), st.integers(24, 32)).map(lambda parts: IPv4Network(parts, strict=False))
_BLOCKS = st.tuples(_SMALL, st.lists(_SMALL, max_size=4)).map(
    lambda parts: IPBlock(parts[0], tuple(e for e in parts[1] if e != parts[0] and e.subnet_of(parts[0])))
)


@given(st.lists(_BLOCKS, max_size=6))
def test_a_union_of_blocks_holds_what_some_block_holds(blocks: list[IPBlock]) -> None:
    union = AddressSet.of_blocks(4, blocks)
    for number in range(256):
        address = ip_address(number)
        expected = any(address in b.network and not any(address in e for e in b.excepts) for b in blocks)
        assert (address in union) == expected
    assert all(last + 1 < first for (_, last), (first, _) in zip(union.spans, union.spans[1:], strict=False))


def test_a_union_of_one_family_leaves_the_other_out() -> None:
    blocks = [IPBlock(ip_network("10.0.0.0/8")), IPBlock(ip_network("fd00::/8"))]
    assert ip_address("fd00::1") not in AddressSet.of_blocks(4, blocks)
    assert ip_address("fd00::1") in AddressSet.of_blocks(6, blocks)


def test_wide_ranges_are_kept_once_each() -> None:
    table = PortTable()
    for number in range(1_000):
        table.add(PortSet([PortRange(Protocol.TCP, 1 + number, 65_000 - number)]), number)

    spans = sum(len(node._by_first) for nodes in table._nodes.values() for node in nodes.values())

    assert spans == 1_000
