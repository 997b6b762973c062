# SPDX-License-Identifier: Apache-2.0
"""What the parts of the guard have in common: what is guarded, and how its rules are written for nft.

A text for `nft -f` is one transaction: all of it comes into force, or nothing. Source: nft(8).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Network,
    IPv6Address,
    IPv6Network,
    collapse_addresses,
)

from enforcer_daemon.dataplane.guard_sets import address_match, port_match
from enforcer_daemon.handshake.frames import MAGIC, MARKER_ID, PROOF_MARKER_ID
from enforcer_daemon.model import AttachmentId, IPAddress, IPNetwork
from enforcer_daemon.policy.address_rules import AddressRule
from enforcer_daemon.reasons import Reason

NAME = "trireme_guard"
"""Of the guard's tables; there is one in each family that it works in."""
ALLOWS_ALL = (AddressRule(),)
INTO_ENFORCED = ("ip daddr @enforced4", "ip6 daddr @enforced6")
STANDALONE_MESSAGE = f"udp length 8 @th,128,32 0x{MAGIC.hex()}"
"""A handshake's message in a datagram without data; it stands 16 bytes behind the beginning of the UDP header."""
MARKERS = tuple(f"{place} {MARKER_ID:#x}-{PROOF_MARKER_ID:#x}" for place in ("ip id", "ip6 flowlabel"))
"""Of a datagram that carries a message beside its data."""
FIRST_SYN = "tcp flags & (fin | syn | rst | ack) == syn"
LOG_GROUP = 21_586
"""Of nfnetlink_log: where the daemon hears of what the guard dropped."""
LOGGED_PER_S = 16
"""Packets of one pod that the daemon hears of in a second; it needs one of a flow."""
LOGGED_BYTES = 128
"""Of each: IP and UDP headers, also with a few extension headers."""
_MAX_LOGGED_SOURCES = 4_096


@dataclass(frozen=True, slots=True)
class Links:
    """Where a pod's interfaces end in the node's namespace."""

    names: tuple[str, ...] = ()
    link_locals: tuple[IPv6Address, ...] = ()
    """Link-local addresses of the pod's own interfaces."""
    problem: str = ""
    """Why not everything that the pod sends is checked there; empty if it is."""
    devices: tuple[str, ...] = ()
    """The bridge or VRF that a name is a port of, and the VLAN devices on it: what the node's IP stack shows as the
    input interface of the pod's packets."""
    is_traced: bool = True
    """Whether names and devices are all the ways by which the pod's packets reach the node's IP stack."""


@dataclass(frozen=True, slots=True)
class GuardedEndpoint:
    """One endpoint, and what policy lets an address alone do to it and for it."""

    attachment: AttachmentId
    addresses: tuple[IPAddress, ...]
    rules: tuple[AddressRule, ...]
    """For ingress. Empty: nothing. For a pod whose ingress no policy isolates: one rule that allows all."""
    egress: tuple[AddressRule, ...] = ALLOWS_ALL
    """The same for what the pod sends."""
    links: Links = field(default_factory=Links)
    by_identity: bool = True
    """Whether a rule for egress names pods, so that the pod's enforcer may send identities; the guard believes no frame
    of a pod whose rules name addresses alone, or nothing."""
    life: str = ""
    """What tells the pod from one that had its addresses before, and from itself under another identity; for nft, a
    comment."""

    def addresses_of(self, version: int) -> tuple[IPAddress, ...]:
        """Return the addresses of one family."""
        return tuple(address for address in self.addresses if address.version == version)


def chain_name(prefix: str, attachment: AttachmentId, ifname: str = "") -> str:
    """Name an endpoint's chain; container ids are longer than older kernels allow a name to be."""
    return f"{prefix}_" + hashlib.sha256(f"{attachment}\0{ifname}".encode()).hexdigest()[:20]


def listed(items: Iterable[object]) -> str:
    """Write an anonymous set."""
    return "{ " + ", ".join(map(str, items)) + " }"


def refill(table: str, chain: str, rules: Sequence[str]) -> list[str]:
    """Render commands that give a chain exactly these rules, whether it existed or not."""
    lines = [f"add chain {table} {chain}", f"flush chain {table} {chain}"]
    return lines + [f"add rule {table} {chain} {rule}" for rule in rules]


def discard(table: str, chain: str) -> list[str]:
    """Take a chain away, also one that the kernel took away before, with its device."""
    return [f"{verb} chain {table} {chain}" for verb in ("add", "flush", "delete")]


