# SPDX-License-Identifier: Apache-2.0
"""The guard's judgement of masqueraded flows: who reaches a pod under the node's address is evaluated by his own.

Inside the pod the node's own address is let through, for kubelet's probes. But a client outside that comes through a
node port, or a pod that comes through a load balancer's address, is masqueraded to that same address. Here, after
source NAT, the flow's first packet still shows the address it came with: a frame-sized SYN passes, since the pod's
enforcer evaluates its token; the rest needs an address rule of the pod's policies. What the node itself sends comes
from one of its own sockets, and passes.

Needs Linux 5.7 (the input interface is known in postrouting from there on).
"""

from __future__ import annotations

from enforcer_daemon.dataplane.guard_rules import (
    ALLOWS_ALL,
    FIRST_SYN,
    NAME,
    STANDALONE_MESSAGE,
    GuardedEndpoint,
    address_rule,
    chain_name,
    counted_drops,
    difference,
    discard,
    drop,
    refill,
)
from enforcer_daemon.reasons import Reason

TABLE = f"inet {NAME}"
MIN_FRAMED_SYN_BYTES = 201
"""Longer than any SYN without data (100 bytes), shorter than any frame (500)."""
_HOOK = "type filter hook postrouting priority 101; policy accept;"  # source NAT is at 100
_PREFIX = "endpoint"
_SOURCES = ("ct original ip saddr", "ct original ip6 saddr")


def skeleton() -> list[str]:
    """Return what the endpoints' rules hang on."""
    return [
        f"add map {TABLE} endpoints4 {{ type ipv4_addr : verdict; }}",
        f"add map {TABLE} endpoints6 {{ type ipv6_addr : verdict; }}",
        *counted_drops(TABLE, (Reason.UNIDENTIFIED_PEER,)),
        f"add chain {TABLE} masqueraded {{ {_HOOK} }}",
        f"add chain {TABLE} evaluate",
        # A process of the node sent it. No input interface alone does not tell: bridged packets have none here either.
        f"add rule {TABLE} masqueraded iif 0 meta skuid >= 0 accept",
        *(f"add rule {TABLE} masqueraded {rule}" for rule in _messages()),
        f"add rule {TABLE} masqueraded ct state new ct direction original ct status snat goto evaluate",
        # Conntrack takes no notice of one on the ports of a connection that it still knows.
        f"add rule {TABLE} masqueraded {FIRST_SYN} ct direction original ct status snat goto evaluate",
        f"add rule {TABLE} evaluate ip daddr vmap @endpoints4",
        f"add rule {TABLE} evaluate ip6 daddr vmap @endpoints6",
    ]


def _messages() -> list[str]:
    """Write the rules that drop handshake messages which come masqueraded, for all pods: UDP is by address there.

    Answered, one would open a flow that the pod takes for its node's. A pod's own come back to it through a Service.
    """
    masqueraded = f"ct direction original ct status snat {STANDALONE_MESSAGE}"
    return [
        f"{masqueraded} {family} daddr @pods{version} ct original {family} saddr . {family} daddr != @selves{version} "
        + drop(Reason.UNIDENTIFIED_PEER)
        for version, family in ((4, "ip"), (6, "ip6"))
    ]


def apply_lines(before: GuardedEndpoint | None, after: GuardedEndpoint) -> list[str]:
    """Bring an endpoint from what was applied before (None: nothing) to `after`."""
    chain = chain_name(_PREFIX, after.attachment)
    lines = []
    if after.rules != ALLOWS_ALL:
        lines += refill(TABLE, chain, _rules(after))
    lines += difference(TABLE, _elements(before), _elements(after))
    if before is not None and before.rules != ALLOWS_ALL and after.rules == ALLOWS_ALL:
        lines += discard(TABLE, chain)
    return lines


def remove_lines(before: GuardedEndpoint) -> list[str]:
    """Take an endpoint away."""
    lines = difference(TABLE, _elements(before), _elements(None))
    return lines if before.rules == ALLOWS_ALL else lines + discard(TABLE, chain_name(_PREFIX, before.attachment))


def _elements(endpoint: GuardedEndpoint | None) -> dict[str, str]:
    """Return the endpoint's elements, none where no policy isolates it."""
    if endpoint is None or endpoint.rules == ALLOWS_ALL:
        return {}
    chain = chain_name(_PREFIX, endpoint.attachment)
    return {f"endpoints{address.version} {address}": f"goto {chain}" for address in endpoint.addresses}


def _rules(endpoint: GuardedEndpoint) -> list[str]:
    own = [f"{_SOURCES[address.version == 6]} {address} accept" for address in endpoint.addresses]
    return [
        f"meta length >= {MIN_FRAMED_SYN_BYTES} {FIRST_SYN} accept",
        *own,  # a pod may always reach itself, also through a Service
        *(address_rule(rule, *_SOURCES) for rule in endpoint.rules),
        drop(Reason.UNIDENTIFIED_PEER),
    ]
