# SPDX-License-Identifier: Apache-2.0
"""The guard as text for nft: all of it, or the change of one endpoint, put together of its parts."""

from __future__ import annotations

from collections.abc import Container, Iterable

from enforcer_daemon.dataplane import (
    guard_arrivals,
    guard_bridge,
    guard_egress,
    guard_forged,
    guard_fresh,
    guard_live,
    guard_masquerade,
    guard_spoofing,
    guard_virtual,
)
from enforcer_daemon.dataplane.guard_rules import GuardedEndpoint
from enforcer_daemon.dataplane.guard_sets import new_sets
from enforcer_daemon.dataplane.guard_shares import endpoint_sets
from enforcer_daemon.model import IPAddress, IPNetwork
from enforcer_daemon.virtual import NOTHING_VIRTUAL, VirtualEntries

_PARTS = guard_masquerade, guard_egress, guard_forged, guard_arrivals, guard_fresh
"""What works on every node."""
SYNS_PER_S = 8_000
"""SYNs and SYN-ACKs of a pod that its interface on the node lets pass in a second, unless another rate is given."""


def render_replace(
    endpoints: Iterable[GuardedEndpoint],
    networks: Iterable[IPNetwork],
    *,
    on_links: bool,
    on_bridges: bool = True,
    absent: Container[str] = (),
    pod_networks: Iterable[IPNetwork] | None = None,
    node_addresses: Iterable[IPAddress] = (),
    syns_per_s: int = SYNS_PER_S,
    virtual: VirtualEntries = NOTHING_VIRTUAL,
    is_logged: bool = True,
) -> str:
    """Return the transaction that replaces whatever is there by exactly these endpoints.

    `networks` are those that frames are sent to; `pod_networks` those of them where pods are (None: all of them).
    """
    known, node = tuple(networks), tuple(node_addresses)
    pods = known if pod_networks is None else tuple(pod_networks)
    lines = [f"{verb} table {table}" for table in tables(on_links, on_bridges) for verb in ("add", "delete", "add")]
    lines += [line for table in rule_tables(on_links) for line in guard_virtual.skeleton(table, virtual)]
    lines += guard_forged.skeleton(node) + guard_arrivals.skeleton()
    lines += guard_live.skeleton() + guard_masquerade.skeleton() + guard_egress.skeleton(known, pods)
    lines += guard_fresh.skeleton(is_logged=is_logged)
    lines += guard_spoofing.skeleton(known, syns_per_s, node, pods) if on_links else []
    lines += guard_bridge.skeleton(node, on_links=on_links) if on_bridges else []
    listed = tuple(endpoints)
    lines += new_sets(rule_tables(on_links), {}, endpoint_sets(listed))
    parts = (
        render_apply(None, endpoint, on_links=on_links, on_bridges=on_bridges, absent=absent) for endpoint in listed
    )
    return script(lines) + "".join(parts)


def render_apply(
    before: GuardedEndpoint | None,
    after: GuardedEndpoint,
    *,
    on_links: bool,
    on_bridges: bool = True,
    absent: Container[str] = (),
) -> str:
    """Return the change of an endpoint from what was applied before (None: nothing) to `after`, without its sets."""
    lines = [line for part in _PARTS for line in part.apply_lines(before, after)]
    lines += guard_bridge.apply_lines(before, after) if on_bridges else []
    return script(lines + (guard_spoofing.apply_lines(before, after, absent) if on_links else []))


def render_remove(before: GuardedEndpoint, *, on_links: bool, on_bridges: bool = True) -> str:
    """Return the transaction that takes an endpoint away."""
    lines = [line for part in _PARTS for line in part.remove_lines(before)]
    lines += guard_bridge.remove_lines(before) if on_bridges else []
    return script(lines + (guard_spoofing.remove_lines(before) if on_links else []))


def tables(on_links: bool, on_bridges: bool) -> tuple[str, ...]:
    """Return the tables that this kernel can have."""
    on = (guard_spoofing.TABLE,) if on_links else ()
    return *on, guard_masquerade.TABLE, *((guard_bridge.TABLE,) if on_bridges else ())


def script(lines: Iterable[str]) -> str:
    """Join commands to one transaction."""
    return "".join(f"{line}\n" for line in lines)


def rule_tables(on_links: bool) -> tuple[str, ...]:
    """Return the tables with rules by address, and with what Services make virtual."""
    return tables(on_links, on_bridges=False)
