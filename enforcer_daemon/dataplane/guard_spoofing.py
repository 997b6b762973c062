# SPDX-License-Identifier: Apache-2.0
"""The guard on a pod's interface: a pod speaks under its own addresses alone, and its SYNs obey its egress policy.

The chain stands at the ingress of the interface's end on the node, where every packet of the pod comes through,
whatever socket it was sent by. It is stateless, since conntrack is not known there. Under other addresses nothing
passes, in no protocol: IPv4 and IPv6 by their source, ARP by its sender, neighbor discovery by what it states. Frames
of other protocols, or with a tag, are none that a pod's addresses are good for.

A SYN opens a flow and never answers one, so it can be evaluated here too: this also holds where a bridge switches
between two pods of a node, without the node's prerouting. SYNs have a rate as well, above that of the rules inside the
pod, so that only what goes past those can reach it: a flood by packet socket ends before it costs the bridge,
conntrack, the network or another node anything.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from enforcer_daemon.dataplane.guard_egress import address_rules
from enforcer_daemon.dataplane.guard_rules import (
    ALLOWS_ALL,
    FIRST_SYN,
    NAME,
    GuardedEndpoint,
    chain_name,
    counted_drops,
    difference,
    discard,
    drop,
    node_elements,
    node_sets,
    refill,
)
from enforcer_daemon.dataplane.guard_vouched import framed_chain, framed_syns, virtual_sets
from enforcer_daemon.model import IPAddress, IPNetwork
from enforcer_daemon.reasons import Reason

TABLE = f"netdev {NAME}"
OFFENDERS = "offenders"
OPENINGS = "openings"
_MAX_OFFENDERS = 4_096
_PRIORITY = -200  # before what a CNI may hang there
_LINK, _STATED, _SYN = "link", "stated", "syn"
_OPENINGS_FORGOTTEN_AFTER_S = 2
"""Who is silent so long would have its whole burst again."""
_REASONS = (
    Reason.SPOOFED_SOURCE,
    Reason.SPOOFED_NEIGHBOUR,
    Reason.NOT_IP,
    Reason.PACKET_RATE,
)
_OFFENDER = f"update @{OFFENDERS} {{ iifname counter }}"
_SETS = {
    "senders4": "type ifname . ipv4_addr",
    "senders6": "type ifname . ipv6_addr",
    "locals6": "type ifname . ipv6_addr",
    "isolated": "type ifname",
}
_MAPS = {"stated": "type ifname : verdict", "opened": "type ifname : verdict"}
_UNNAMED = "{ mld-listener-report, mld-listener-done, mld2-listener-report }"
"""What a host sends before it has an address, beside its solicitations."""
_MAY_HIDE_TCP = "{ 6, 0, 43, 44, 51, 60 }"
"""What the fragmented part of a packet of IPv6 begins with, which each of its pieces says: TCP, or an extension header
(RFC 8200), behind which TCP may follow in another piece."""


def skeleton(
    networks: Iterable[IPNetwork],
    syns_per_s: int,
    node_addresses: Iterable[IPAddress] = (),
    pod_networks: Container[IPNetwork] = (),
) -> list[str]:
    """Return what the endpoints hang on; `networks` are those that frames are sent to, before any translation."""
    known = tuple(networks)
    forgotten = f"flags dynamic,timeout; timeout {_OPENINGS_FORGOTTEN_AFTER_S}s;"
    lines = [f"add set {TABLE} {name} {{ {kind}; }}" for name, kind in _SETS.items()]
    lines += [f"add map {TABLE} {name} {{ {kind}; }}" for name, kind in _MAPS.items()]
    lines += [
        f"add set {TABLE} {OFFENDERS} {{ type ifname; size {_MAX_OFFENDERS}; flags dynamic; }}",
        f"add set {TABLE} {OPENINGS} {{ type ifname; size {_MAX_OFFENDERS}; {forgotten} }}",
        *counted_drops(TABLE, _REASONS, _OFFENDER),
        # Only here the sender is known: the daemon tells the pod's denials by it.
        *counted_drops(TABLE, (Reason.EGRESS_DENIED,), _OFFENDER, is_logged=True),
        *framed_chain(TABLE, known),
        *virtual_sets(TABLE, known, pod_networks),
        *node_sets(TABLE),
    ]
    for chain, rules in (
        ("from_link_local", _LINK_LOCAL_RULES),
        ("checked", (*_SENDER_RULES, *_opening_rules())),
        ("sent", (_rate_rule(syns_per_s), "goto checked")),
        ("answers", (*_answers_to_node(), "goto sent")),
        ("entered", ("tcp flags & (syn | ack) == (syn | ack) goto answers", "goto sent")),
    ):
        lines += refill(TABLE, chain, rules)
    return lines + address_lines(node_addresses)


def address_lines(node_addresses: Iterable[IPAddress]) -> list[str]:
    """Replace the node's addresses."""
    return node_elements(TABLE, node_addresses)


def _answers_to_node() -> tuple[str, ...]:
    """Write the rules for SYN-ACKs to the node's own connections, which have no rate inside the pod either.

    More of them gain a pod nothing: without a SYN of the node they cost the node what any segment does, and other
    segments have no rate.
    """
    return "ip daddr @node4 goto checked", "ip6 daddr @node6 goto checked"


