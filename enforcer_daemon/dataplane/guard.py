# SPDX-License-Identifier: Apache-2.0
"""The guard on the host: what it holds of each endpoint, brought to the kernel one transaction at a time.

A pod with CAP_NET_RAW passes by the rules of its own namespace, and a masqueraded client passes them under the node's
address. The guard stands where neither can: on the pod's interface in the node's namespace (guard_spoofing), on its
bridge (guard_bridge), where packets enter the node's IP stack (guard_arrivals), where the node forwards (guard_forged),
behind every translation of the destination (guard_egress), and after source NAT (guard_masquerade). Fresh addresses
are watched in both directions (guard_fresh).

The tables stay in the kernel while the daemon is down, and are replaced as a whole when it starts.
"""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TypedDict

from enforcer_daemon.dataplane import (
    guard_bridge,
    guard_forged,
    guard_fresh,
    guard_live,
    guard_spoofing,
    guard_virtual,
)
from enforcer_daemon.dataplane.freshtimes import FreshTimes
from enforcer_daemon.dataplane.guard_live import ReportedFlows
from enforcer_daemon.dataplane.guard_render import (
    SYNS_PER_S,
    render_apply,
    render_remove,
    render_replace,
    rule_tables,
    script,
    tables,
)
from enforcer_daemon.dataplane.guard_rules import LOG_GROUP, NAME, GuardedEndpoint, without_log
from enforcer_daemon.dataplane.guard_sets import new_sets, old_sets
from enforcer_daemon.dataplane.guard_shares import endpoint_sets, first_portion
from enforcer_daemon.dataplane.netlink import NETLINK_NETFILTER, open_netlink
from enforcer_daemon.dataplane.nodeflows import SentTuple
from enforcer_daemon.dataplane.tampering import NFPROTO_BRIDGE, NFPROTO_INET, NFPROTO_NETDEV, common_state, generation
from enforcer_daemon.dataplane.tools import run
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import AttachmentId, IPAddress, IPNetwork
from enforcer_daemon.virtual import NOTHING_VIRTUAL, VirtualChange

_CHAINS = (
    *(
        (NFPROTO_INET, NAME, chain)
        for chain in ("framed", "vouched", "standalone", "leaving", "entering", "answered", "syn_acks")
    ),
    *((NFPROTO_INET, NAME, chain) for chain in ("arrived", "forwarded", "sent_on", "unproven", "masqueraded")),
    *((NFPROTO_INET, NAME, chain) for chain in guard_fresh.CHAINS),
    *((NFPROTO_NETDEV, NAME, chain) for chain in ("framed", "checked", "sent", "answers", "entered")),
    *((NFPROTO_BRIDGE, NAME, chain) for chain in ("arrived", "switched")),
)
"""Chains whose rules no endpoint changes: that they are as they were stands for the rest of their tables."""
_UNSUPPORTED = "not supported"
"""What the kernel says of a family or hook that it was built without; any other failure is no reason to do less."""
_NO_MODULE = "No such file"
"""What it says where nfnetlink_log is missing (nf_logger_find_get)."""
_PROBE = "add table netdev {0}\nadd chain netdev {0} probe {{ type filter hook ingress device lo priority 0; }}\n"
_BRIDGE_PROBE = "add table bridge {0}\nadd chain bridge {0} probe {{ type filter hook prerouting priority 0; }}\n"
_LOG_PROBE = "".join(
    f"add table {kind} {{0}}\nadd chain {kind} {{0}} probe\nadd rule {kind} {{0}} probe log group {LOG_GROUP}\n"
    for kind in ("inet", "netdev")
)
_PROBE_TABLE = "trireme_probe"


class _Reach(TypedDict):
    """Which of the guard's tables this kernel can have."""

    on_links: bool
    on_bridges: bool


