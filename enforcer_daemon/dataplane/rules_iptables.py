# SPDX-License-Identifier: Apache-2.0
"""Renders the rules of a pod's network namespace for iptables (ruleset.py). Source: iptables-extensions(8)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import assert_never

from enforcer_daemon.dataplane.ratelimits import iptables_limits
from enforcer_daemon.dataplane.ruleset import (
    CONSUMED_MASK,
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


@dataclass(frozen=True, slots=True)
class Jump:
    """The way from a built-in chain of iptables into ours."""

    table: str
    builtin: str
    chain: str

    @property
    def rule(self) -> str:
        """Return the jump as iptables-save writes it, without the leading -A."""
        return f"{self.builtin} -j {self.chain}"


IPTABLES_JUMPS = (
    Jump("raw", "PREROUTING", "TRIREME-CLEAR"),
    Jump("raw", "OUTPUT", "TRIREME-CLEAR"),
    # A sidecar's rule in mangle OUTPUT may put a connection's whole mark into a packet (CONNMARK --restore-mark).
    Jump("filter", "OUTPUT", "TRIREME-CLEAR"),
    Jump("filter", "FORWARD", "TRIREME-CLEAR"),
    Jump("mangle", "PREROUTING", "TRIREME-INGRESS"),
    Jump("mangle", "POSTROUTING", "TRIREME-EGRESS"),
)

_SUFFIX = {Direction.INGRESS: "IN", Direction.EGRESS: "OUT"}
_ADDRESS_CHAINS = {Match.FROM_NODE: ("TRIREME-FROM-NODE", "-s"), Match.TO_NODE: ("TRIREME-TO-NODE", "-d")}
"""The chains that set NODE in a packet's mark if one of its addresses is the node's; the rule that asked clears it."""
_MASKS = f"--nfmask {OWN_MASK:#x} --ctmask {OWN_MASK:#x}"
_IS_NODE_BIT = f"-m mark --mark {NODE:#x}/{NODE:#x}"
_CLEAR = f"-j MARK --set-xmark 0x0/{OWN_MASK:#x}"
_MATCHES = {
    Match.VERDICT_MARK: f"-m mark ! --mark 0x0/{VERDICT_BITS:#x}",
    Match.SYN: "-p tcp -m tcp --tcp-flags SYN SYN",
    Match.FIRST_SYN: "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN",
    Match.SYN_ACK: "-p tcp -m tcp --tcp-flags SYN,ACK SYN,ACK",
    Match.OF_NODE: f"-m connmark --mark {NODE:#x}/{NODE:#x}",
    Match.ESTABLISHED: f"-m connmark ! --mark 0x0/{RELEASED | NODE:#x}",
    Match.NOT_TCP: "! -p tcp",
    Match.NEW_FLOW: "-m conntrack --ctstate NEW",
}
# To the UDP header (past 4 times IHL; for IPv6 to 8 bytes before it), then on by the UDP length to the surplus area.
# There a message begins at one of two offsets, for even and odd UDP lengths (enforcer_daemon/packet/udp.py).
_MESSAGE_PLACES: dict[Family, tuple[str, ...]] = {
    4: tuple(f"0x0>>0x16&0x3c@0x4>>0x10@{at:#x}" for at in (8, 9)),
    6: tuple(f"0x0>>0x1c&0x4<<0x3@0xc>>0x10@{at:#x}" for at in (16, 17)),
}
_MARKERS = f"{MARKER_ID:#x}:{PROOF_MARKER_ID:#x}"
_MATCHES_BY_FAMILY: dict[Match, dict[Family, tuple[str, ...]]] = {
    Match.FRAGMENT: {4: ("-f",), 6: ()},
    Match.SMALL: {family: (f"-m length --length 0:{max_bytes}",) for family, max_bytes in MAX_SMALL_SYN_BYTES.items()},
    Match.MESSAGE: {
        family: tuple(f'-p udp -m u32 --u32 "{place}=0x{MAGIC.hex()}"' for place in places)
        for family, places in _MESSAGE_PLACES.items()
    },
    # The identification of IPv4, the flow label of IPv6.
    Match.MARKED: {
        4: (f'-p udp -m u32 --u32 "0x2&0xffff={_MARKERS}"',),
        6: (f'-p udp -m u32 --u32 "0x0&0xfffff={_MARKERS}"',),
    },
    Match.ICMP: {4: ("-p icmp", "-p igmp"), 6: ("-p ipv6-icmp",)},
}
# `-g` all the way, so that RETURN leaves our chains at once, and other rules of mangle get their turn.
_TARGETS = {
    Target.FOLLOW_MARK: "-g TRIREME-REPEATED",
    Target.ACCEPT: "-j RETURN",
    Target.DROP: "-j DROP",
    Target.NODE_FLOW: "-g TRIREME-NODE",
}
_TELL_REPLY = f"-m conntrack --ctdir REPLY -j MARK --set-xmark {REPLY:#x}/{REPLY:#x}"
_REPLIES = {
    Reply.NONE: (),
    Reply.DATAGRAMS: (f"-p udp {_TELL_REPLY}", f"-p sctp {_TELL_REPLY}"),
    Reply.ANY: (_TELL_REPLY,),
}


def render_iptables(rules: EndpointRules, family: Family) -> str:
    """Return our chains for iptables-restore --noflush, in the form that iptables-save gives back.

    A chain that is there is refilled, all of them at once. The jumps are not part of it, since they must not double.
    """
    return "".join(_restore_lines(table, chains) for table, chains in iptables_chains(rules, family).items())


def render_iptables_addresses(addresses: Iterable[IPAddress], family: Family) -> str:
    """Return the two chains that hold the node's addresses, for iptables-restore --noflush."""
    return _restore_lines("mangle", _address_chains(addresses, family))


