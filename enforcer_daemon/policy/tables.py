# SPDX-License-Identifier: Apache-2.0
"""Look-up tables that find what applies to a port, an address or a set of labels without scanning what does not.

Ports and networks share one idea: a range is a few aligned blocks, a block is a prefix of the number's bits, and a
look-up asks once per prefix length in use. Labels are found by one telling requirement of each selector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from enforcer_daemon.model import IPAddress, IPNetwork, Protocol
from enforcer_daemon.policy.objects import Operator, PortMatch, PortName, Selector

T = TypeVar("T")
_PORT_ROOT = 1 << 16  # a leading one bit keeps prefixes of different lengths apart


class PortTable(Generic[T]):
    """Things by the ports that they are for."""

    def __init__(self) -> None:
        self.for_any: list[T] = []
        """For every port of every protocol, and for protocols without ports."""
        self._blocks: dict[Protocol, dict[int, list[T]]] = {}
        self._shifts: dict[Protocol, list[int]] = {}
        self._named: dict[tuple[Protocol, str], list[T]] = {}
        self._named_protocols: set[Protocol] = set()

    def add(self, ports: tuple[PortMatch, ...], item: T) -> None:
        """File an item under these ports; without any, under all."""
        if not ports:
            self.for_any.append(item)
        for port in ports:
            if isinstance(port, PortName):
                self._named.setdefault((port.protocol, port.name), []).append(item)
                self._named_protocols.add(port.protocol)
            else:
                self._add_range(port.protocol, port.first, port.last, item)

    def _add_range(self, protocol: Protocol, first: int, last: int, item: T) -> None:
        blocks = self._blocks.setdefault(protocol, {})
        shifts = self._shifts.setdefault(protocol, [])
        low, high, shift = first + _PORT_ROOT, last + 1 + _PORT_ROOT, 0
        while low < high:
            ends = ([low] if low & 1 else []) + ([high - 1] if high & 1 else [])
            for block in ends:
                blocks.setdefault(block, []).append(item)
            if ends and shift not in shifts:
                shifts.append(shift)
            low, high, shift = (low + 1) >> 1, high >> 1, shift + 1

    def find(self, protocol: Protocol | None, port: int | None, names: Iterable[str]) -> Iterator[T]:
        """Give the items for a port of the destination, which calls it by these names."""
        yield from self.for_any
        if protocol is None or port is None:
            return
        blocks = self._blocks.get(protocol)
        if blocks is not None:
            node = port | _PORT_ROOT
            for shift in self._shifts[protocol]:
                yield from blocks.get(node >> shift, ())
        for name in names:
            yield from self._named.get((protocol, name), ())

    def could_hold(self, protocol: Protocol | None, port: int | None) -> bool:
        """Tell whether some destination could be found: any may have given any name to its port. None: any port."""
        if self.for_any:
            return True
        if protocol is None or (protocol not in self._blocks and protocol not in self._named_protocols):
            return False
        return (
            port is None or protocol in self._named_protocols or next(self.find(protocol, port, ()), None) is not None
        )


class NetworkTable(Generic[T]):
    """Things by the network that they are for; one thing a network, made by `make`."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._networks: dict[tuple[int, int], dict[int, T]] = {}

    def at(self, network: IPNetwork) -> T:
        """Give the thing of this very network; make it if there is none."""
        shift = network.max_prefixlen - network.prefixlen
        same_length = self._networks.setdefault((network.version, shift), {})
        key = int(network.network_address) >> shift
        found = same_length.get(key)
        if found is None:
            found = same_length[key] = self._make()
        return found

    def find(self, address: IPAddress) -> Iterator[T]:
        """Give the things of all networks that hold the address."""
        number, version = int(address), address.version
        for (family, shift), same_length in self._networks.items():
            if family == version:
                found = same_length.get(number >> shift)
                if found is not None:
                    yield found


class NetworkSet:
    """A set of networks, asked for an address."""

    def __init__(self, networks: Iterable[IPNetwork]) -> None:
        self._table: NetworkTable[bool] = NetworkTable(lambda: True)
        for network in networks:
            self._table.at(network)

    def __contains__(self, address: IPAddress) -> bool:
        return any(self._table.find(address))


Mark = tuple[int, str, str | None]
"""A set of labels (its position), a key, and a value or None for any."""


class LabelTable(Generic[T]):
    """Things by selectors: `find` gives every thing whose selectors could match, and few others.

    A thing has one selector for each of several sets of labels (such as a pod's and its namespace's). It is filed under
    the one requirement that the fewest others share, because all requirements must hold. Only "key in values" and "key
    exists" can be filed; a thing without such is tried for everyone.
    """

    def __init__(self, items: Iterable[tuple[tuple[Selector, ...], T]]) -> None:
        self._filed: dict[Mark, list[T]] = {}
        self._keys: tuple[dict[str, None], ...] = ()
        self._rest: list[T] = []
        listed = [(_marks(selectors), item) for selectors, item in items]
        sharers: Counter[Mark] = Counter()
        for choices, _ in listed:
            for marks in choices:
                sharers.update(marks)
        for choices, item in listed:
            self._file(item, min(choices, key=lambda marks: sum(sharers[mark] for mark in marks), default=None))

    def _file(self, item: T, marks: list[Mark] | None) -> None:
        if marks is None:
            self._rest.append(item)
            return
        for mark in marks:
            self._filed.setdefault(mark, []).append(item)
            while len(self._keys) <= mark[0]:
                self._keys = (*self._keys, {})
            self._keys[mark[0]][mark[1]] = None

    def find(self, *label_sets: Mapping[str, str]) -> Iterator[T]:
        """Give what could match these labels, each once, in an order that does not depend on the labels'."""
        filed = self._filed
        for position, (keys, labels) in enumerate(zip(self._keys, label_sets, strict=False)):
            # Whichever is shorter is walked: a pod has few labels, a small table few keys.
            for key in keys if len(keys) <= len(labels) else sorted(labels):
                value = labels.get(key)
                if value is not None:
                    yield from filed.get((position, key, value), ())
                    yield from filed.get((position, key, None), ())
        yield from self._rest


def _marks(selectors: tuple[Selector, ...]) -> list[list[Mark]]:
    """Give the requirements that a thing can be filed under, each as the marks where it would then be found."""
    choices: list[list[Mark]] = []
    for position, selector in enumerate(selectors):
        for requirement in selector.requirements:
            if requirement.operator is Operator.IN:
                choices.append([(position, requirement.key, value) for value in sorted(requirement.values)])
            elif requirement.operator is Operator.EXISTS:
                choices.append([(position, requirement.key, None)])
    return choices
