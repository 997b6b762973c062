# SPDX-License-Identifier: Apache-2.0
"""The guard's judgement of what a pod sends: it obeys the pod's egress policy also where it went past the pod's rules.

A packet socket passes every hook of the pod's own namespace, but not the node's. There conntrack knows replies, which
pass. What the pod sends in a flow of its own shows the address that it dialled, before any NAT, which is the address
that its enforcer judges by. A SYN with a frame passes into the enforced networks, and the connection after it: the
other pod's enforcer judges it, and lets no data through without a proof that only this node's enforcer can make. All
else needs a rule by address, each packet anew: a policy that changes ends such flows without a look at conntrack.

Endpoints are told apart by source address, which the check on the pod's interface has made sure of: a packet that comes
over a bridge shows the bridge as its interface.
"""

from __future__ import annotations

from collections.abc import Iterable

from enforcer_daemon.dataplane.guard_rules import (
    ALLOWS_ALL,
    INTO_ENFORCED,
    LONE_MESSAGE,
    NAME,
    GuardedEndpoint,
    address_rule,
    chain_name,
    counted_drops,
    difference,
    discard,
    drop,
    framed_networks,
    framed_syns,
    refill,
)
from enforcer_daemon.dataplane.guard_virtual import INTO_VIRTUAL
from enforcer_daemon.model import IPNetwork
from enforcer_daemon.reasons import Reason

TABLE = f"inet {NAME}"
_DESTINATIONS = ("ip daddr", "ip6 daddr")
_HOOK = "type filter hook prerouting priority -149; policy accept;"  # conntrack is at -200, destination NAT at -100
_PREFIX = "egress"


def skeleton(networks: Iterable[IPNetwork]) -> list[str]:
    """Give what the endpoints' rules hang on; `networks` are those that frames are sent to."""
    lines = [*counted_drops(TABLE, (Reason.EGRESS_DENIED,)), *framed_networks(TABLE, networks)]
    for version, kind in ((4, "ipv4_addr"), (6, "ipv6_addr")):
        lines.append(f"add map {TABLE} sources{version} {{ type {kind} : verdict; }}")
    rules = (
        # What conntrack calls invalid (a wrong checksum is enough) has no direction, and somebody may read it.
        "ct direction reply accept",
        "ct state untracked accept",
        "meta l4proto { icmp, ipv6-icmp, igmp } accept",  # No policy can name them, so none is enforced.
        *framed_syns(),
        *(f"{match} {LONE_MESSAGE} accept" for match in (*INTO_ENFORCED, *INTO_VIRTUAL)),
        *(
            f"{match} meta l4proto {{ tcp, udp }} ct state established accept"
            for match in (*INTO_ENFORCED, *INTO_VIRTUAL)
        ),
        "ip saddr vmap @sources4",
        "ip6 saddr vmap @sources6",
    )
    lines.append(f"add chain {TABLE} sent {{ {_HOOK} }}")
    return lines + [f"add rule {TABLE} sent {rule}" for rule in rules]


def apply_lines(before: GuardedEndpoint | None, after: GuardedEndpoint) -> list[str]:
    """Bring an endpoint from what was applied before (None: nothing) to `after`."""
    chain = chain_name(_PREFIX, after.attachment)
    lines = []
    if after.egress != ALLOWS_ALL:
        lines += refill(TABLE, chain, [*address_rules(after), drop(Reason.EGRESS_DENIED)])
    lines += difference(TABLE, _elements(before), _elements(after))
    if before is not None and before.egress != ALLOWS_ALL and after.egress == ALLOWS_ALL:
        lines += discard(TABLE, chain)
    return lines


def remove_lines(before: GuardedEndpoint) -> list[str]:
    """Take an endpoint away."""
    lines = difference(TABLE, _elements(before), _elements(None))
    return lines if before.egress == ALLOWS_ALL else lines + discard(TABLE, chain_name(_PREFIX, before.attachment))


def _elements(endpoint: GuardedEndpoint | None) -> dict[str, str]:
    """Give the endpoint's elements, none where no policy isolates it."""
    found: dict[str, str] = {}
    if endpoint is not None and endpoint.egress != ALLOWS_ALL:
        chain = chain_name(_PREFIX, endpoint.attachment)
        found |= {f"sources{address.version} {address}": f"goto {chain}" for address in endpoint.addresses}
    return found


def address_rules(endpoint: GuardedEndpoint) -> list[str]:
    """Let a pod reach itself, and what its policies allow by address."""
    own = [f"{_DESTINATIONS[address.version == 6]} {address} accept" for address in endpoint.addresses]
    return own + [address_rule(rule, *_DESTINATIONS) for rule in endpoint.egress]
