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
    NAME,
    GuardedEndpoint,
    address_rule,
    chain_name,
    counted_drops,
    discard,
    drop,
    framed_networks,
    framed_syns,
    refill,
)
from enforcer_daemon.model import IPAddress, IPNetwork
from enforcer_daemon.reasons import Reason

TABLE = f"inet {NAME}"
DESTINATIONS = ("ip daddr", "ip6 daddr")
_HOOK = "type filter hook prerouting priority -149; policy accept;"  # conntrack is at -200, destination NAT at -100
_PREFIX = "egress"


def skeleton(networks: Iterable[IPNetwork]) -> list[str]:
    """Give what the endpoints' rules hang on; `networks` are those that frames are sent to."""
    return [
        f"add map {TABLE} sources4 {{ type ipv4_addr : verdict; }}",
        f"add map {TABLE} sources6 {{ type ipv6_addr : verdict; }}",
        *counted_drops(TABLE, (Reason.EGRESS_DENIED,)),
        *framed_networks(TABLE, networks),
        f"add chain {TABLE} sent {{ {_HOOK} }}",
        # What conntrack calls invalid (a wrong checksum is enough) has no direction, and somebody may read it.
        f"add rule {TABLE} sent ct direction reply accept",
        f"add rule {TABLE} sent ct state untracked accept",
        f"add rule {TABLE} sent ip saddr vmap @sources4",
        f"add rule {TABLE} sent ip6 saddr vmap @sources6",
    ]


def apply_lines(before: GuardedEndpoint | None, after: GuardedEndpoint) -> list[str]:
    """Bring an endpoint from what was applied before (None: nothing) to `after`."""
    chain = chain_name(_PREFIX, after.attachment)
    known = () if before is None else before.addresses
    return [
        *refill(TABLE, chain, _rules(after)),
        *(_delete_element(address) for address in known if address not in after.addresses),
        *(
            f"add element {TABLE} sources{address.version} {{ {address} : goto {chain} }}"
            for address in after.addresses
            if address not in known
        ),
    ]


def remove_lines(before: GuardedEndpoint) -> list[str]:
    """Take an endpoint away."""
    elements = [_delete_element(address) for address in before.addresses]
    return elements + discard(TABLE, chain_name(_PREFIX, before.attachment))


def _rules(endpoint: GuardedEndpoint) -> list[str]:
    if endpoint.egress == ALLOWS_ALL:
        return ["accept"]
    return [
        "meta l4proto { icmp, ipv6-icmp, igmp } accept",  # No policy can name them, so none is enforced.
        f"meta l4proto != {{ tcp, udp, sctp }} {drop(Reason.EGRESS_DENIED)}",
        *framed_syns(),
        *(f"{match} meta l4proto tcp ct state established accept" for match in INTO_ENFORCED),
        *own_addresses(endpoint),
        *(address_rule(rule, *DESTINATIONS) for rule in endpoint.egress),
        drop(Reason.EGRESS_DENIED),
    ]


def own_addresses(endpoint: GuardedEndpoint) -> list[str]:
    """Let a pod reach itself."""
    return [f"{DESTINATIONS[address.version == 6]} {address} accept" for address in endpoint.addresses]


def _delete_element(address: IPAddress) -> str:
    return f"delete element {TABLE} sources{address.version} {{ {address} }}"
