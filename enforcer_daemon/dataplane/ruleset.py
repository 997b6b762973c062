# SPDX-License-Identifier: Apache-2.0
"""The rules inside a pod's network namespace, as data: which packets go to the enforcer, and which stay in the kernel.

`RULES` is the one list. `rules_nft` and `rules_iptables` render it for their tools, and docs/dataplane.md shows it as a
table. The rules see packets of the registered interfaces only, in both directions; the first rule that matches decides.

The hooks are mangle PREROUTING and POSTROUTING: there a packet is what the remote sees, also with a sidecar that
redirects; only the source port of an answer is then still the sidecar's. If a base chain is deleted, the kernel drops
all packets that wait in any queue of the namespace, so a second application only refills chains.

To add a match: a member of `Match` with the text for the table, its text in each renderer, and a rule here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from enforcer_daemon.dataplane.ratelimits import QueueLimits
from enforcer_daemon.marks import FORGET, INDEX_MASK, RELEASED
from enforcer_daemon.model import Direction, IPAddress

Family = Literal[4, 6]
FAMILIES: tuple[Family, ...] = (4, 6)

MAX_SMALL_SYN_BYTES: dict[Family, int] = {4: 80, 6: 100}
"""IP length of a SYN with all its options and no data (20 + 60, 40 + 60); one that carries a frame has over 500."""
QUEUE_NUMBER = 47_474
"""NFQUEUE number inside each pod's network namespace; the next number counts what exceeds the rates (overflow.py). Only
another NFQUEUE program inside a pod could collide, and those count from 0."""
VERDICT_BITS = FORGET | RELEASED
"""Any of them in a packet's mark: the enforcer's verdict sent the packet through the hook again."""
CONSUMED_MASK = RELEASED | INDEX_MASK
"""What a consumed packet leaves in its connection's mark."""


class Match(Enum):
    """What a rule looks for, with the words of the table in docs/dataplane.md."""

    VERDICT_MARK = "sent through the hook again by the enforcer's verdict"
    FRAGMENT = "IPv4 fragment that conntrack did not reassemble (a process set IP_NODEFRAG)"
    SYN = "TCP with SYN"
    FIRST_SYN = "SYN alone"
    SYN_ACK = "SYN-ACK"
    SMALL = "without data (IPv4 up to 80 bytes, IPv6 up to 100)"
    FROM_NODE = "from an address of the node"
    TO_NODE = "to an address of the node"
    OF_NODE = "of a connection that the node opened"
    MESSAGE = "UDP with a handshake's message"
    MARKED = "UDP with the [marker](flows.md#marker)"
    ESTABLISHED = "of an established flow, or of the node's"
    ICMP = "ICMP, ICMPv6 (neighbor discovery, MLD), IGMP"
    NOT_TCP = "not TCP"
    NEW_FLOW = "first of its flow"


class Target(Enum):
    """What a rule does with the packet, other than to queue it."""

    FOLLOW_MARK = "follow the mark (below)"
    ACCEPT = "accept"
    DROP = "drop"
    NODE_FLOW = "the flow becomes the node's; accept"


class Reply(Enum):
    """Which packets tell the enforcer, by a bit of their mark, that they go against their flow's direction."""

    NONE = "none"
    DATAGRAMS = "datagrams"
    """Those of UDP and SCTP."""
    ANY = "any"


@dataclass(frozen=True, slots=True)
class Queue:
    """Send the packet to the enforcer; drop and count it beyond the rate of its kind (ratelimits.py).

    There is no bypass: without an enforcer the kernel drops the packet.
    """

    kind: Literal["syn", "message", "other"]
    """Whose rate counts; each direction has its own."""
    shows_connection: bool = False
    """Whether the packet's mark shows the enforcer the mark of its connection."""
    reply: Reply = Reply.DATAGRAMS


