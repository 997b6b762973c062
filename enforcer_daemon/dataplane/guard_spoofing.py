# SPDX-License-Identifier: Apache-2.0
"""The guard on a pod's interface: a pod speaks under its own addresses alone, and its SYNs obey its egress policy.

The chain stands at the ingress of the interface's end on the node, where every packet of the pod comes through,
whatever socket it was sent by. It is stateless, since conntrack is not known there. Under other addresses nothing
passes, in no protocol: IPv4 and IPv6 by their source, ARP by its sender, neighbour discovery by what it states. Frames
of other protocols, or with a tag, are none that a pod's addresses are good for.

A SYN opens a flow and never answers one, so it can be judged here too: this also holds where a bridge switches between
two pods of a node, without the node's prerouting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from enforcer_daemon.dataplane.guard_egress import DESTINATIONS, own_addresses
from enforcer_daemon.dataplane.guard_rules import (
    ALLOWS_ALL,
    FIRST_SYN,
    NAME,
    GuardedEndpoint,
    address_rule,
    chain_name,
    counted_drops,
    discard,
    drop,
    framed_networks,
    framed_syns,
    listed,
    refill,
)
from enforcer_daemon.model import IPAddress, IPNetwork
from enforcer_daemon.reasons import Reason

TABLE = f"netdev {NAME}"
_PRIORITY = -200  # before what a CNI may hang there
_LINK, _SENDER, _SYN = "link", "from", "syn"
_REASONS = (Reason.SPOOFED_SOURCE, Reason.SPOOFED_NEIGHBOUR, Reason.NOT_IP, Reason.EGRESS_DENIED)
_UNNAMED = "{ nd-neighbor-solicit, mld-listener-report, mld-listener-done, mld2-listener-report }"
"""What a host sends before it has an address."""
_STATED = "@th,64,128"
"""Target of a neighbour solicitation or advertisement (RFC 4861, section 4.3): nft has no name for it before 1.0.9."""


def skeleton(networks: Iterable[IPNetwork]) -> list[str]:
    """Give what the endpoints' rules hang on; `networks` are those that frames are sent to."""
    return [*counted_drops(TABLE, _REASONS), *framed_networks(TABLE, networks)]


def apply_lines(before: GuardedEndpoint | None, after: GuardedEndpoint) -> list[str]:
    """Bring an endpoint from what was applied before (None: nothing) to `after`."""
    sender, syn = (chain_name(prefix, after.attachment) for prefix in (_SENDER, _SYN))
    known = () if before is None else before.links.names
    lines = refill(TABLE, syn, _syn_rules(after)) + refill(TABLE, sender, _sender_rules(after, syn))
    for name in known:
        if name not in after.links.names:
            lines += discard(TABLE, chain_name(_LINK, after.attachment, name))
    for name in after.links.names:
        if name not in known:
            link = chain_name(_LINK, after.attachment, name)
            hook = f'type filter hook ingress device "{name}" priority {_PRIORITY}; policy accept;'
            lines += [f"add chain {TABLE} {link} {{ {hook} }}", f"add rule {TABLE} {link} goto {sender}"]
    return lines


def remove_lines(before: GuardedEndpoint) -> list[str]:
    """Take an endpoint away; its interface may be gone already."""
    links = [chain_name(_LINK, before.attachment, name) for name in before.links.names]
    chains = [*links, chain_name(_SENDER, before.attachment), chain_name(_SYN, before.attachment)]
    return [line for chain in chains for line in discard(TABLE, chain)]


def _sender_rules(endpoint: GuardedEndpoint, syn: str) -> list[str]:
    link_locals = endpoint.links.link_locals
    own4, own6 = endpoint.addresses_of(4), (*endpoint.addresses_of(6), *link_locals)
    neighbour, source = drop(Reason.SPOOFED_NEIGHBOUR), drop(Reason.SPOOFED_SOURCE)
    return [
        f"ether type != {{ ip, ip6, arp }} {drop(Reason.NOT_IP)}",
        *_arp_rules(own4),
        # Solicitations from :: are those of duplicate address detection: about an address that the sender wants.
        f"icmpv6 type {{ nd-router-advert, nd-redirect }} {neighbour}",
        f"icmpv6 type nd-neighbor-advert {_unless_stated(own6)}{neighbour}",
        f"ip6 saddr :: icmpv6 type nd-neighbor-solicit {_unless_stated(own6)}{neighbour}",
        f"ip6 saddr :: icmpv6 type {_UNNAMED} accept",
        *([f"ip6 saddr {listed(link_locals)} meta l4proto ipv6-icmp accept"] if link_locals else []),
        *_source_rules("ip", own4, source),
        *_source_rules("ip6", endpoint.addresses_of(6), source),
        # A port that is not in the first fragment can be judged by nobody; TCP is not fragmented by its sender.
        *([] if endpoint.egress == ALLOWS_ALL else _fragment_rules()),
        f"{FIRST_SYN} goto {syn}",
        "accept",
    ]


def _arp_rules(own: Sequence[IPAddress]) -> list[str]:
    allowed = listed([*own, "0.0.0.0"])  # noqa: S104 - a probe for a duplicate address (RFC 5227)
    return [f"ether type arp arp saddr ip {allowed} accept", f"ether type arp {drop(Reason.SPOOFED_NEIGHBOUR)}"]


def _unless_stated(own: Sequence[IPAddress]) -> str:
    return f"{_STATED} != {listed(f'0x{address.packed.hex()}' for address in own)} " if own else ""


def _source_rules(family: str, own: Sequence[IPAddress], refusal: str) -> list[str]:
    match = f"{family} saddr != {listed(own)}" if own else f"meta protocol {family}"
    return [f"{match} {refusal}"]


def _fragment_rules() -> list[str]:
    refusal = drop(Reason.EGRESS_DENIED)
    return [
        f"ip protocol tcp ip frag-off & 0x3fff != 0 {refusal}",
        f"exthdr frag exists meta l4proto tcp {refusal}",
    ]


def _syn_rules(endpoint: GuardedEndpoint) -> list[str]:
    if endpoint.egress == ALLOWS_ALL:
        return ["accept"]
    return [
        *framed_syns(),
        *own_addresses(endpoint),
        *(address_rule(rule, *DESTINATIONS) for rule in endpoint.egress),
        drop(Reason.EGRESS_DENIED),
    ]
