# SPDX-License-Identifier: Apache-2.0
"""The rules inside a pod's network namespace, as text: which packets the enforcer sees, and which stay in the kernel.

Both renderings say the same, for packets of the registered interfaces alone, in this order:

    entry      our bits of the packet's mark are cleared, so that SO_MARK gains a process nothing
    repeated   FORGET: our bits leave the connection; RELEASED: they are saved to it; go on
    fragment   of an IPv4 packet that conntrack did not put together (IP_NODEFRAG): drop
    SYN        small, from the node, inwards: the connection is the node's; go on
    SYN-ACK    of the node's connection, outwards, to the node: go on
    SYN        any other: the connection's bits into the packet's mark, to the enforcer; one that arrives against its
               connection's direction is told by a bit
    message    of a handshake beside a datagram, inwards: likewise; told by itself, or by the marker in the IP header
    released   or the node's connection: go on
    ICMP       ICMPv6 (NDP, MLD) and IGMP: go on; no NetworkPolicy speaks of them
    new flow   not TCP, from the node, inwards: the flow is the node's; go on
    reply      a datagram against its flow's direction: told by a bit of the packet's mark
    rate       of what goes to the enforcer: dropped and counted beyond it (ratelimits.py)
    rest       to the enforcer; no bypass: without an enforcer the packet is dropped

The hooks are mangle PREROUTING and POSTROUTING: there a packet is what the remote sees, also beside a sidecar that
redirects; only the source port of an answer is then still the sidecar's. To take a base chain away makes the kernel
drop all packets that wait in any queue of the namespace; so a second application only refills chains. Sources:
iptables-extensions(8), nft(8), RFC 9293 (flags).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from enforcer_daemon.dataplane.ratelimits import QueueLimits, iptables_limits, nft_limits, nft_sets
from enforcer_daemon.handshake.frames import MAGIC, MARKER_ID, PROOF_MARKER_ID
from enforcer_daemon.marks import CONSUME, FORGET, INDEX_MASK, NODE, OWN_MASK, RELEASED, REPLY, UNTRACKED
from enforcer_daemon.model import IPAddress

Family = Literal[4, 6]
Kind = Literal["syn-in", "syn-out", "message-in", "other-in", "other-out"]
"""What is queued, as the limits of its rate tell it apart."""
_KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_SMALL_SYN_BYTES: dict[Family, int] = {4: 80, 6: 100}
"""IP length of a SYN with all its options and no data (20 + 60, 40 + 60); one that carries a frame has over 500."""

OTHERS_MASK = OWN_MASK ^ 0xFFFF_FFFF
NFT_TABLE = "trireme"
NFT_NODE_SETS = ("node4", "node6")


@dataclass(frozen=True, slots=True)
class EndpointRules:
    """What the rules of one pod's network namespace depend on."""

    ifnames: tuple[str, ...]
    """The registered interfaces; packets of others, and of lo, are left alone."""
    queue_number: int
    node_addresses: frozenset[IPAddress]
    """All addresses of the node that a pod can see as a source."""
    limits: QueueLimits
    """How fast packets may be queued."""


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

_ADDRESS_CHAINS = ("TRIREME-FROM-NODE", "TRIREME-TO-NODE")
_MASKS = f"--nfmask {OWN_MASK:#x} --ctmask {OWN_MASK:#x}"
_CLEAR_PACKET = f"-j MARK --set-xmark 0x0/{OWN_MASK:#x}"
_IS_SYN = "-p tcp -m tcp --tcp-flags SYN SYN"
_IS_FIRST_SYN = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN"
_IS_SYN_ACK = "-p tcp -m tcp --tcp-flags SYN,ACK SYN,ACK"
_ICMP: dict[Family, str] = {4: "icmp", 6: "ipv6-icmp"}
_SAVED_MASK = RELEASED | INDEX_MASK
"""What a consumed packet leaves in its connection's mark."""
# To the UDP header (past 4 times IHL; for IPv6 to 8 bytes before it), then on by the UDP length to the surplus area.
_TO_SURPLUS: dict[Family, str] = {4: "0x0>>0x16&0x3c@0x4>>0x10@", 6: "0x0>>0x1c&0x4<<0x3@0xc>>0x10@"}
_SURPLUS_AT: dict[Family, int] = {4: 0, 6: 8}
_MAGIC_AT = (8, 9)
"""Where a message begins in the surplus area, for even and odd UDP lengths (enforcer_daemon/packet/udp.py)."""
_MARKER: dict[Family, str] = {
    4: f"0x2&0xffff={MARKER_ID:#x}:{PROOF_MARKER_ID:#x}",
    6: f"0x0&0xfffff={MARKER_ID:#x}:{PROOF_MARKER_ID:#x}",
}
"""The identification of IPv4, the flow label of IPv6."""
_TELL_REPLY = f"-m conntrack --ctdir REPLY -j MARK --set-xmark {REPLY:#x}/{REPLY:#x}"
_IS_REPLY = f"-p udp {_TELL_REPLY}"


