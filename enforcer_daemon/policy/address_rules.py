# SPDX-License-Identifier: Apache-2.0
"""Rules by address alone, in the form that the kernel's rules are made of.

Blocks and ports stay two sets beside each other, and rules for the same addresses or the same ports become one: what is
rendered is as large as the policies are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from enforcer_daemon.model import IPAddress, IPNetwork, Protocol
from enforcer_daemon.policy.objects import LAST_PORT, IPBlock
from enforcer_daemon.policy.tables import AddressSet, PortSet, Span, merged

_ALL_PORTS = ((0, LAST_PORT),)


@dataclass(frozen=True, slots=True, init=False)
class AddressRule:
    """What is allowed whoever the peer is: addresses of one family, and ports of one protocol."""

    addresses: AddressSet | None
    """None: every address of both families."""
    protocol: Protocol | None
    """None: every protocol."""
    spans: tuple[Span, ...] | None
    """Destination ports; None: every port."""

    def __init__(
        self,
        network: IPNetwork | None = None,
        excepts: Iterable[IPNetwork] = (),
        protocol: Protocol | None = None,
        ports: Span | None = None,
    ) -> None:
        """Allow one network less its exceptions, and one span of ports; `of` takes sets."""
        block = None if network is None else IPBlock(network, tuple(excepts))
        addresses = None if block is None else AddressSet.of_blocks(block.network.version, (block,))
        self._fill(addresses, protocol, None if ports is None else (ports,))

    @classmethod
    def of(
        cls, addresses: AddressSet | None, protocol: Protocol | None = None, spans: tuple[Span, ...] | None = None
    ) -> AddressRule:
        """Allow these addresses on these ports."""
        rule = cls.__new__(cls)
        rule._fill(addresses, protocol, spans)
        return rule

    def _fill(self, addresses: AddressSet | None, protocol: Protocol | None, spans: tuple[Span, ...] | None) -> None:
        object.__setattr__(self, "addresses", addresses)
        object.__setattr__(self, "protocol", protocol)
        object.__setattr__(self, "spans", spans)

    def holds(self, address: IPAddress, port: int | None, protocol: Protocol | None) -> bool:
        """Return whether it allows a flow."""
        if self.addresses is not None and address not in self.addresses:
            return False
        if self.protocol is None:
            return True
        if port is None or protocol is not self.protocol:
            return False
        return self.spans is None or any(first <= port <= last for first, last in self.spans)


def rules_of(
    blocks: AddressSet | None, ports: PortSet, by_name: Mapping[tuple[Protocol, str], list[int]]
) -> Iterator[AddressRule]:
    """Yield what a policy rule allows its blocks of one family; `by_name` has the numbers of the pod's named ports."""
    if ports.is_any:
        yield AddressRule.of(blocks)
    named: dict[Protocol, list[Span]] = {}
    if by_name:
        for protocol, name in ports.names:
            named.setdefault(protocol, []).extend((number, number) for number in by_name.get((protocol, name), ()))
    for protocol, spans in ports.spans.items():
        if named.get(protocol):
            spans = merged((*spans, *named[protocol]))
        if spans:
            yield AddressRule.of(blocks, protocol, None if spans == _ALL_PORTS else spans)


def united(rules: Iterable[AddressRule]) -> tuple[AddressRule, ...]:
    """Unite the rules for the same addresses, then those for the same ports: the kernel tries them one by one."""
    by_addresses: dict[tuple[AddressSet | None, Protocol | None], list[tuple[Span, ...]]] = {}
    for rule in rules:
        spans = _ALL_PORTS if rule.spans is None else rule.spans
        by_addresses.setdefault((rule.addresses, rule.protocol), []).append(spans)
    by_ports: dict[tuple[Protocol | None, tuple[Span, ...], int | None], list[AddressSet]] = {}
    for (addresses, protocol), found in by_addresses.items():
        spans = found[0] if len(found) == 1 else merged(span for each in found for span in each)
        if addresses is None:
            by_ports[protocol, spans, None] = []
        else:
            by_ports.setdefault((protocol, spans, addresses.version), []).append(addresses)
    return tuple(
        AddressRule.of(
            None if version is None else _union(version, sets), protocol, None if spans == _ALL_PORTS else spans
        )
        for (protocol, spans, version), sets in by_ports.items()
    )


def _union(version: int, sets: list[AddressSet]) -> AddressSet:
    return sets[0] if len(sets) == 1 else AddressSet(version, (span for each in sets for span in each.spans))


def size_of(rules: Iterable[AddressRule]) -> int:
    """Count the rules and the spans of addresses and ports in them: what the kernel is given."""
    return sum(
        1 + (0 if rule.addresses is None else len(rule.addresses.spans)) + len(rule.spans or ()) for rule in rules
    )
