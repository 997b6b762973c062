# SPDX-License-Identifier: Apache-2.0
"""The guard on fresh addresses: what a pod sends opens a flow, belongs to one that the node knows, or shows its doubt.

An address is fresh after its pod started, changed its identity, or lost a flow: for as long as a peer may still hold a
release that the address no longer deserves (handshake/lapse.py). Whoever sends into such a release by packet socket,
or from a plain socket past an enforcer that has not answered, sends what the node's conntrack does not know:

- TCP that is neither SYN nor RST passes only in a connection with a whole handshake behind it. A stale peer's socket
  answers a SYN with an ACK that shows its numbers, so a reply alone does not count.
- A stale peer's own segments are dropped, and refused with RST once the daemon has looked, which ends its socket; else
  they would show the numbers. What IPVS sends on does not pass the forward hook, but the output hook, without a socket.
- A connection that the pod has passes, also where the node's conntrack lost it (guard_live).
- UDP without a message passes with the marker, which the guard puts in, also where it opens a flow: not every datagram
  has room for a message, and a stale peer's own datagrams look like those of a peer without an enforcer. With the
  marker the peer's enforcer sees what the release would keep from it; a peer without an enforcer takes no notice. The
  pod's datagrams stay as they are only if the peer's enforcer has answered what its policy allows, or has proven
  itself: a label of the conntrack entry then says so. Other messages do not count, since an unproven request gets
  them. No flow needs a place in a table that others can fill.

Of every registered pod, the daemon hears of datagrams that open a flow into the enforced networks without a message:
the pod's kernel holds a release that the node's conntrack has lost, and whoever gets them may be another by now.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from enforcer_daemon.dataplane.freshtimes import FRESH_S, OWN, TIMES_S
from enforcer_daemon.dataplane.guard_live import REACHED_LIVE, REACHED_REFUSED, SENT_LIVE
from enforcer_daemon.dataplane.guard_rules import (
    MARKERS,
    NAME,
    STANDALONE_MESSAGE,
    GuardedEndpoint,
    counted_drops,
    drop,
    logged,
    refill,
)
from enforcer_daemon.dataplane.setwrites import Renewal, renew
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.handshake.frames import MARKER_ID, PROOF_MARKER_ID, TYPE_ANSWER, TYPE_PROOF
from enforcer_daemon.model import IPAddress
from enforcer_daemon.reasons import Reason

TABLE = f"inet {NAME}"
CHAINS = (
    "fresh_seen",
    "fresh_sent",
    "fresh_reached",
    "fresh_sent_on",
    "fresh_refused",
    "segment_sent",
    "segment_reached",
    "datagram_sent",
    "datagram_arrived",
    "doubted_sent",
    "unclean_sent",
    "unclean_datagram",
    "unclean_reached",
)
STRAY = "stray"
"""Prefix of the log for a datagram that passes, and shows that a release outlived the node's entry."""
_SEEN_HOOK = "type filter hook prerouting priority -148; policy accept;"  # before any translation
_SENT_HOOK = "type filter hook postrouting priority 98; policy accept;"  # behind all but source NAT, which is at 100
_ARRIVED_HOOK = "type filter hook forward priority -2; policy accept;"
_SENT_ON_HOOK = "type filter hook output priority -2; policy accept;"
_FAMILIES = ((4, "ipv4_addr", "ip"), (6, "ipv6_addr", "ip6"))
_BEGUN = 125
"""Label of a conntrack entry: made while its address was unclean already, so not of before its pod."""
_ACCEPTED = 126
"""Label of a conntrack entry: the peer's enforcer accepts the flow. Open vSwitch, which uses labels too, keeps them in
zones of its own."""
_ACCEPTING = f"{{ {TYPE_ANSWER}, {TYPE_PROOF} }}"
"""The type stands behind magic and version."""
_PROOFS = (f"ip id {PROOF_MARKER_ID:#x}", f"ip6 flowlabel {PROOF_MARKER_ID:#x}")
_NO_SYN = "tcp flags & (syn | rst) == 0"
_NO_ENTRY = "ct status & confirmed == 0"
_REFUSE = "counter name unknown_flow reject with tcp reset"


