# SPDX-License-Identifier: Apache-2.0
"""The guard's check of what a pod sends: it obeys the pod's egress policy also if it went past the pod's own rules.

A packet socket passes every hook of the pod's own namespace, but not the node's. The checks stand behind every
translation of the destination, whatever does it: in postrouting right before source NAT, for what is forwarded,
switched by a bridge that netfilter sees, or sent on by IPVS (whose packets go through output and postrouting, never
through forward); and in input behind IPVS, for what is for the node itself. There conntrack knows replies, which pass.
What another enforcer decides on passes by its translated destination (guard_vouched). Everything else needs a rule by
address for what the pod dialed, which is what its own enforcer evaluates; each packet is checked, so that a policy
that changes ends such flows without a look at conntrack.

A SYN with a frame may end where no enforcer is. So a SYN-ACK to an isolated pod needs a frame, or a rule by address for
what was dialed, as it does for the pod's own enforcer.

Untracked packets have no direction and no dialed destination. Their own destination is compared, and answers pass only
to a peer that sent an untracked packet to the pod a moment ago.

Endpoints are told apart by source address, which the checks on the pod's interface and of arrivals have made sure of.
"""

from __future__ import annotations

from collections.abc import Iterable

from enforcer_daemon.dataplane import guard_vouched
from enforcer_daemon.dataplane.guard_rules import (
    ALLOWS_ALL,
    NAME,
    GuardedEndpoint,
    address_rule,
    chain_name,
    counted_drops,
    difference,
    discard,
    drop,
    refill,
)
from enforcer_daemon.model import IPNetwork
from enforcer_daemon.reasons import Reason

TABLE = f"inet {NAME}"
_DESTINATIONS = ("ip daddr", "ip6 daddr")
_DIALLED = ("ct original ip daddr", "ct original ip6 daddr", "ct original proto-dst")
_TRANSLATED = ("ct reply ip saddr", "ct reply ip6 saddr")
_ANSWERING = (*_TRANSLATED, "ct reply proto-src")
_HOOKS = {
    "leaving": "type filter hook postrouting priority 99; policy accept;",  # source NAT is at 100
    "entering": "type filter hook input priority 101; policy accept;",  # IPVS is at 98 and 99 (ip_vs_core.c)
}
_ANSWERED_HOOK = "type filter hook postrouting priority 101; policy accept;"  # behind `leaving`: of what passed it
_PREFIX = "egress"
_MAX_ASKED = 65_536
_ASKED_S = 30
"""As long as conntrack waits for the answer to a datagram (nf_conntrack_udp_timeout), seconds."""
_FAMILIES = ((4, "ipv4_addr", "ip"), (6, "ipv6_addr", "ip6"))


def skeleton(networks: Iterable[IPNetwork], pod_networks: Iterable[IPNetwork]) -> list[str]:
    """Return what the endpoints' rules hang on; `networks` are those that frames are sent to."""
    lines = [
        *counted_drops(TABLE, (Reason.EGRESS_DENIED,), is_logged=True),
        *guard_vouched.skeleton(TABLE, networks, pod_networks),
    ]
    lines += [f"add chain {TABLE} answered {{ {_ANSWERED_HOOK} }}", f"add chain {TABLE} syn_acks"]
    # Another enforcer puts a frame behind it. A bare one needs a rule for what was dialed, as the frame of the SYN was
    # believed without knowing whether there is an enforcer.
    lines.append(f"add rule {TABLE} answered tcp flags & (syn | ack) == (syn | ack) ct direction reply goto syn_acks")
    lines.append(f"add rule {TABLE} syn_acks jump framed")
    for version, kind, family in _FAMILIES:
        asked = f"type {kind} . inet_service . {kind} . inet_service . inet_proto; size {_MAX_ASKED};"
        lines += [
            f"add map {TABLE} sources{version} {{ type {kind} : verdict; }}",
            f"add set {TABLE} asked{version} {{ {asked} flags dynamic,timeout; timeout {_ASKED_S}s; }}",
        ]
        request = f"ct state untracked {family} daddr @pods{version} meta l4proto {{ tcp, udp }}"
        answer = f"{family} daddr . th dport . {family} saddr . th sport . meta l4proto"
        lines.append(f"add rule {TABLE} answered {request} update @asked{version} {{ {answer} }}")
        lines.append(f"add rule {TABLE} syn_acks {family} daddr vmap @sources{version}")
    rules = (
        # What conntrack calls invalid (a wrong checksum is enough) has no direction, and a socket may read it.
        "ct direction reply accept",
        "meta l4proto { icmp, ipv6-icmp, igmp } accept",  # No policy can name them, so none is enforced.
        *(
            f"ct state untracked {family} saddr . th sport . {family} daddr . th dport . meta l4proto "
            f"@asked{version} accept"
            for version, _, family in _FAMILIES
        ),
        *(f"{family} saddr vmap @sources{version}" for version, _, family in _FAMILIES),
    )
    for chain, hook in _HOOKS.items():
        lines.append(f"add chain {TABLE} {chain} {{ {hook} }}")
        lines += [f"add rule {TABLE} {chain} {rule}" for rule in rules]
    return lines


def apply_lines(before: GuardedEndpoint | None, after: GuardedEndpoint) -> list[str]:
    """Bring an endpoint from what was applied before (None: nothing) to `after`."""
    chain = chain_name(_PREFIX, after.attachment)
    lines = []
    if after.egress != ALLOWS_ALL:
        lines += refill(TABLE, chain, _rules(after))
    lines += difference(TABLE, _elements(before), _elements(after))
    if before is not None and before.egress != ALLOWS_ALL and after.egress == ALLOWS_ALL:
        lines += discard(TABLE, chain)
    return lines


def remove_lines(before: GuardedEndpoint) -> list[str]:
    """Take an endpoint away."""
    lines = difference(TABLE, _elements(before), _elements(None))
    return lines if before.egress == ALLOWS_ALL else lines + discard(TABLE, chain_name(_PREFIX, before.attachment))


def _elements(endpoint: GuardedEndpoint | None) -> dict[str, str]:
    """Return the endpoint's elements, none where no policy isolates it."""
    found: dict[str, str] = {}
    if endpoint is not None and endpoint.egress != ALLOWS_ALL:
        chain = chain_name(_PREFIX, endpoint.attachment)
        found |= {f"sources{address.version} {address}": f"goto {chain}" for address in endpoint.addresses}
    return found


def _rules(endpoint: GuardedEndpoint) -> list[str]:
    denial = drop(Reason.EGRESS_DENIED)
    return [
        guard_vouched.vouched(by_identity=endpoint.by_identity),
        # What the pod sent to a Service, and comes back to it.
        *(f"{_TRANSLATED[address.version == 6]} {address} accept" for address in endpoint.addresses),
        # The pod's enforcer evaluates by what was dialed, or by where the packet goes. Here either will do.
        *(address_rule(rule, *_DIALLED) for rule in endpoint.egress),
        *(f"ct direction reply {address_rule(rule, *_ANSWERING)}" for rule in endpoint.egress),
        f"ct direction reply {denial}",
        *address_rules(endpoint),
        denial,
    ]


def address_rules(endpoint: GuardedEndpoint) -> list[str]:
    """Let a pod reach itself, and what its policies allow by address, by the packet's own destination."""
    own = [f"{_DESTINATIONS[address.version == 6]} {address} accept" for address in endpoint.addresses]
    return own + [address_rule(rule, *_DESTINATIONS) for rule in endpoint.egress]