def difference(table: str, before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Take elements away and add others; each is a set and a key, and for a map a verdict."""
    gone = [name for name, verdict in before.items() if after.get(name) != verdict]
    new = [name for name, verdict in after.items() if before.get(name) != verdict]
    lines = [f"delete element {table} {_element(name)}" for name in gone]
    return lines + [f"add element {table} {_element(name, after[name])}" for name in new]


def _element(name: str, verdict: str = "") -> str:
    kind, _, key = name.partition(" ")
    return f"{kind} {{ {key} : {verdict} }}" if verdict else f"{kind} {{ {key} }}"


def address_rule(rule: AddressRule, four: str, six: str, port: str = "th dport") -> str:
    """Write a rule that accepts, whatever its size one of nft; `four`, `six` and `port` are what is compared."""
    words: list[str] = []
    if (addresses := rule.addresses) is not None:
        words.append(f"{four if addresses.version == 4 else six} {address_match(addresses)}")
    if rule.protocol is not None:
        words.append(f"meta l4proto {rule.protocol.value}")
        if rule.spans is not None:
            words.append(f"{port} {port_match(rule.spans)}")
    return " ".join([*words, "accept"])


def _collapsed(networks: Iterable[IPNetwork]) -> list[IPNetwork]:
    """Networks that overlap are an error in one set of nft."""
    known = tuple(networks)
    four = collapse_addresses(network for network in known if isinstance(network, IPv4Network))
    six = collapse_addresses(network for network in known if isinstance(network, IPv6Network))
    return [*four, *six]


def counted_drops(table: str, reasons: Iterable[Reason], also: str = "", *, is_logged: bool = False) -> list[str]:
    """Make, for each reason, a counter that outlives the rules of an endpoint, and a chain that counts and drops.

    With `is_logged` the daemon hears of what a pod lost.
    """
    lines = []
    for reason in reasons:
        name = counter_name(reason)
        lines += [f"add counter {table} {name}", f"add chain {table} drop_{name}"]
        lines += logged(table, f"drop_{name}", reason.value) if is_logged else []
        lines.append(f"add rule {table} drop_{name} {also} counter name {name} drop")
    return lines


def logged(table: str, chain: str, prefix: str) -> list[str]:
    """Make rules that tell the daemon of a packet, not too often for each sender, and go on.

    `prefix` says what becomes of it. A kernel without nfnetlink_log refuses them: see `without_log`.
    """
    lines = []
    for version, kind, source in ((4, "ipv4_addr", "ip saddr"), (6, "ipv6_addr", "ip6 saddr")):
        name = f"logged{version}"
        flags = f"size {_MAX_LOGGED_SOURCES}; flags dynamic,timeout; timeout 2s;"
        rate = f"{source} limit rate {LOGGED_PER_S}/second burst {LOGGED_PER_S} packets"
        log = f'log group {LOG_GROUP} prefix "{prefix}" snaplen {LOGGED_BYTES}'
        lines += [
            f"add set {table} {name} {{ type {kind}; {flags} }}",
            f"add rule {table} {chain} update @{name} {{ {rate} }} {log}",
        ]
    return lines


def without_log(lines: Iterable[str]) -> list[str]:
    """Leave out the rules that log."""
    return [line for line in lines if f"log group {LOG_GROUP} " not in line]


def counter_name(reason: Reason) -> str:
    """Return the counter of a reason; nft's names have no hyphens."""
    return reason.value.replace("-", "_")


def drop(reason: Reason) -> str:
    """Write the end of a rule that drops: counted for the rule by itself, and for the reason."""
    return f"counter goto drop_{counter_name(reason)}"


def network_sets(table: str, name: str, networks: Iterable[IPNetwork]) -> list[str]:
    """Make the sets `name`4 and `name`6 of networks, which may overlap."""
    known, lines = tuple(networks), []
    for version, kind in ((4, "ipv4_addr"), (6, "ipv6_addr")):
        lines.append(f"add set {table} {name}{version} {{ type {kind}; flags interval; }}")
        if found := [network for network in _collapsed(known) if network.version == version]:
            lines.append(f"add element {table} {name}{version} {listed(found)}")
    return lines


def node_sets(table: str) -> list[str]:
    """Make the sets of the node's addresses."""
    return [
        f"add set {table} node{version} {{ type {kind}; }}" for version, kind in ((4, "ipv4_addr"), (6, "ipv6_addr"))
    ]


def node_elements(table: str, node_addresses: Iterable[IPAddress]) -> list[str]:
    """Replace the node's addresses."""
    known, lines = sorted(node_addresses, key=int), []
    for version in (4, 6):
        lines.append(f"flush set {table} node{version}")
        if found := [address for address in known if address.version == version]:
            lines.append(f"add element {table} node{version} {listed(found)}")
    return lines


def sender_sets(table: str) -> list[str]:
    """Make the sets of addresses whose packets come by known interfaces alone, and of these interfaces."""
    lines = []
    for version, kind in ((4, "ipv4_addr"), (6, "ipv6_addr")):
        lines.append(f"add set {table} linked{version} {{ type {kind}; }}")
        lines.append(f"add set {table} homes{version} {{ type {kind} . ifname; }}")
    return lines


def sender_elements(endpoint: GuardedEndpoint | None, *, with_devices: bool) -> dict[str, str]:
    """Return an endpoint's elements of the sender sets; none if its packets may come by unknown interfaces."""
    found: dict[str, str] = {}
    if endpoint is None or not endpoint.links.names or not endpoint.links.is_traced:
        return found
    names = (*endpoint.links.names, *endpoint.links.devices) if with_devices else endpoint.links.names
    for address in endpoint.addresses:
        found[f"linked{address.version} {address}"] = ""
        found |= {f'homes{address.version} {address} . "{name}"': "" for name in names}
    return found
