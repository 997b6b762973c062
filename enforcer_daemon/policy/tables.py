# SPDX-License-Identifier: Apache-2.0
"""Look-up tables that find what applies to a port, an address or a set of labels without scanning what does not.

Nothing is multiplied out: each table is as large as what was put into it, whatever a policy combines. Networks and
ports share one idea: an aligned block is a prefix of the number's bits, and a look-up asks once per prefix length in
use. Labels are found by one telling requirement of each selector.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Generic, TypeVar

from enforcer_daemon.model import IPAddress, IPNetwork, Protocol
from enforcer_daemon.policy.objects import IPBlock, Operator, PortMatch, PortName, Selector

T = TypeVar("T")
Span = tuple[int, int]
"""First and last, both included."""
_PORT_ROOT = 1 << 16  # a leading one bit keeps prefixes of different lengths apart


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Merge spans of whole numbers that overlap or adjoin; return them in order."""
    found: list[Span] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1] + 1:
            if last > found[-1][1]:
                found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return tuple(found)


def _holds(starts: Sequence[int], spans: Sequence[Span], number: int) -> bool:
    index = bisect_right(starts, number) - 1
    return index >= 0 and number <= spans[index][1]


class PortSet:
    """The ports of one rule: merged spans for each protocol, and names. Its size is that of the rule."""

    __slots__ = ("_starts", "is_any", "names", "spans")

    def __init__(self, ports: Sequence[PortMatch]) -> None:
        """Take every port of every protocol if `ports` is empty."""
        self.is_any = not ports
        found: dict[Protocol, list[Span]] = {}
        names: dict[tuple[Protocol, str], None] = {}
        for port in ports:
            spans = found.setdefault(port.protocol, [])
            if isinstance(port, PortName):
                names[port.protocol, port.name] = None
            else:
                spans.append((port.first, port.last))
        self.names = frozenset(names)
        self.spans = {protocol: merged(spans) for protocol, spans in found.items()}
        """By protocol, in the order of the rule; empty for a protocol of which the rule has names alone."""
        self._starts = {protocol: [first for first, _ in spans] for protocol, spans in self.spans.items()}

    def holds(self, protocol: Protocol | None, port: int | None, names: Iterable[str]) -> bool:
        """Return whether the rule names a port of the destination, which calls it by these names."""
        if self.is_any:
            return True
        if protocol is None or port is None:
            return False
        starts = self._starts.get(protocol)
        if starts and _holds(starts, self.spans[protocol], port):
            return True
        for name in names:  # noqa: SIM110 - a generator costs more than the whole loop
            if (protocol, name) in self.names:
                return True
        return False


class PortTable:
    """Numbers of rules by the ports that they are for. Its size is that of the rules' ports.

    A span is kept once, at the smallest aligned block that holds it whole (an interval tree over the ports: M. de Berg
    et al., Computational Geometry, section 10.1). A look-up visits the blocks around a port, and in each only the spans
    that hold it: they are sorted by the end that decides.
    """

    def __init__(self) -> None:
        self.for_any: set[int] = set()
        """For every port of every protocol, and for protocols without ports."""
        self._spans: dict[Protocol, dict[Span, set[int]]] = {}
        self._named: dict[tuple[Protocol, str], set[int]] = {}
        self._of_protocol: dict[tuple[Protocol, bool], tuple[set[int]]] = {}
        """The rules with any port of a protocol, by names or by numbers."""
        self._nodes: dict[Protocol, dict[int, _SpanNode]] = {}
        self._shifts: dict[Protocol, list[int]] = {}

    def add(self, ports: PortSet, number: int) -> None:
        """File a rule under these ports."""
        if ports.is_any:
            self.for_any.add(number)
        for protocol, name in ports.names:
            self._named.setdefault((protocol, name), set()).add(number)
            self._of_protocol.setdefault((protocol, True), (set(),))[0].add(number)
        for protocol, spans in ports.spans.items():
            if spans:
                self._of_protocol.setdefault((protocol, False), (set(),))[0].add(number)
            filed = self._spans.setdefault(protocol, {})
            for span in spans:
                at = filed.get(span)
                if at is None:
                    at = filed[span] = set()
                    self._place(protocol, span, at)
                at.add(number)

    def _place(self, protocol: Protocol, span: Span, numbers: set[int]) -> None:
        shift = (span[0] ^ span[1]).bit_length()
        key = (span[0] | _PORT_ROOT) >> shift
        nodes = self._nodes.setdefault(protocol, {})
        node = nodes.get(key)
        if node is None:
            node = nodes[key] = _SpanNode()
            shifts = self._shifts.setdefault(protocol, [])
            if shift not in shifts:
                shifts.append(shift)
        node.add(span, numbers)

    def find(self, protocol: Protocol | None, port: int | None, names: Iterable[str]) -> Iterator[set[int]]:
        """Yield the sets of rules for a port of the destination, which calls it by these names."""
        if self.for_any:
            yield self.for_any
        if protocol is None or port is None:
            return
        nodes = self._nodes.get(protocol)
        if nodes is not None:
            for shift in self._shifts[protocol]:
                key = (port | _PORT_ROOT) >> shift
                node = nodes.get(key)
                if node is not None:
                    yield from node.find(port, _middle(key, shift))
        for name in names:
            if (found := self._named.get((protocol, name))) is not None:
                yield found

    def possible(self, protocol: Protocol | None, port: int | None) -> Iterator[set[int]]:
        """Yield the sets of rules that some destination could be found by: any may have given any name to its port.

        `port` None: any port.
        """
        if port is not None:
            yield from self.find(protocol, port, ())
        elif self.for_any:
            yield self.for_any
        if protocol is not None:
            yield from self._of_protocol.get((protocol, True), ())
            if port is None:
                yield from self._of_protocol.get((protocol, False), ())

    def could_hold(self, protocol: Protocol | None, port: int | None) -> bool:
        """Return whether some destination could be found; None: any port."""
        return next(self.possible(protocol, port), None) is not None

    @property
    def has_names(self) -> bool:
        """Whether any rule names a port by its name."""
        return bool(self._named)


