# SPDX-License-Identifier: Apache-2.0
"""How fast packets may come to a pod's queue: rules that stand right before those that queue, in every form.

A flood costs the enforcer what it evaluates of it, so the kernel leaves it no more than an honest source could make
good use of. Each source has a rate and may have a second's worth of it at once; all sources that send to a pod have
another together, for who makes sources up. SYNs, what else begins or goes unreleased, and handshakes' messages are
counted each by itself, in both directions, and by how many of them belong to a connection. What exceeds a rate goes to
the overflow (overflow.py). Sources: iptables-extensions(8), hashlimit; nft(8), limit and sets;
linux/netfilter/xt_hashlimit.h."""

from __future__ import annotations

from dataclasses import dataclass

from enforcer_daemon.dataplane.overflow import overflow_number

_OF_A_CONNECTION = {"syn": 1, "message": 2, "other": 3}
"""Packets of a kind that are queued in a direction for one honest connection, at most: a client that says its word and
closes sends three before the first of them is evaluated; a flow of datagrams has an offer and a proof."""
_SCALE = 1_000_000
"""hashlimit keeps the time between two packets as a whole number of these parts of a second."""
_MAX_SOURCES = 65_536
"""Sources that a rule remembers; while so many are active, hashlimit drops what comes from others."""
_FORGOTTEN_AFTER_MS = 2_000
"""A source that is silent so long would have its whole burst again."""


TOTAL_PER_SOURCE = 2
"""All sources that send to a pod may send this many times what one may: more than an enforcer can handle of honest
connections, so that one source at its limit does not starve the others."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """SYNs a second that are queued in each direction; of other kinds as many more as a connection has."""

    per_source: int
    total: int
    """Of all sources that send to the pod; not for what the pod sends, which is one source."""


def iptables_limits(limits: QueueLimits, kind: str, queue_number: int, *, is_ingress: bool) -> tuple[str, ...]:
    """Write the rules for a chain, as iptables-save gives them back.

    Names carry the rate: the kernel goes on with the table of a name that it has, whatever its new rule says.
    """
    over = f"-j NFQUEUE --queue-num {overflow_number(queue_number)}"
    tables = f"--hashlimit-htable-max {_MAX_SOURCES} --hashlimit-htable-expire {_FORGOTTEN_AFTER_MS}"
    each, total = (_exact(_packets(rate, kind)) for rate in (limits.per_source, limits.total))
    per_source = (
        f"-m hashlimit --hashlimit-above {each}/sec --hashlimit-burst {each} --hashlimit-mode srcip "
        f"--hashlimit-name trireme-{kind}-{each} {tables} {over}"
    )
    if not is_ingress:
        return (per_source,)
    together = (
        f"-m hashlimit --hashlimit-above {total}/sec --hashlimit-burst {total} "
        f"--hashlimit-name trireme-{kind}-all-{total} {over}"
    )
    return per_source, together


def nft_sets(table: str, kind: str) -> tuple[str, ...]:
    """Make the sets of sources that the rules of a chain fill."""
    options = f"size {_MAX_SOURCES}; flags dynamic,timeout; timeout {_FORGOTTEN_AFTER_MS // 1_000}s;"
    return tuple(
        f"add set {table} {_set_name(kind, version)} {{ type ipv{version}_addr; {options} }}" for version in (4, 6)
    )


def nft_limits(limits: QueueLimits, kind: str, queue_number: int, *, is_ingress: bool) -> tuple[str, ...]:
    """Write the rules for a chain.

    `update` keeps a source that goes on: what `add` put there is gone after the timeout, and has its burst again.
    """
    over = f"queue num {overflow_number(queue_number)}"
    each, total = _packets(limits.per_source, kind), _packets(limits.total, kind)
    rate = f"limit rate over {each}/second burst {each} packets"
    per_source = tuple(
        f"update @{_set_name(kind, version)} {{ {family} saddr {rate} }} {over}"
        for version, family in ((4, "ip"), (6, "ip6"))
    )
    if not is_ingress:
        return per_source
    return *per_source, f"limit rate over {total}/second burst {total} packets {over}"


def _set_name(kind: str, version: int) -> str:
    return f"{kind.replace('-', '_')}_rates{version}"


def _packets(connections: int, kind: str) -> int:
    return min(_SCALE, connections * _OF_A_CONNECTION[kind.partition("-")[0]])


def _exact(per_second: int) -> int:
    """Round to a rate that hashlimit can keep, and so gives back as it was told."""
    return _SCALE // (_SCALE // per_second)
