# SPDX-License-Identifier: Apache-2.0
"""Sets of addresses and ports that the rules of the guard's endpoints compare with: one set for each content.

The pods that the same policies select have the same rules, and each rule stands in several chains. Were its set written
into each of them, nft and the kernel would make it each time, and the kernel compares each new set with all that it
has: a hundred pods with a hundred such rules took half a minute. So a set is named by what is in it, and made once in a
table, for as long as a rule uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address, summarize_address_range
from itertools import islice

from enforcer_daemon.model import IPAddress
from enforcer_daemon.policy.address_rules import AddressRule
from enforcer_daemon.policy.tables import AddressSet, Span

_KINDS: dict[int, tuple[str, Callable[[int], IPAddress]]] = {
    4: ("ipv4_addr", IPv4Address),
    6: ("ipv6_addr", IPv6Address),
}
Sets = dict[str, str]
"""Definitions of sets, by name."""


def address_match(addresses: AddressSet) -> str:
    """Write what an address is compared with: a network, or a set."""
    _, kind = _KINDS[addresses.version]
    if len(addresses.spans) == 1:
        networks = list(islice(summarize_address_range(*map(kind, addresses.spans[0])), 2))
        if len(networks) == 1:
            return str(networks[0])
    return f"@{_name(f'addresses{addresses.version}', addresses.spans)}"


def port_match(spans: Sequence[Span]) -> str:
    """Write what a port is compared with: a range, or a set."""
    if len(spans) == 1:
        return "{}-{}".format(*spans[0])
    return f"@{_name('ports', spans)}"


def _name(prefix: str, spans: Sequence[Span]) -> str:
    return f"{prefix}_{sha256(repr(spans).encode()).hexdigest()[:20]}"


def sets_of(rules: Iterable[AddressRule]) -> Sets:
    """Return the sets that these rules compare with."""
    found: Sets = {}
    for rule in rules:
        if rule.addresses is not None:
            match, (type_, kind) = address_match(rule.addresses), _KINDS[rule.addresses.version]
            if match.startswith("@") and match[1:] not in found:
                found[match[1:]] = _definition(type_, (_range(kind, span) for span in rule.addresses.spans))
        if rule.spans is not None:
            match = port_match(rule.spans)
            if match.startswith("@") and match[1:] not in found:
                found[match[1:]] = _definition("inet_service", (f"{first}-{last}" for first, last in rule.spans))
    return found


def _range(kind: Callable[[int], IPAddress], span: Span) -> str:
    first, last = span
    return str(kind(first)) if first == last else f"{kind(first)}-{kind(last)}"


def _definition(type_: str, elements: Iterable[str]) -> str:
    return f"{{ type {type_}; flags interval; elements = {{ {', '.join(elements)} }}; }}"


def new_sets(tables: Iterable[str], before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Make the sets that rules are about to use, in each table."""
    made = [(name, text) for name, text in after.items() if name not in before]
    return [f"add set {table} {name} {text}" for table in tables for name, text in made]


def old_sets(tables: Iterable[str], before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Take away the sets that no rule uses any longer, in each table."""
    return [f"delete set {table} {name}" for table in tables for name in before if name not in after]