@dataclass(frozen=True, slots=True)
class Branch:
    """Go to a chain of its own, which decides."""

    name: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """If all of `matches` hold for a packet in one of `directions`, do the action."""

    matches: tuple[Match, ...]
    action: Target | Queue | Branch
    directions: tuple[Direction, ...] = (Direction.INGRESS, Direction.EGRESS)


_IN, _OUT = (Direction.INGRESS,), (Direction.EGRESS,)
_MESSAGES = Branch("message", (Rule((), Queue("message", shows_connection=True), _IN),))

RULES: tuple[Rule, ...] = (
    Rule((Match.VERDICT_MARK,), Target.FOLLOW_MARK),
    Rule((Match.FRAGMENT,), Target.DROP),
    # A SYN goes to the enforcer before an established flow is accepted: a reused 4-tuple inherits nothing.
    Rule(
        (Match.SYN,),
        Branch(
            "syn",
            (
                Rule((Match.FIRST_SYN, Match.SMALL, Match.FROM_NODE), Target.NODE_FLOW, _IN),
                Rule((Match.SYN_ACK, Match.OF_NODE, Match.TO_NODE), Target.NODE_FLOW, _OUT),
                Rule((), Queue("syn", shows_connection=True, reply=Reply.ANY), _IN),
                Rule((), Queue("syn", shows_connection=True, reply=Reply.NONE), _OUT),
            ),
        ),
    ),
    Rule((Match.MESSAGE,), _MESSAGES, _IN),
    # A guard marks packets without a message too, in flows that it does not know: they are evaluated like these.
    Rule((Match.MARKED,), _MESSAGES, _IN),
    Rule((Match.ESTABLISHED,), Target.ACCEPT),
    Rule((Match.ICMP,), Target.ACCEPT),
    Rule((Match.NOT_TCP, Match.NEW_FLOW, Match.FROM_NODE), Target.NODE_FLOW, _IN),
    Rule((), Queue("other")),
)


@dataclass(frozen=True, slots=True)
class EndpointRules:
    """What the rules of one pod's network namespace depend on."""

    ifnames: tuple[str, ...]
    """The registered interfaces; the rules ignore packets of others, and of lo."""
    queue_number: int
    node_addresses: frozenset[IPAddress]
    """All addresses of the node that a pod can see as a source."""
    limits: QueueLimits
    """How fast packets may be queued."""


def rules_of(rules: Iterable[Rule], direction: Direction) -> tuple[Rule, ...]:
    """Return the rules of one direction."""
    return tuple(rule for rule in rules if direction in rule.directions)


def branches(direction: Direction) -> dict[str, tuple[Rule, ...]]:
    """Return the chains that the rules of a direction branch to, by name."""
    found = [rule.action for rule in rules_of(RULES, direction) if isinstance(rule.action, Branch)]
    return {branch.name: rules_of(branch.rules, direction) for branch in found}


def of_family(addresses: Iterable[IPAddress], family: Family) -> list[IPAddress]:
    """Return the addresses of a family, sorted, so that the same rules give the same text."""
    return sorted((address for address in addresses if address.version == family), key=int)


def rules_table() -> Iterator[tuple[str, str, str]]:
    """Yield the lines of the table in docs/dataplane.md: packet, direction, action."""
    yield from _lines(RULES, ())


def _lines(rules: Iterable[Rule], above: tuple[Match, ...]) -> Iterator[tuple[str, str, str]]:
    for rule in rules:
        matches = (*above, *rule.matches)
        if isinstance(rule.action, Branch):
            yield from _lines(rule.action.rules, matches)
            continue
        packet = ", ".join(match.value for match in matches) or "any other"
        direction = "both" if len(rule.directions) == len(Direction) else rule.directions[0].value
        yield packet, direction, rule.action.value if isinstance(rule.action, Target) else _queue_line(rule.action)


def _queue_line(queue: Queue) -> str:
    shown = "; its mark shows the connection's" if queue.shows_connection else ""
    return f"to the enforcer{shown}"