class Guard:
    """The guard's tables in the host's network namespace, and what was last applied to them.

    Each method blocks for some milliseconds while nft runs, and raises DataplaneError if the kernel refuses; then
    nothing has changed, neither there nor here.
    """

    __slots__ = (
        "_applied",
        "_fresh",
        "_generation",
        "_has_log",
        "_has_nft",
        "_left",
        "_networks",
        "_node_addresses",
        "_on_bridges",
        "_on_links",
        "_pod_networks",
        "_reported",
        "_syns_per_s",
        "_virtual",
        "problem",
    )

    def __init__(self, networks: Iterable[IPNetwork] = (), *, syns_per_s: int = SYNS_PER_S) -> None:
        """Guard pods that may send a SYN with a frame to these networks, and so many SYNs and SYN-ACKs a second."""
        self.set_networks(networks)
        self._syns_per_s = syns_per_s
        self._node_addresses: frozenset[IPAddress] = frozenset()
        self._virtual = NOTHING_VIRTUAL
        self._applied: dict[AttachmentId, GuardedEndpoint] = {}
        self._fresh = FreshTimes()
        self._reported = ReportedFlows()
        self._has_nft = True
        self._on_links = self._on_bridges = self._has_log = True
        self._left: tuple[bytes | None, ...] = ()
        """The tables as we left them; empty before the first time."""
        self._generation = b""
        self.problem = ""
        """What the guard cannot do on this node; empty if it can do all."""

    def set_networks(self, networks: Iterable[IPNetwork], pod_networks: Iterable[IPNetwork] | None = None) -> None:
        """Take over the networks that frames are sent to; they are in the kernel after the next `replace`.

        `pod_networks`: those of them where pods are, so that a frame counts after translation; None: all of them.
        """
        self._networks = tuple(networks)
        self._pod_networks = self._networks if pod_networks is None else tuple(pod_networks)

    def set_node_addresses(self, addresses: Iterable[IPAddress]) -> None:
        """Take over the node's own addresses, under which nobody else may reach a pod."""
        self._node_addresses = frozenset(addresses)
        if not self._left:
            return  # `replace` brings them to the kernel.
        try:
            self._bring(script(self._address_lines()), dict(self._applied))
        except DataplaneError:
            self._left = (None,)  # `restore` tries again.
            raise

    def _address_lines(self) -> list[str]:
        lines = guard_forged.address_lines(self._node_addresses)
        lines += guard_spoofing.address_lines(self._node_addresses) if self._on_links else []
        return lines + (guard_bridge.address_lines(self._node_addresses) if self._on_bridges else [])

    def change_virtual(self, change: VirtualChange) -> None:
        """Take over what Services make virtual, or no longer do: these elements are added and deleted, nothing else."""
        change = change.beyond(self._virtual)
        self._virtual = change.applied_to(self._virtual)
        if not self._left or not self._has_nft or change.is_empty:
            return  # `replace` brings it to the kernel.
        lines = [line for table in rule_tables(self._on_links) for line in guard_virtual.change_lines(table, change)]
        try:
            self._bring(script(lines), dict(self._applied))
        except DataplaneError:
            self._left = (None,)  # `restore` tries again.
            raise

    def replace(self, endpoints: Iterable[GuardedEndpoint]) -> None:
        """Put exactly these endpoints in place, whatever an earlier daemon left; call it once before the others."""
        self._look_at_kernel()
        whole = {endpoint.attachment: endpoint for endpoint in endpoints}
        if self._has_nft and not self._left:
            self._recover_times()
        self._note_times(whole.values())
        if not self._has_nft:
            return
        wanted = {endpoint.attachment: endpoint for endpoint in first_portion(whole.values())}
        first = self._replacement(wanted)
        try:
            _nft(first)
        except DataplaneError:
            second = self._replacement(wanted)
            if second == first:  # Else an interface vanished meanwhile.
                raise
            _nft(second)
        self._applied = wanted
        self._reported.clear()
        self._note()
        for attachment, endpoint in whole.items():
            if endpoint != wanted[attachment]:
                text = render_apply(wanted[attachment], endpoint, absent=_absent([endpoint]), **self._reach)
                after = self._applied | {attachment: endpoint}
                _nft(self._with_sets(text, after))
                self._applied = after
                self._note()

    def _with_sets(self, text: str, wanted: Mapping[AttachmentId, GuardedEndpoint]) -> str:
        """Make what the rules of a change use before it, and take away after it what none uses any longer."""
        tables = rule_tables(self._on_links)
        before, after = endpoint_sets(self._applied.values()), endpoint_sets(wanted.values())
        return script(new_sets(tables, before, after)) + text + script(old_sets(tables, before, after))

    def _replacement(self, wanted: Mapping[AttachmentId, GuardedEndpoint]) -> str:
        """Render all of it; an address that was watched before is fresh for what is left of its time."""
        absent = _absent(wanted.values())
        now = time.monotonic()
        addresses = [address for endpoint in wanted.values() for address in endpoint.addresses]
        text = render_replace(
            wanted.values(),
            self._networks,
            on_links=self._on_links,
            on_bridges=self._on_bridges,
            absent=absent,
            pod_networks=self._pod_networks,
            node_addresses=self._node_addresses,
            syns_per_s=self._syns_per_s,
            virtual=self._virtual,
            is_logged=self._has_log,
        )
        text += script(line for each in addresses for line in guard_fresh.keep_lines(each, self._fresh.left(each, now)))
        return text if self._has_log else script(without_log(text.splitlines()))

    def _look_at_kernel(self) -> None:
        if shutil.which("nft") is None:
            self._has_nft, self.problem = False, "nft is missing on the node: nothing is guarded there"
            return
        self._has_nft = True
        link_problem, bridge_problem, log_problem = _lack(_PROBE), _lack(_BRIDGE_PROBE), _lack(_LOG_PROBE, _NO_MODULE)
        self._on_links, self._on_bridges, self._has_log = not link_problem, not bridge_problem, not log_problem
        problems = []
        if link_problem:
            problems.append(
                f"the kernel has no nft chains on interfaces: pods can send under any address ({link_problem})"
            )
        if bridge_problem:
            problems.append(
                f"the kernel has no nft chains on bridges: a neighbor on a pod's bridge can pass for others "
                f"({bridge_problem})"
            )
        if log_problem:
            problems.append(f"the kernel does not log to user space: drops of the guard are not told ({log_problem})")
        self.problem = "; ".join(problems)

    def _recover_times(self) -> None:
        """Find out for how long an earlier daemon's addresses are fresh yet; if the kernel does not say, all are."""
        with suppress(DataplaneError):
            self._fresh.recover(time.monotonic())

    def _note_times(self, endpoints: Iterable[GuardedEndpoint]) -> None:
        present = tuple(endpoints)
        self._fresh.take(present, time.monotonic())
        self._fresh.keep(address for endpoint in present for address in endpoint.addresses)

    def fresh_udp_s(self, addresses: Iterable[IPAddress]) -> float:
        """Return how long some of these addresses is fresh for UDP yet, seconds; 0 if none is."""
        now = time.monotonic()
        return max((self._fresh.left(address, now).get("fresh_udp", 0.0) for address in addresses), default=0.0)

    def freshen(self, addresses: Iterable[IPAddress], *, is_clean: bool = True) -> None:
        """Let the time of guarded addresses begin; `is_clean` is false where entries of before their pod are left."""
        guarded = {address for endpoint in self._applied.values() for address in endpoint.addresses}
        found = [address for address in addresses if address in guarded]
        if found and self._has_nft:
            self._fresh.begin(found, time.monotonic(), is_clean=is_clean)  # First: the tables may be made anew.
            told = self._reported.remove_lines(found)
            if told or not guard_fresh.is_freshened(found, is_clean=is_clean):
                lines = guard_fresh.freshen_lines(found, is_clean=is_clean) + told
                self._bring(script(lines), dict(self._applied))

    def vouch(self, live: Iterable[SentTuple], refused: Iterable[SentTuple]) -> None:
        """Let connections pass that the node's conntrack lost, and refuse what comes in those that no pod has."""
        now, told = time.monotonic(), ((guard_live.LIVE, live), (guard_live.REFUSED, refused))
        lines = [line for name, flows in told for line in self._reported.add_lines(name, flows, now)]
        if lines and self._has_nft:
            self._bring(script(lines), dict(self._applied))

    def apply(self, *endpoints: GuardedEndpoint) -> None:
        """Bring endpoints to their present addresses, rules and links, all at once; what is so already is not touched.

        An address or link that another endpoint still has goes to the one that is given: a runtime gives it to a new
        pod before the old pod's deletion is known everywhere.
        """
        changed = {e.attachment: e for e in endpoints if self._applied.get(e.attachment) != e}
        if not changed or not self._has_nft:
            return
        losers = self._losers(changed)
        absent = _absent(changed.values())
        text = "".join(
            render_apply(self._applied.get(e.attachment), e, absent=absent, **self._reach)
            for e in (*losers, *changed.values())
        )
        others = [a for e in changed.values() for a in e.addresses if self._fresh.is_another(a, e.life)]
        text += script(self._reported.remove_lines(others))
        self._bring(text, self._applied | {loser.attachment: loser for loser in losers} | changed)

    def _bring(self, text: str, wanted: dict[AttachmentId, GuardedEndpoint]) -> None:
        """Apply a change; where the tables are not as they were left, as after `nft flush ruleset`, make them anew."""
        try:
            _nft(self._with_sets(text, wanted))
        except DataplaneError:
            self.replace(wanted.values())
        self._applied = wanted
        self._note_times(wanted.values())
        self._note()

    def restore(self) -> bool:
        """Put the tables back where somebody else removed or emptied them; tell whether that was so.

        Cheap where nobody has changed any rule on the node since, so it can be called every second.
        """
        if not self._left:
            return False
        with open_netlink(NETLINK_NETFILTER) as sock:
            present, was_whole = generation(sock), None not in self._left
            if present == self._generation and was_whole:
                return False
            if self._state(sock) == self._left and was_whole:
                self._generation = present
                return False
        self.replace(list(self._applied.values()))
        return True

    @property
    def _reach(self) -> _Reach:
        return {"on_links": self._on_links, "on_bridges": self._on_bridges}

    def _note(self) -> None:
        with open_netlink(NETLINK_NETFILTER) as sock:
            self._generation = generation(sock)
            self._left = self._state(sock)

    def _state(self, sock: socket.socket) -> tuple[bytes | None, ...]:
        reach = ((NFPROTO_INET, True), (NFPROTO_NETDEV, self._on_links), (NFPROTO_BRIDGE, self._on_bridges))
        families = [family for family, is_reached in reach if is_reached]
        chains = [chain for chain in _CHAINS if chain[0] in families]
        return common_state(sock, [(family, NAME) for family in families], chains)

    def _losers(self, changed: Mapping[AttachmentId, GuardedEndpoint]) -> list[GuardedEndpoint]:
        """Return the endpoints that others take something from, as they are without it."""
        addresses = {address for endpoint in changed.values() for address in endpoint.addresses}
        links = {name for endpoint in changed.values() for name in endpoint.links.names}
        return [
            replace(
                other,
                addresses=tuple(a for a in other.addresses if a not in addresses),
                links=replace(other.links, names=tuple(n for n in other.links.names if n not in links)),
            )
            for other in self._applied.values()
            if other.attachment not in changed
            and not (addresses.isdisjoint(other.addresses) and links.isdisjoint(other.links.names))
        ]

    def remove(self, attachment: AttachmentId) -> None:
        """Take one endpoint away; one that is not there is no error."""
        before = self._applied.get(attachment)
        if before is not None:
            left = {name: endpoint for name, endpoint in self._applied.items() if name != attachment}
            self._bring(
                render_remove(before, **self._reach) + script(self._reported.remove_lines(before.addresses)), left
            )

    def remove_tables(self) -> None:
        """Take the guard away as a whole, as when the product is removed from the node; not when the daemon stops."""
        self._look_at_kernel()
        if self._has_nft:
            _nft(script(f"{verb} table {table}" for table in tables(**self._reach) for verb in ("add", "delete")))
        self._applied, self._left = {}, ()

    def drops(self) -> dict[str, int]:
        """Count the packets that were dropped since the guard was put in place, by reason."""
        found: dict[str, int] = {}
        for table in tables(**self._reach) if self._has_nft else ():
            listing = json.loads(run(("nft", "-j", "list", "counters", "table", *table.split())))
            for entry in listing["nftables"]:
                if counter := entry.get("counter"):
                    reason = counter["name"].replace("_", "-")
                    found[reason] = found.get(reason, 0) + counter["packets"]
        return found


def _lack(probe: str, sign: str = _UNSUPPORTED) -> str:
    """Return what the kernel says if it was built without what the probe needs; raise DataplaneError otherwise."""
    try:
        run(("nft", "-c", "-f", "-"), probe.format(_PROBE_TABLE))
    except DataplaneError as err:
        if _UNSUPPORTED not in str(err) and sign not in str(err):
            raise
        return str(err)
    return ""


def _absent(endpoints: Iterable[GuardedEndpoint]) -> frozenset[str]:
    return frozenset(name for endpoint in endpoints for name in endpoint.links.names if not _is_present(name))


def _is_present(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _nft(text: str) -> None:
    run(("nft", "-f", "-"), text)