def render_iptables(rules: EndpointRules, family: Family) -> str:
    """Return our chains for iptables-restore --noflush, in the form that iptables-save gives back.

    A chain that is there is refilled, all of them at once. The jumps are not part of it, since they must not double.
    """
    chains = iptables_chains(rules, family)
    lines: list[str] = []
    for table, members in chains.items():
        lines.append(f"*{table}")
        lines += [f":{chain} - [0:0]" for chain in members]
        lines += [f"-A {chain} {rule}" for chain, chain_rules in members.items() for rule in chain_rules]
        lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def render_iptables_addresses(addresses: Iterable[IPAddress], family: Family) -> str:
    """Return the two chains that hold the node's addresses, for iptables-restore --noflush."""
    members = _address_chains(addresses, family)
    lines = ["*mangle", *(f":{chain} - [0:0]" for chain in members)]
    lines += [f"-A {chain} {rule}" for chain, chain_rules in members.items() for rule in chain_rules]
    return "\n".join([*lines, "COMMIT"]) + "\n"


def iptables_chains(rules: EndpointRules, family: Family) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return table -> chain of ours -> its rules."""
    clear: dict[str, tuple[str, ...]] = {"TRIREME-CLEAR": (_CLEAR_PACKET,)}
    untracked = f"-p udp -m mark --mark {UNTRACKED:#x}/{OWN_MASK:#x} -j CT --notrack"
    raw: dict[str, tuple[str, ...]] = {"TRIREME-CLEAR": (untracked, _CLEAR_PACKET)}
    mangle = {
        "TRIREME-INGRESS": tuple(f"-i {name} -g TRIREME-IN" for name in rules.ifnames),
        "TRIREME-EGRESS": tuple(f"-o {name} -g TRIREME-OUT" for name in rules.ifnames),
        # `-g` all the way, so that RETURN leaves our chains at once, and other rules of mangle get their turn.
        "TRIREME-IN": _iptables_main("TRIREME-SYN-IN", _messages(family), _new_from_node(), rules, family),
        "TRIREME-OUT": _iptables_main("TRIREME-SYN-OUT", (), (), rules, family),
        "TRIREME-SYN-IN": _iptables_syn_in(rules, family),
        "TRIREME-SYN-OUT": _iptables_syn_out(rules),
        "TRIREME-MESSAGE": (f"-j CONNMARK --restore-mark {_MASKS}", _IS_REPLY, *_queue(rules, "message-in")),
        "TRIREME-REPEATED": _iptables_repeated(),
        "TRIREME-CONSUME": (
            f"-j CONNMARK --save-mark --nfmask {_SAVED_MASK:#x} --ctmask {OWN_MASK:#x}",
            "-j DROP",
        ),
        "TRIREME-NODE": (f"-j CONNMARK --set-xmark {NODE:#x}/{OWN_MASK:#x}", _CLEAR_PACKET),
        **_address_chains(rules.node_addresses, family),
    }
    return {"raw": raw, "filter": clear, "mangle": mangle}


def _iptables_main(
    syn_chain: str, messages: tuple[str, ...], node_rules: tuple[str, ...], rules: EndpointRules, family: Family
) -> tuple[str, ...]:
    fragments = ("-f -j DROP",) if family == 4 else ()
    igmp = ("-p igmp -j RETURN",) if family == 4 else ()
    return (
        f"-m mark ! --mark 0x0/{FORGET | RELEASED:#x} -g TRIREME-REPEATED",
        *fragments,
        f"{_IS_SYN} -g {syn_chain}",
        *messages,
        f"-m connmark ! --mark 0x0/{RELEASED | NODE:#x} -j RETURN",
        f"-p {_ICMP[family]} -j RETURN",
        *igmp,
        *node_rules,
        _IS_REPLY,
        *_queue(rules, "other-in" if node_rules else "other-out"),
    )


def _messages(family: Family) -> tuple[str, ...]:
    """Find messages where they are, and datagrams whose sender says that they may carry one.

    A guard marks datagrams that carry none too, in flows that it does not know: they are evaluated like these.
    """
    places = [f"{_TO_SURPLUS[family]}{_SURPLUS_AT[family] + at:#x}=0x{MAGIC.hex()}" for at in _MAGIC_AT]
    return tuple(f'-p udp -m u32 --u32 "{match}" -g TRIREME-MESSAGE' for match in (*places, _MARKER[family]))


def _new_from_node() -> tuple[str, ...]:
    return (
        "! -p tcp -m conntrack --ctstate NEW -j TRIREME-FROM-NODE",
        f"-m mark --mark {NODE:#x}/{NODE:#x} -g TRIREME-NODE",
    )


def _iptables_syn_in(rules: EndpointRules, family: Family) -> tuple[str, ...]:
    return (
        f"{_IS_FIRST_SYN} -m length --length 0:{MAX_SMALL_SYN_BYTES[family]} -j TRIREME-FROM-NODE",
        f"-m mark --mark {NODE:#x}/{NODE:#x} -g TRIREME-NODE",
        f"-j CONNMARK --restore-mark {_MASKS}",
        _TELL_REPLY,
        *_queue(rules, "syn-in"),
    )


def _iptables_syn_out(rules: EndpointRules) -> tuple[str, ...]:
    return (
        f"{_IS_SYN_ACK} -m connmark --mark {NODE:#x}/{NODE:#x} -j TRIREME-TO-NODE",
        f"-m mark --mark {NODE:#x}/{NODE:#x} -g TRIREME-NODE",
        f"-j CONNMARK --restore-mark {_MASKS}",
        *_queue(rules, "syn-out"),
    )


def _iptables_repeated() -> tuple[str, ...]:
    return (
        f"-m mark --mark {CONSUME:#x}/{CONSUME:#x} -g TRIREME-CONSUME",
        f"-m mark --mark {FORGET:#x}/{FORGET:#x} -j CONNMARK --set-xmark 0x0/{OWN_MASK:#x}",
        f"-m mark --mark {RELEASED:#x}/{RELEASED:#x} -j CONNMARK --save-mark {_MASKS}",
        _CLEAR_PACKET,
    )


def _address_chains(addresses: Iterable[IPAddress], family: Family) -> dict[str, tuple[str, ...]]:
    """The node's addresses set a bit of the packet's mark; the chain that asked looks at it and clears it."""
    own = _of_family(addresses, family)
    length = 32 if family == 4 else 128
    mark = f"-j MARK --set-xmark {NODE:#x}/{NODE:#x}"
    return {
        chain: tuple(f"{option} {address}/{length} {mark}" for address in own)
        for chain, option in zip(_ADDRESS_CHAINS, ("-s", "-d"), strict=True)
    }


def _queue(rules: EndpointRules, kind: Kind) -> tuple[str, ...]:
    """Queue what does not come too fast."""
    limits = iptables_limits(rules.limits, kind, rules.queue_number, is_ingress=kind.endswith("in"))
    return *limits, f"-j NFQUEUE --queue-num {rules.queue_number}"


def _of_family(addresses: Iterable[IPAddress], family: Family) -> list[IPAddress]:
    """Sorted, so that the same rules give the same text."""
    return sorted((address for address in addresses if address.version == family), key=int)


def render_nft(rules: EndpointRules) -> str:
    """Return one transaction for `nft -f -` that makes our table or refills it; base chains stay where they are."""
    interfaces = "{ " + ", ".join(f'"{name}"' for name in rules.ifnames) + " }"
    bases = {
        # The packet's mark, as the pod's processes and other rules could set it: before anything else saves it, and
        # right before we read it. One before mangle (-150), so that no chain of another table comes in between.
        "clear_output": (
            "output",
            -300,
            (f"meta l4proto udp meta mark & {OWN_MASK:#x} == {UNTRACKED:#x} notrack", _nft_clear()),
        ),
        "clear_prerouting": ("prerouting", -152, (_nft_clear(),)),
        "clear_postrouting": ("postrouting", -152, (_nft_clear(),)),
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
    regular = _nft_chains(rules)
    lines += [f"add chain {table} {name}" for name in regular]
    lines.append(f"flush table {table}")
    contents = {name: base[2] for name, base in bases.items()} | regular
    lines += [f"add rule {table} {name} {rule}" for name, chain_rules in contents.items() for rule in chain_rules]
    return "\n".join(lines) + "\n" + render_nft_addresses(rules.node_addresses)


def render_nft_addresses(addresses: Iterable[IPAddress]) -> str:
    """Return one transaction that replaces the node's addresses."""
    known = tuple(addresses)
    lines: list[str] = []
    families: tuple[Family, ...] = (4, 6)
    for family in families:
        lines.append(f"flush set inet {NFT_TABLE} node{family}")
        own = _of_family(known, family)
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