def iptables_chains(rules: EndpointRules, family: Family) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return table -> chain of ours -> its rules."""
    untracked = f"-p udp -m mark --mark {UNTRACKED:#x}/{OWN_MASK:#x} -j CT --notrack"
    mangle = {
        "TRIREME-INGRESS": tuple(f"-i {name} -g TRIREME-IN" for name in rules.ifnames),
        "TRIREME-EGRESS": tuple(f"-o {name} -g TRIREME-OUT" for name in rules.ifnames),
    }
    for direction in Direction:
        named = {"": rules_of(RULES, direction)} | branches(direction)
        for name, members in named.items():
            lines = [line for rule in members for line in _rule_lines(rule, rules, direction, family)]
            mangle[_chain(name, direction)] = tuple(lines)
    return {
        "raw": {"TRIREME-CLEAR": (untracked, _CLEAR)},
        "filter": {"TRIREME-CLEAR": (_CLEAR,)},
        "mangle": mangle | _marking_chains() | _address_chains(rules.node_addresses, family),
    }


def _restore_lines(table: str, chains: dict[str, tuple[str, ...]]) -> str:
    declared = [f":{chain} - [0:0]" for chain in chains]
    filled = [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
    return "\n".join([f"*{table}", *declared, *filled, "COMMIT"]) + "\n"


def _chain(name: str, direction: Direction) -> str:
    return "-".join(filter(None, ("TRIREME", name.upper(), _SUFFIX[direction])))


def _rule_lines(rule: Rule, rules: EndpointRules, direction: Direction, family: Family) -> Iterator[str]:
    alternatives = [_match_texts(match, family) for match in rule.matches if match not in _ADDRESS_CHAINS]
    conditions = [" ".join(texts) for texts in product(*alternatives)]
    asked = next((_ADDRESS_CHAINS[match][0] for match in rule.matches if match in _ADDRESS_CHAINS), None)
    if asked is not None:
        yield from (f"{condition} -j {asked}" for condition in conditions)
        conditions = [_IS_NODE_BIT]
    for condition, line in product(conditions, _action_lines(rule.action, rules, direction)):
        yield f"{condition} {line}".lstrip()


def _match_texts(match: Match, family: Family) -> tuple[str, ...]:
    """Return the alternatives, of which each is a rule of its own; none: no packet of the family matches."""
    text = _MATCHES.get(match)
    return _MATCHES_BY_FAMILY[match][family] if text is None else (text,)


def _action_lines(action: Target | Queue | Branch, rules: EndpointRules, direction: Direction) -> tuple[str, ...]:
    match action:
        case Target():
            return (_TARGETS[action],)
        case Branch():
            return (f"-g {_chain(action.name, direction)}",)
        case Queue():
            return _queue_lines(action, rules, direction)
    assert_never(action)


def _queue_lines(queue: Queue, rules: EndpointRules, direction: Direction) -> tuple[str, ...]:
    kind = f"{queue.kind}-{_SUFFIX[direction].lower()}"
    limits = iptables_limits(rules.limits, kind, rules.queue_number, is_ingress=direction is Direction.INGRESS)
    shown = (f"-j CONNMARK --restore-mark {_MASKS}",) if queue.shows_connection else ()
    return *shown, *_REPLIES[queue.reply], *limits, f"-j NFQUEUE --queue-num {rules.queue_number}"


def _marking_chains() -> dict[str, tuple[str, ...]]:
    """Return the chains that save a verdict's mark to the connection, and end there."""
    return {
        "TRIREME-REPEATED": (
            f"-m mark --mark {CONSUME:#x}/{CONSUME:#x} -g TRIREME-CONSUME",
            f"-m mark --mark {FORGET:#x}/{FORGET:#x} -j CONNMARK --set-xmark 0x0/{OWN_MASK:#x}",
            f"-m mark --mark {RELEASED:#x}/{RELEASED:#x} -j CONNMARK --save-mark {_MASKS}",
            _CLEAR,
        ),
        "TRIREME-CONSUME": (
            f"-j CONNMARK --save-mark --nfmask {CONSUMED_MASK:#x} --ctmask {OWN_MASK:#x}",
            "-j DROP",
        ),
        "TRIREME-NODE": (f"-j CONNMARK --set-xmark {NODE:#x}/{OWN_MASK:#x}", _CLEAR),
    }


def _address_chains(addresses: Iterable[IPAddress], family: Family) -> dict[str, tuple[str, ...]]:
    own = of_family(addresses, family)
    length = 32 if family == 4 else 128
    mark = f"-j MARK --set-xmark {NODE:#x}/{NODE:#x}"
    return {
        chain: tuple(f"{option} {address}/{length} {mark}" for address in own)
        for chain, option in _ADDRESS_CHAINS.values()
    }
