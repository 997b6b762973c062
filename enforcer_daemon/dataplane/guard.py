# SPDX-License-Identifier: Apache-2.0
"""The guard on the host: judges by its true source what reaches an enforced pod under the node's address.

Inside the pod the node's own address is let through, for kubelet's probes. But a client outside that comes through a
node port, or a pod that comes through a load balancer's address, is masqueraded to that same address. Here, after
source NAT, the flow's first packet still shows the address it came with: a frame-sized SYN passes, since the pod's
enforcer judges its token; the rest needs an address rule of the pod's policies. What the node itself sends was not
forwarded, and passes.

The table stays in the kernel while the daemon is down, and is replaced as a whole when it starts.
Needs Linux 5.7 (the input interface is known in postrouting from there on). Source: nft(8).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from enforcer_daemon.dataplane.tools import run
from enforcer_daemon.model import AttachmentId, IPAddress, IPNetwork
from enforcer_daemon.policy.evaluate import AddressRule

TABLE = "inet trireme_guard"
MIN_FRAMED_SYN_BYTES = 201
"""Longer than any SYN without data (100 bytes), shorter than any frame (500)."""
_HOOK = "type filter hook postrouting priority 101; policy accept;"  # source NAT is at 100


@dataclass(frozen=True, slots=True)
class GuardedEndpoint:
    """One endpoint and what policy lets an address alone do to it."""

    attachment: AttachmentId
    addresses: tuple[IPAddress, ...]
    rules: tuple[AddressRule, ...]
    """Empty: nothing. For a pod whose ingress no policy isolates: one rule that allows all."""


def render_replace(endpoints: Iterable[GuardedEndpoint]) -> str:
    """Return the transaction that replaces whatever is there by exactly these endpoints."""
    lines = [
        f"add table {TABLE}",
        f"delete table {TABLE}",
        f"add table {TABLE}",
        f"add map {TABLE} endpoints4 {{ type ipv4_addr : verdict; }}",
        f"add map {TABLE} endpoints6 {{ type ipv6_addr : verdict; }}",
        f"add chain {TABLE} masqueraded {{ {_HOOK} }}",
        f"add chain {TABLE} judge",
        # Without an input interface (`iif 0`) a process of the node sent it.
        f"add rule {TABLE} masqueraded ct state new ct direction original ct status snat iif != 0 goto judge",
        f"add rule {TABLE} judge ip daddr vmap @endpoints4",
        f"add rule {TABLE} judge ip6 daddr vmap @endpoints6",
    ]
    return "\n".join(lines) + "\n" + "".join(render_apply(None, endpoint) for endpoint in endpoints)


def render_apply(before: GuardedEndpoint | None, after: GuardedEndpoint) -> str:
    """Return the transaction that brings an endpoint from what was applied before (None: nothing) to `after`."""
    chain = _chain(after.attachment)
    lines = [f"add chain {TABLE} {chain}", f"flush chain {TABLE} {chain}"]
    lines += [f"add rule {TABLE} {chain} {rule}" for rule in _endpoint_rules(after)]
    known = () if before is None else before.addresses
    lines += [_delete_element(address) for address in known if address not in after.addresses]
    lines += [
        f"add element {TABLE} endpoints{address.version} {{ {address} : goto {chain} }}"
        for address in after.addresses
        if address not in known
    ]
    return "\n".join(lines) + "\n"


def render_remove(before: GuardedEndpoint) -> str:
    """Return the transaction that takes an endpoint away."""
    chain = _chain(before.attachment)
    lines = [_delete_element(address) for address in before.addresses]
    lines += [f"flush chain {TABLE} {chain}", f"delete chain {TABLE} {chain}"]
    return "\n".join(lines) + "\n"


def _endpoint_rules(endpoint: GuardedEndpoint) -> list[str]:
    framed_syn = "tcp flags & (fin | syn | rst | ack) == syn"
    own = [f"{_original_source(address.version)} {address} accept" for address in endpoint.addresses]
    return [
        f"meta length >= {MIN_FRAMED_SYN_BYTES} {framed_syn} accept",
        *own,  # a pod may always reach itself, also through a Service
        *(_address_rule(rule) for rule in endpoint.rules),
        "counter drop",
    ]


def _address_rule(rule: AddressRule) -> str:
    words: list[str] = []
    if rule.network is not None:
        words.append(f"{_original_source(rule.network.version)} {rule.network}")
        if rule.excepts:
            excepted = ", ".join(map(str, _collapsed(rule.excepts)))
            words.append(f"{_original_source(rule.network.version)} != {{ {excepted} }}")
    if rule.protocol is not None:
        words.append(f"meta l4proto {rule.protocol.value}")
        if rule.ports is not None:
            words.append("th dport {}-{}".format(*rule.ports))
    return " ".join([*words, "accept"])


def _original_source(version: int) -> str:
    return "ct original ip saddr" if version == 4 else "ct original ip6 saddr"


def _collapsed(networks: Iterable[IPNetwork]) -> list[IPNetwork]:
    """Networks that overlap are an error in one set of nft."""
    known = tuple(networks)
    four = collapse_addresses(network for network in known if isinstance(network, IPv4Network))
    six = collapse_addresses(network for network in known if isinstance(network, IPv6Network))
    return [*four, *six]


def _delete_element(address: IPAddress) -> str:
    return f"delete element {TABLE} endpoints{address.version} {{ {address} }}"


def _chain(attachment: AttachmentId) -> str:
    """Name an endpoint's chain; container ids are longer than older kernels allow a name to be."""
    return "endpoint_" + hashlib.sha256(str(attachment).encode()).hexdigest()[:20]


class Guard:
    """The guard's table in the host's network namespace, and what was last applied to it.

    Each method blocks for some milliseconds while nft runs, and raises DataplaneError where the kernel refuses; then
    nothing has changed, neither there nor here.
    """

    __slots__ = ("_applied",)

    def __init__(self) -> None:
        self._applied: dict[AttachmentId, GuardedEndpoint] = {}

    def replace(self, endpoints: Iterable[GuardedEndpoint]) -> None:
        """Put exactly these endpoints in place, whatever an earlier daemon left; call it once before the others."""
        wanted = {endpoint.attachment: endpoint for endpoint in endpoints}
        _nft(render_replace(wanted.values()))
        self._applied = wanted

    def apply(self, endpoint: GuardedEndpoint) -> None:
        """Bring one endpoint to its present addresses and rules; what is already so is not touched.

        An address that another endpoint still has goes to this one: a runtime gives an address to a new pod before the
        old pod's deletion is known everywhere.
        """
        before = self._applied.get(endpoint.attachment)
        if before == endpoint:
            return
        losers = [
            replace(other, addresses=tuple(a for a in other.addresses if a not in endpoint.addresses))
            for other in self._applied.values()
            if other.attachment != endpoint.attachment and not set(endpoint.addresses).isdisjoint(other.addresses)
        ]
        text = "".join(render_apply(self._applied[loser.attachment], loser) for loser in losers)
        _nft(text + render_apply(before, endpoint))
        self._applied |= {changed.attachment: changed for changed in (*losers, endpoint)}

    def remove(self, attachment: AttachmentId) -> None:
        """Take one endpoint away; one that is not there is no error."""
        before = self._applied.get(attachment)
        if before is not None:
            _nft(render_remove(before))
            del self._applied[attachment]

    def remove_table(self) -> None:
        """Take the guard away as a whole, as when the product is removed from the node; not when the daemon stops."""
        _nft(f"add table {TABLE}\ndelete table {TABLE}\n")
        self._applied = {}


def _nft(text: str) -> None:
    run(("nft", "-f", "-"), text)
