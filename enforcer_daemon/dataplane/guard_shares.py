# SPDX-License-Identifier: Apache-2.0
"""What endpoints share in the guard: the sets of their rules, and the transaction that replaces the tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from enforcer_daemon.dataplane.guard_rules import ALLOWS_ALL, GuardedEndpoint
from enforcer_daemon.dataplane.guard_sets import Sets, sets_of
from enforcer_daemon.policy.address_rules import AddressRule, size_of

MAX_REPLACED = 65_536
"""Rules by address, and spans in them, of all endpoints in the transaction that replaces the tables; what is beyond
follows right after, one endpoint at a time, and until then has no rules by address. So what one tenant writes keeps no
other's pod out of the tables, nor nft from making them within its limit of memory."""


def first_portion(endpoints: Iterable[GuardedEndpoint]) -> list[GuardedEndpoint]:
    """Return the endpoints, the largest without the rules for which the first transaction has no room."""
    found, left = [], MAX_REPLACED
    for endpoint in sorted(endpoints, key=_weight):
        left -= _weight(endpoint)
        found.append(
            endpoint if left >= 0 else replace(endpoint, rules=_none(endpoint.rules), egress=_none(endpoint.egress))
        )
    return found


def _weight(endpoint: GuardedEndpoint) -> int:
    return size_of((*endpoint.rules, *endpoint.egress))


def _none(rules: tuple[AddressRule, ...]) -> tuple[AddressRule, ...]:
    return rules if rules == ALLOWS_ALL else ()


def endpoint_sets(endpoints: Iterable[GuardedEndpoint]) -> Sets:
    """Return the sets that the rules of endpoints use; pods of the same policies share theirs, which are read once."""
    listed = [rules for endpoint in endpoints for rules in (endpoint.rules, endpoint.egress)]
    found: Sets = {}
    for rules in {id(rules): rules for rules in listed}.values():
        found |= sets_of(rules)
    return found