_NFT_MESSAGES = (
    f"udp length 8 @th,128,32 == 0x{MAGIC.hex()}",
    # nft cannot compute where the surplus area begins, so a piggybacked message is told by its packet's marker.
    f"meta l4proto udp ip id {MARKER_ID:#x}-{PROOF_MARKER_ID:#x}",
    f"meta l4proto udp ip6 flowlabel {MARKER_ID:#x}-{PROOF_MARKER_ID:#x}",
)


def _nft_chains(rules: EndpointRules) -> dict[str, tuple[str, ...]]:
    queue = f"queue num {rules.queue_number}"
    limits = {
        kind: nft_limits(rules.limits, kind, rules.queue_number, is_ingress=kind.endswith("in")) for kind in _KINDS
    }
    node_bit = f"{NODE:#x}"
    first_syn = "tcp flags & (fin | syn | rst | ack) == syn"
    small = (f"ip length <= {MAX_SMALL_SYN_BYTES[4]}", f"ip6 length <= {MAX_SMALL_SYN_BYTES[6] - 40}")
    against = f"ct direction reply meta mark set meta mark | {REPLY:#x}"
    reply = f"meta l4proto udp {against}"
    main = (
        f"meta mark & {FORGET | RELEASED:#x} != 0 goto repeated",
        "ip frag-off & 0x1fff != 0 drop",
    )
    rest = (
        f"ct mark & {RELEASED | NODE:#x} != 0 accept",
        "meta l4proto { icmp, igmp, ipv6-icmp } accept",
    )
    return {
        "main_in": (
            *main,
            "tcp flags & syn == syn goto syn_in",
            *(f"{match} goto message" for match in _NFT_MESSAGES),
            *rest,
            "meta l4proto != tcp ct state new ip saddr @node4 goto node",
            "meta l4proto != tcp ct state new ip6 saddr @node6 goto node",
            *limits["other-in"],
            reply,
            queue,
        ),
        "main_out": (*main, "tcp flags & syn == syn goto syn_out", *rest, *limits["other-out"], reply, queue),
        "message": (
            *limits["message-in"],
            f"ct mark & {OWN_MASK:#x} == 0 {reply}",
            f"ct mark & {OWN_MASK:#x} == 0 {queue}",
            *_nft_copy("meta mark", "ct mark"),
            reply,
            queue,
        ),
        "syn_in": (
            f"ip saddr @node4 {small[0]} {first_syn} goto node",
            f"ip6 saddr @node6 {small[1]} {first_syn} goto node",
            *limits["syn-in"],
            f"ct mark & {OWN_MASK:#x} == 0 {against}",
            f"ct mark & {OWN_MASK:#x} == 0 {queue}",
            *_nft_copy("meta mark", "ct mark"),
            against,
            queue,
        ),
        "syn_out": (
            f"tcp flags & (syn | ack) == (syn | ack) ct mark & {node_bit} != 0 ip daddr @node4 goto node",
            f"tcp flags & (syn | ack) == (syn | ack) ct mark & {node_bit} != 0 ip6 daddr @node6 goto node",
            *limits["syn-out"],
            f"ct mark & {OWN_MASK:#x} == 0 {queue}",
            *_nft_copy("meta mark", "ct mark"),
            queue,
        ),
        **_nft_marking(),
    }


