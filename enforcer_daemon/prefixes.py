# SPDX-License-Identifier: Apache-2.0
"""A set of networks that is asked for packed addresses: a look-up costs one step for each prefix length in use."""

from __future__ import annotations

from collections.abc import Iterable

from enforcer_daemon.model import IPNetwork


class PrefixSet:
    """Networks of both families; immutable."""

    __slots__ = ("_prefixes",)

    def __init__(self, networks: Iterable[IPNetwork] = ()) -> None:
        found: dict[int, dict[int, set[int]]] = {4: {}, 16: {}}
        for network in networks:
            shift = network.max_prefixlen - network.prefixlen
            prefixes = found[len(network.network_address.packed)].setdefault(shift, set())
            prefixes.add(int(network.network_address) >> shift)
        self._prefixes = {
            length: tuple((shift, frozenset(prefixes)) for shift, prefixes in sorted(by_shift.items(), reverse=True))
            for length, by_shift in found.items()
        }

    def __contains__(self, packed: bytes) -> bool:
        number = int.from_bytes(packed, "big")
        for shift, prefixes in self._prefixes.get(len(packed), ()):  # noqa: SIM110 - any() costs as much again
            if number >> shift in prefixes:
                return True
        return False

    def steps(self, packed: bytes) -> int:
        """Return how many comparisons a look-up of this address takes at most."""
        return len(self._prefixes.get(len(packed), ()))