_LINK_LOCAL_RULES = ("icmpv6 type nd-neighbor-advert iifname vmap @stated", "accept")
_SENDER_RULES = (
    f"ether type != {{ ip, ip6, arp }} {drop(Reason.NOT_IP)}",
    "ether type arp arp saddr ip 0.0.0.0 accept",  # a probe for a duplicate address (RFC 5227)
    "ether type arp iifname . arp saddr ip @senders4 accept",
    f"ether type arp {drop(Reason.SPOOFED_NEIGHBOUR)}",
    f"icmpv6 type {{ nd-router-advert, nd-redirect }} {drop(Reason.SPOOFED_NEIGHBOUR)}",
    # A solicitation from :: is that of duplicate address detection: about an address that the sender wants.
    "ip6 saddr :: icmpv6 type nd-neighbor-solicit iifname vmap @stated",
    f"ip6 saddr :: icmpv6 type {_UNNAMED} accept",
    "meta l4proto ipv6-icmp iifname . ip6 saddr @locals6 goto from_link_local",
    f"meta protocol ip iifname . ip saddr != @senders4 {drop(Reason.SPOOFED_SOURCE)}",
    f"meta protocol ip6 iifname . ip6 saddr != @senders6 {drop(Reason.SPOOFED_SOURCE)}",
    "icmpv6 type nd-neighbor-advert iifname vmap @stated",
)


def _rate_rule(syns_per_s: int) -> str:
    rate = f"limit rate over {syns_per_s}/second burst {syns_per_s} packets"
    return f"tcp flags & syn == syn update @{OPENINGS} {{ iifname {rate} }} {drop(Reason.PACKET_RATE)}"


def _opening_rules() -> tuple[str, ...]:
    refusal = drop(Reason.EGRESS_DENIED)
    return (
        # A port that is not in the first fragment can be evaluated by nobody; TCP is not fragmented by its sender.
        f"ip protocol tcp ip frag-off & 0x3fff != 0 iifname @isolated {refusal}",
        f"frag nexthdr {_MAY_HIDE_TCP} iifname @isolated {refusal}",
        f"{FIRST_SYN} iifname vmap @opened",
        "accept",
    )


def apply_lines(before: GuardedEndpoint | None, after: GuardedEndpoint, absent: Container[str] = ()) -> list[str]:
    """Bring an endpoint from what was applied before (None: nothing) to `after`.

    `absent` interfaces have vanished, with their pod: kernels before 6.16 refuse chains on them.
    """
    stated, syn = (chain_name(prefix, after.attachment) for prefix in (_STATED, _SYN))
    known = () if before is None else before.links.names
    lines = refill(TABLE, stated, _stated_rules(after))
    if after.egress != ALLOWS_ALL:
        framed = framed_syns(by_identity=after.by_identity) if after.egress or after.by_identity else []
        lines += refill(TABLE, syn, [*framed, *address_rules(after), drop(Reason.EGRESS_DENIED)])
    lines += difference(TABLE, _elements(before), _elements(after))
    if before is not None and before.egress != ALLOWS_ALL and after.egress == ALLOWS_ALL:
        lines += discard(TABLE, syn)
    for name in known:
        if name not in after.links.names:
            lines += discard(TABLE, chain_name(_LINK, after.attachment, name))
    for name in after.links.names:
        if name not in known and name not in absent:
            link = chain_name(_LINK, after.attachment, name)
            hook = f'type filter hook ingress device "{name}" priority {_PRIORITY}; policy accept;'
            lines += [f"add chain {TABLE} {link} {{ {hook} }}", f"add rule {TABLE} {link} goto entered"]
    return lines


def remove_lines(before: GuardedEndpoint) -> list[str]:
    """Take an endpoint away; its interface may be gone already."""
    chains = [chain_name(_LINK, before.attachment, name) for name in before.links.names]
    lines = [line for chain in chains for line in discard(TABLE, chain)]
    lines += difference(TABLE, _elements(before), _elements(None))
    for prefix in (_STATED, _SYN):
        lines += discard(TABLE, chain_name(prefix, before.attachment))
    return lines


def _elements(endpoint: GuardedEndpoint | None) -> dict[str, str]:
    """Return the endpoint's elements: their sets and keys, and for maps what they lead to."""
    found: dict[str, str] = {}
    if endpoint is None:
        return found
    stated, syn = (chain_name(prefix, endpoint.attachment) for prefix in (_STATED, _SYN))
    for name in endpoint.links.names:
        found |= {f'senders{address.version} "{name}" . {address}': "" for address in endpoint.addresses}
        found |= {f'locals6 "{name}" . {address}': "" for address in endpoint.links.link_locals}
        found[f'stated "{name}"'] = f"jump {stated}"
        if endpoint.egress != ALLOWS_ALL:
            found |= {f'isolated "{name}"': "", f'opened "{name}"': f"goto {syn}"}
    return found


def _stated_rules(endpoint: GuardedEndpoint) -> list[str]:
    """Compare the target that is spoken for (RFC 4861, section 4.3); nft has no name for it before 1.0.9.

    What is the pod's own returns to the rules that follow; a solicitation from :: ends here.
    """
    own = (*endpoint.addresses_of(6), *endpoint.links.link_locals)
    return [
        *(f"icmpv6 type nd-neighbor-solicit @th,64,128 0x{address.packed.hex()} accept" for address in own),
        *(f"@th,64,128 0x{address.packed.hex()} return" for address in own),
        drop(Reason.SPOOFED_NEIGHBOUR),
    ]