def _nft_marking() -> dict[str, tuple[str, ...]]:
    """Give the chains that carry a verdict's mark over to the flow, and end there."""
    return {
        "repeated": (
            f"meta mark & {CONSUME:#x} == {CONSUME:#x} goto consume",
            f"meta mark & {FORGET:#x} != 0 ct mark set ct mark & {OTHERS_MASK:#x} goto done",
            f"ct mark & {OTHERS_MASK:#x} == 0 ct mark set meta mark & {OWN_MASK:#x} goto done",
            *_nft_copy("ct mark", "meta mark"),
            "goto done",
        ),
        "consume": (*_nft_copy("ct mark", "meta mark", _SAVED_MASK), "drop"),
        "node": (
            f"ct mark set ct mark & {OTHERS_MASK:#x} | {NODE:#x}",
            "goto done",
        ),
        "done": (_nft_clear(), "accept"),
    }


def _nft_clear() -> str:
    return f"meta mark set meta mark & {OTHERS_MASK:#x}"


def _nft_copy(target: str, source: str, mask: int = OWN_MASK) -> Iterator[str]:
    """Copy our bits of one mark to the other, whose other bits stay.

    Older kernels and nft cannot combine two marks in one expression, so each bit is set by a rule with constants. Few
    packets come here: where the bits to copy or the bits to keep are all zero, a rule before this does it at once.
    """
    yield f"{target} set {target} & {OTHERS_MASK:#x}"
    for bit in (1 << n for n in range(31, -1, -1) if mask >> n & 1):
        yield f"{source} & {bit:#x} != 0 {target} set {target} | {bit:#x}"
