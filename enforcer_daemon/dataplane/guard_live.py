# SPDX-License-Identifier: Apache-2.0
"""TCP connections that the daemon vouches for: the node's conntrack has lost them, and the pod still has them.

`conntrack -F`, or whoever deletes single entries, makes a connection look like packets in the middle of no flow. The
guard drops its first segment, and tells the daemon. If the pod has the connection, the guard lets its segments pass for
a while, so that conntrack picks it up again (nf_conntrack_tcp_loose), as the sender retransmits what was dropped. If
the pod does not, a peer's segment is refused with RST from then on.
"""

from __future__ import annotations

from collections.abc import Iterable

from enforcer_daemon.dataplane.guard_rules import NAME
from enforcer_daemon.dataplane.nodeflows import SentTuple
from enforcer_daemon.model import IPAddress

TABLE = f"inet {NAME}"
LIVE, REFUSED = "live", "refused"
LIFETIMES_S = {LIVE: 60.0, REFUSED: 10.0}
"""How long a connection is vouched for, and refused: longer than a retransmission of one that is in use may take."""
MAX_FLOWS = 65_536
"""Of each set; more are told later, when others are over."""
MAX_FLOWS_OF_ONE = 4_096
"""Of them those of one address."""
_FAMILIES = ((4, "ipv4_addr", "ip"), (6, "ipv6_addr", "ip6"))
SENT_LIVE = tuple(f"{f} saddr . tcp sport . {f} daddr . tcp dport @{LIVE}{v}" for v, _, f in _FAMILIES)
_REACHED = "{0} daddr . tcp dport . {0} saddr . tcp sport @{1}{2}"
REACHED_LIVE = tuple(_REACHED.format(family, LIVE, version) for version, _, family in _FAMILIES)
REACHED_REFUSED = tuple(_REACHED.format(family, REFUSED, version) for version, _, family in _FAMILIES)
"""Matches of one family each; the address of the guarded pod comes first in the sets."""


def skeleton() -> list[str]:
    """Make the sets."""
    return [
        f"add set {TABLE} {name}{version} {{ type {kind} . inet_service . {kind} . inet_service; "
        f"size {MAX_FLOWS}; flags timeout; }}"
        for name in LIFETIMES_S
        for version, kind, _ in _FAMILIES
    ]


class ReportedFlows:
    """What the sets have, so that they never overflow, and so that an address can be taken out of them."""

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until: dict[str, dict[IPAddress, dict[SentTuple, float]]] = {name: {} for name in LIFETIMES_S}

    def clear(self) -> None:
        """Take note that the sets are empty."""
        for of_address in self._until.values():
            of_address.clear()

    def add_lines(self, name: str, flows: Iterable[SentTuple], now: float) -> list[str]:
        """Add flows, by what the pod sends in them, as far as there is room; those that are there stay as they are."""
        of_address = self._until[name]
        self._drop_expired(of_address, now)
        room = MAX_FLOWS - sum(map(len, of_address.values()))
        added: list[SentTuple] = []
        for flow in flows:
            until = of_address.setdefault(flow.source, {})
            if flow not in until and len(added) < room and len(until) < MAX_FLOWS_OF_ONE:
                until[flow] = now + LIFETIMES_S[name]
                added.append(flow)
        return _lines("add", name, added)

    def remove_lines(self, addresses: Iterable[IPAddress]) -> list[str]:
        """Take all flows of addresses out; what expired is added first, so that to delete it is no error."""
        lines = []
        for address in addresses:
            for name, of_address in self._until.items():
                flows = of_address.pop(address, {})
                lines += _lines("add", name, flows) + _lines("delete", name, flows)
        return lines

    @staticmethod
    def _drop_expired(of_address: dict[IPAddress, dict[SentTuple, float]], now: float) -> None:
        for address, until in list(of_address.items()):
            for flow in [flow for flow, deadline in until.items() if deadline <= now]:
                del until[flow]
            if not until:
                del of_address[address]


def _lines(verb: str, name: str, flows: Iterable[SentTuple]) -> list[str]:
    timeout = f" timeout {LIFETIMES_S[name]:.0f}s" if verb == "add" else ""
    elements: dict[int, list[str]] = {4: [], 6: []}
    for flow in flows:
        ends = f"{flow.source} . {flow.source_port} . {flow.destination} . {flow.destination_port}"
        elements[flow.source.version].append(f"{ends}{timeout}")
    return [f"{verb} element {TABLE} {name}{v} {{ {', '.join(found)} }}" for v, found in elements.items() if found]
