# SPDX-License-Identifier: Apache-2.0
"""Renders the rules of a pod's network namespace for nft (ruleset.py). Source: nft(8)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import assert_never

from enforcer_daemon.dataplane.ratelimits import nft_limits, nft_sets
from enforcer_daemon.dataplane.ruleset import (
    CONSUMED_MASK,
    FAMILIES,
    MAX_SMALL_SYN_BYTES,
    RULES,
    VERDICT_BITS,
    Branch,
    EndpointRules,
    Family,
    Match,
    Queue,
    Reply,
    Rule,
    Target,
    branches,
    of_family,
    rules_of,
)
from enforcer_daemon.handshake.frames import MAGIC, MARKER_ID, PROOF_MARKER_ID
from enforcer_daemon.marks import CONSUME, FORGET, NODE, OWN_MASK, RELEASED, REPLY, UNTRACKED
from enforcer_daemon.model import Direction, IPAddress

NFT_TABLE = "trireme"
NFT_NODE_SETS = ("node4", "node6")
OTHERS_MASK = OWN_MASK ^ 0xFFFF_FFFF

_IPV6_HEADER_BYTES = 40
_SUFFIX = {Direction.INGRESS: "in", Direction.EGRESS: "out"}
_KINDS = ("syn-in", "syn-out", "message-in", "other-in", "other-out")
_MATCHES = {
    Match.VERDICT_MARK: f"meta mark & {VERDICT_BITS:#x} != 0",
    Match.FRAGMENT: "ip frag-off & 0x1fff != 0",
    Match.SYN: "tcp flags & syn == syn",
    Match.FIRST_SYN: "tcp flags & (fin | syn | rst | ack) == syn",
    Match.SYN_ACK: "tcp flags & (syn | ack) == (syn | ack)",
    Match.OF_NODE: f"ct mark & {NODE:#x} != 0",
    # nft cannot compute where the surplus area begins, so a piggybacked message is told by its packet's marker.
    Match.MESSAGE: f"udp length 8 @th,128,32 == 0x{MAGIC.hex()}",
    Match.ESTABLISHED: f"ct mark & {RELEASED | NODE:#x} != 0",
    Match.ICMP: "meta l4proto { icmp, igmp, ipv6-icmp }",
    Match.NOT_TCP: "meta l4proto != tcp",
    Match.NEW_FLOW: "ct state new",
}
_MATCHES_BY_FAMILY: dict[Match, dict[Family, str]] = {
    Match.SMALL: {
        4: f"ip length <= {MAX_SMALL_SYN_BYTES[4]}",
        6: f"ip6 length <= {MAX_SMALL_SYN_BYTES[6] - _IPV6_HEADER_BYTES}",
    },
    Match.FROM_NODE: {4: "ip saddr @node4", 6: "ip6 saddr @node6"},
    Match.TO_NODE: {4: "ip daddr @node4", 6: "ip6 daddr @node6"},
    Match.MARKED: {
        4: f"meta l4proto udp ip id {MARKER_ID:#x}-{PROOF_MARKER_ID:#x}",
        6: f"meta l4proto udp ip6 flowlabel {MARKER_ID:#x}-{PROOF_MARKER_ID:#x}",
    },
}
_TARGETS = {
    Target.FOLLOW_MARK: "goto repeated",
    Target.ACCEPT: "accept",
    Target.DROP: "drop",
    Target.NODE_FLOW: "goto node",
}
_IS_UNMARKED = f"ct mark & {OWN_MASK:#x} == 0"
_CLEAR = f"meta mark set meta mark & {OTHERS_MASK:#x}"
_TELL_REPLY = f"ct direction reply meta mark set meta mark | {REPLY:#x}"
_REPLIES = {
    Reply.NONE: (),
    Reply.DATAGRAMS: (f"meta l4proto {{ udp, sctp }} {_TELL_REPLY}",),
    Reply.ANY: (_TELL_REPLY,),
}


def render_nft(rules: EndpointRules) -> str:
    """Return one transaction for `nft -f -` that makes our table or refills it; base chains stay where they are."""
    interfaces = "{ " + ", ".join(f'"{name}"' for name in rules.ifnames) + " }"
    bases = {
        # The packet's mark, as the pod's processes and other rules could set it: before anything else saves it, and
        # right before we read it. One before mangle (-150), so that no chain of another table comes in between.
        "clear_output": (
            "output",
            -300,
            (f"meta l4proto udp meta mark & {OWN_MASK:#x} == {UNTRACKED:#x} notrack", _CLEAR),
        ),
        "clear_prerouting": ("prerouting", -152, (_CLEAR,)),
        "clear_postrouting": ("postrouting", -152, (_CLEAR,)),
        "ingress": ("prerouting", -151, (f"iifname {interfaces} goto main_in",)),
        "egress": ("postrouting", -151, (f"oifname {interfaces} goto main_out",)),
    }
    table = f"inet {NFT_TABLE}"
    lines = [
        f"add table {table}",
        f"add set {table} node4 {{ type ipv4_addr; }}",
        f"add set {table} node6 {{ type ipv6_addr; }}",
    ]
    for kind in _KINDS:
        lines += nft_sets(table, kind)
    for name, (hook, priority, _) in bases.items():
        lines.append(f"add chain {table} {name} {{ type filter hook {hook} priority {priority}; policy accept; }}")
    regular = _chains(rules) | _marking_chains()
    lines += [f"add chain {table} {name}" for name in regular]
    lines.append(f"flush table {table}")
    contents = {name: base[2] for name, base in bases.items()} | regular
    lines += [f"add rule {table} {name} {rule}" for name, chain_rules in contents.items() for rule in chain_rules]
    return "\n".join(lines) + "\n" + render_nft_addresses(rules.node_addresses)


def render_nft_addresses(addresses: Iterable[IPAddress]) -> str:
    """Return one transaction that replaces the node's addresses."""
    known = tuple(addresses)
    lines: list[str] = []
    for family in FAMILIES:
        lines.append(f"flush set inet {NFT_TABLE} node{family}")
        own = of_family(known, family)
        if own:
            lines.append(f"add element inet {NFT_TABLE} node{family} {{ {', '.join(map(str, own))} }}")
    return "\n".join(lines) + "\n"