def _middle(key: int, shift: int) -> int:
    """Return the first port of the upper half of a block; every span that is kept at the block holds it."""
    return (((key << 1) | 1) << (shift - 1)) - _PORT_ROOT if shift else key - _PORT_ROOT


class _SpanNode:
    """The spans of one block, sorted when they are first asked for."""

    __slots__ = ("_by_first", "_by_last", "_is_sorted")

    def __init__(self) -> None:
        self._by_first: list[tuple[int, set[int]]] = []
        self._by_last: list[tuple[int, set[int]]] = []
        self._is_sorted = False

    def add(self, span: Span, numbers: set[int]) -> None:
        self._by_first.append((span[0], numbers))
        self._by_last.append((span[1], numbers))
        self._is_sorted = len(self._by_first) == 1

    def find(self, port: int, middle: int) -> Iterator[set[int]]:
        if not self._is_sorted:
            self._by_first.sort(key=itemgetter(0))
            self._by_last.sort(key=itemgetter(0), reverse=True)
            self._is_sorted = True
        if port < middle:
            for first, numbers in self._by_first:
                if first > port:
                    return
                yield numbers
        else:
            for last, numbers in self._by_last:
                if last < port:
                    return
                yield numbers


class NetworkTable(Generic[T]):
    """Things by the network that they are for; one thing a network, made by `make`."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._networks: dict[tuple[int, int], dict[int, T]] = {}

    def at(self, network: IPNetwork) -> T:
        """Return the thing of this very network; make it if there is none."""
        shift = network.max_prefixlen - network.prefixlen
        same_length = self._networks.setdefault((network.version, shift), {})
        key = int(network.network_address) >> shift
        found = same_length.get(key)
        if found is None:
            found = same_length[key] = self._make()
        return found

    def find(self, address: IPAddress) -> Iterator[T]:
        """Yield the things of all networks that hold the address."""
        number, version = int(address), address.version
        for (family, shift), same_length in self._networks.items():
            if family == version:
                found = same_length.get(number >> shift)
                if found is not None:
                    yield found


class AddressSet:
    """A union of addresses of one family as merged spans. Its size is that of what it was made of."""

    __slots__ = ("_hash", "_starts", "spans", "version")

    def __init__(self, version: int, spans: Iterable[Span]) -> None:
        """Take addresses as whole numbers."""
        self.version = version
        self.spans = merged(spans)
        self._starts = [first for first, _ in self.spans]
        self._hash = hash((version, self.spans))

    @classmethod
    def of_blocks(cls, version: int, blocks: Iterable[IPBlock]) -> AddressSet:
        """Unite the blocks of this family, each less its exceptions."""
        return cls(version, (span for block in blocks if block.network.version == version for span in _spans(block)))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, AddressSet):
            return NotImplemented
        return (self._hash, self.version, self.spans) == (other._hash, other.version, other.spans)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"AddressSet({self.version}, {self.spans})"

    def __contains__(self, address: IPAddress) -> bool:
        return address.version == self.version and _holds(self._starts, self.spans, int(address))


def _spans(block: IPBlock) -> Iterator[Span]:
    """Yield what is left of a block without its exceptions, which lie within it."""
    first, last = _span(block.network)
    for lower, upper in merged(map(_span, block.excepts)):
        if lower > first:
            yield first, lower - 1
        first = max(first, upper + 1)
    if first <= last:
        yield first, last


def _span(network: IPNetwork) -> Span:
    return int(network.network_address), int(network.broadcast_address)


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
        """Yield what could match these labels, each once, in an order that does not depend on the labels'."""
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
    """Return the requirements that a thing can be filed under, each as the marks where it would then be found."""
    choices: list[list[Mark]] = []
    for position, selector in enumerate(selectors):
        for requirement in selector.requirements:
            if requirement.operator is Operator.IN:
                choices.append([(position, requirement.key, value) for value in sorted(requirement.values)])
            elif requirement.operator is Operator.EXISTS:
                choices.append([(position, requirement.key, None)])
    return choices