def skeleton(*, is_logged: bool = True) -> list[str]:
    """Return what the addresses hang on; if nothing is logged, nobody vouches for a segment: a peer's is refused."""
    lines = counted_drops(TABLE, (Reason.UNKNOWN_FLOW,), is_logged=True)
    for version, kind, _ in _FAMILIES:
        lines.append(f"add set {TABLE} {OWN}{version} {{ type {kind}; }}")
        lines += [f"add set {TABLE} {name}{version} {{ type {kind}; flags timeout; }}" for name in TIMES_S]
    lines += refill(TABLE, "segment_sent", tuple(_segment_rules()))
    lines += refill(TABLE, "segment_reached", tuple(_reached_rules(is_logged=is_logged)))
    lines += refill(TABLE, "unclean_sent", (f"ct label {_BEGUN} return", drop(Reason.UNKNOWN_FLOW)))
    lines += refill(TABLE, "unclean_reached", (f"ct label {_BEGUN} return", _REFUSE))
    lines += refill(TABLE, "doubted_sent", (f"ip id set {MARKER_ID:#x}", f"ip6 flowlabel set {MARKER_ID:#x}", "accept"))
    lines += refill(TABLE, "unclean_datagram", (f"ct label {_BEGUN} return", "goto doubted_sent"))
    lines += refill(TABLE, "datagram_arrived", tuple(_arrival_rules()))
    lines += refill(TABLE, "datagram_sent", tuple(_datagram_rules()))
    lines += [f"add chain {TABLE} stray", *logged(TABLE, "stray", STRAY)]
    lines.append(f"add chain {TABLE} fresh_seen {{ {_SEEN_HOOK} }}")
    lines += [f"add rule {TABLE} fresh_seen {rule}" for rule in _seen_rules()]
    lines.append(f"add chain {TABLE} fresh_sent {{ {_SENT_HOOK} }}")
    lines += [f"add rule {TABLE} fresh_sent {rule}" for rule in _dispatch_rules()]
    lines += refill(TABLE, "fresh_refused", tuple(_refusal_rules()))
    lines.append(f"add chain {TABLE} fresh_reached {{ {_ARRIVED_HOOK} }}")
    lines.append(f"add rule {TABLE} fresh_reached jump fresh_refused")
    lines.append(f"add chain {TABLE} fresh_sent_on {{ {_SENT_ON_HOOK} }}")
    lines.append(f"add rule {TABLE} fresh_sent_on meta skuid >= 0 accept")  # of a socket of the node
    return [*lines, f"add rule {TABLE} fresh_sent_on meta l4proto tcp jump fresh_refused"]


def _seen_rules() -> Iterable[str]:
    """Watch UDP where packets show what the pod dialed, by which its kernel knows the flow."""
    yield "meta l4proto != udp accept"
    for version, _, family in _FAMILIES:
        yield f"{family} saddr @enforced{version} {family} daddr @own{version} jump datagram_arrived"
    yield f"{STANDALONE_MESSAGE} accept"
    yield from (f"{marker} accept" for marker in MARKERS)
    yield "ct state established accept"
    yield from (f"{family} saddr @own{v} {family} daddr @virtual{v} goto stray" for v, _, family in _FAMILIES)


def _dispatch_rules() -> Iterable[str]:
    """Only what goes to pods, behind any translation, can meet a release of ours."""
    yield "meta l4proto != { tcp, udp } accept"
    for version, _, family in _FAMILIES:
        yield from (f"{family} {end} @unclean{version} {_NO_ENTRY} ct label set {_BEGUN}" for end in ("saddr", "daddr"))
        yield f"{family} saddr @unclean{version} {family} daddr @enforced{version} {_NO_SYN} jump unclean_sent"
    yield "meta l4proto tcp ct status assured accept"
    for version, _, family in _FAMILIES:
        into = f"{family} daddr @enforced{version}"
        yield f"{family} saddr @fresh_udp{version} {into} meta l4proto udp goto datagram_sent"
        yield f"{family} saddr @fresh_tcp{version} {into} {_NO_SYN} goto segment_sent"


def _segment_rules() -> Iterable[str]:
    yield "ct direction reply ct state established accept"  # the other end opened it, by a SYN
    yield from (f"{live} accept" for live in SENT_LIVE)
    yield drop(Reason.UNKNOWN_FLOW)


def _reached_rules(*, is_logged: bool) -> Iterable[str]:
    """Refuse what the daemon found to belong to no connection of the pod; until it has looked, drop."""
    yield from (f"{live} accept" for live in REACHED_LIVE)
    if is_logged:
        yield from (f"{refused} {_REFUSE}" for refused in REACHED_REFUSED)
        yield drop(Reason.UNKNOWN_FLOW)
    else:
        yield _REFUSE