def nft_rule_counts(rules: EndpointRules) -> dict[str, int]:
    """Return chain -> number of rules, as a listing of the table must show them."""
    counts: dict[str, int] = {}
    for line in render_nft(rules).splitlines():
        words = line.split()
        if words[:2] == ["add", "chain"]:
            counts[words[4]] = 0
        elif words[:2] == ["add", "rule"]:
            counts[words[4]] += 1
    return counts


def _chains(rules: EndpointRules) -> dict[str, tuple[str, ...]]:
    chains: dict[str, tuple[str, ...]] = {}
    for direction in Direction:
        named = {"main": rules_of(RULES, direction)} | branches(direction)
        for name, members in named.items():
            lines = [line for rule in members for line in _rule_lines(rule, rules, direction)]
            chains[f"{name}_{_SUFFIX[direction]}"] = tuple(lines)
    return chains


def _rule_lines(rule: Rule, rules: EndpointRules, direction: Direction) -> Iterator[str]:
    for match, line in product(_match_lines(rule.matches), _action_lines(rule.action, rules, direction)):
        yield f"{match} {line}".lstrip()


def _match_lines(matches: tuple[Match, ...]) -> list[str]:
    """Return the conditions once for each family, or once if they are the same for both."""
    by_family = [
        " ".join(_MATCHES.get(match) or _MATCHES_BY_FAMILY[match][family] for match in matches) for family in FAMILIES
    ]
    return list(dict.fromkeys(by_family))


def _action_lines(action: Target | Queue | Branch, rules: EndpointRules, direction: Direction) -> tuple[str, ...]:
    match action:
        case Target():
            return (_TARGETS[action],)
        case Branch():
            return (f"goto {action.name}_{_SUFFIX[direction]}",)
        case Queue():
            return _queue_lines(action, rules, direction)
    assert_never(action)


def _queue_lines(queue: Queue, rules: EndpointRules, direction: Direction) -> tuple[str, ...]:
    kind = f"{queue.kind}-{_SUFFIX[direction]}"
    limits = nft_limits(rules.limits, kind, rules.queue_number, is_ingress=direction is Direction.INGRESS)
    send = (*_REPLIES[queue.reply], f"queue num {rules.queue_number}")
    if not queue.shows_connection:
        return *limits, *send
    return *limits, *(f"{_IS_UNMARKED} {line}" for line in send), *_copy("meta mark", "ct mark"), *send


def _marking_chains() -> dict[str, tuple[str, ...]]:
    """Return the chains that save a verdict's mark to the connection, and end there."""
    return {
        "repeated": (
            f"meta mark & {CONSUME:#x} == {CONSUME:#x} goto consume",
            f"meta mark & {FORGET:#x} != 0 ct mark set ct mark & {OTHERS_MASK:#x} goto done",
            f"ct mark & {OTHERS_MASK:#x} == 0 ct mark set meta mark & {OWN_MASK:#x} goto done",
            *_copy("ct mark", "meta mark"),
            "goto done",
        ),
        "consume": (*_copy("ct mark", "meta mark", CONSUMED_MASK), "drop"),
        "node": (f"ct mark set ct mark & {OTHERS_MASK:#x} | {NODE:#x}", "goto done"),
        "done": (_CLEAR, "accept"),
    }


def _copy(target: str, source: str, mask: int = OWN_MASK) -> Iterator[str]:
    """Copy our bits of one mark to the other, whose other bits stay.

    Older kernels and nft cannot combine two marks in one expression, so each bit is set by a rule with constants. Few
    packets come here: if the bits to copy or the bits to keep are all zero, a rule before this does it at once.
    """
    yield f"{target} set {target} & {OTHERS_MASK:#x}"
    for bit in (1 << n for n in range(31, -1, -1) if mask >> n & 1):
        yield f"{source} & {bit:#x} != 0 {target} set {target} | {bit:#x}"