def _datagram_rules() -> Iterable[str]:
    yield f"{STANDALONE_MESSAGE} accept"
    yield from (f"{marker} accept" for marker in MARKERS)
    for version, _, family in _FAMILIES:
        yield f"{family} saddr @unclean{version} ct state established jump unclean_datagram"
    yield f"ct state established ct label {_ACCEPTED} accept"
    yield "goto doubted_sent"


def _arrival_rules() -> Iterable[str]:
    """Label the flows that the peer's enforcer accepts, also of pods that are fresh only later."""
    yield f"{STANDALONE_MESSAGE} @th,168,8 {_ACCEPTING} ct label set {_ACCEPTED}"
    yield from (f"{proof} ct label set {_ACCEPTED}" for proof in _PROOFS)


def _refusal_rules() -> Iterable[str]:
    for version, _, family in _FAMILIES:
        match = f"{family} saddr @enforced{version} {family} daddr"
        yield f"{match} @fresh_tcp{version} {_NO_SYN} ct state new goto segment_reached"
        yield f"{match} @unclean{version} {_NO_SYN} jump unclean_reached"


def apply_lines(before: GuardedEndpoint | None, after: GuardedEndpoint) -> list[str]:
    """Bring an endpoint from what was applied before (None: nothing) to `after`; what is new of it is fresh."""
    known, wanted = _owners(before), _owners(after)
    gone = [address for address, life in known.items() if wanted.get(address) != life]
    new = [address for address, life in wanted.items() if known.get(address) != life]
    lines = [_disown(address) for address in gone] + [_own(address, after.life) for address in new]
    return lines + forget_lines(address for address in gone if address not in wanted) + freshen_lines(new)


def remove_lines(before: GuardedEndpoint) -> list[str]:
    """Take an endpoint away."""
    return [_disown(address) for address in before.addresses] + forget_lines(before.addresses)


def _owners(endpoint: GuardedEndpoint | None) -> dict[IPAddress, str]:
    return {} if endpoint is None else dict.fromkeys(endpoint.addresses, endpoint.life)


def _own(address: IPAddress, life: str) -> str:
    comment = f' comment "{life}"' if life else ""
    return f"add element {TABLE} {OWN}{address.version} {{ {address}{comment} }}"


def _disown(address: IPAddress) -> str:
    return f"delete element {TABLE} {OWN}{address.version} {{ {address} }}"


def freshen_lines(addresses: Iterable[IPAddress], *, is_clean: bool = True) -> list[str]:
    """Let the time of addresses begin, also where it runs already; an unclean one stays so for its time."""
    times = FRESH_S if is_clean else TIMES_S
    return [line for address in addresses for line in (*_gone(address, times), *_begun(address, times))]


def is_freshened(addresses: Iterable[IPAddress], *, is_clean: bool = True) -> bool:
    """Do the same without nft; return whether that worked, as it does not where somebody removed the tables."""
    times_s = FRESH_S if is_clean else TIMES_S
    try:
        renew(NAME, [Renewal(name, address, s) for address in addresses for name, s in times_s.items()])
    except DataplaneError:
        return False
    return True


def keep_lines(address: IPAddress, left_s: Mapping[str, float]) -> list[str]:
    """Let an address be in these sets alone, for so many seconds yet."""
    return [*_gone(address, TIMES_S), *_begun(address, left_s)]


def forget_lines(addresses: Iterable[IPAddress]) -> list[str]:
    """Let addresses be fresh no longer."""
    return [line for address in addresses for line in _gone(address, TIMES_S)]


def _begun(address: IPAddress, times_s: Mapping[str, float]) -> list[str]:
    return [
        f"add element {TABLE} {name}{address.version} {{ {address} timeout {math.ceil(seconds)}s }}"
        for name, seconds in times_s.items()
    ]


def _gone(address: IPAddress, names: Mapping[str, float]) -> list[str]:
    """An element that is not there, as after its time, is no error only where it was added before."""
    added = _begun(address, {name: TIMES_S[name] for name in names})
    taken = [f"delete element {TABLE} {name}{address.version} {{ {address} }}" for name in names]
    return [line for pair in zip(added, taken, strict=True) for line in pair]
