# SPDX-License-Identifier: Apache-2.0
"""How the rules of a pod's namespace reach the kernel: nft, or iptables in its nf_tables or legacy form.

All functions block for some milliseconds while the tool runs (a child process inside the namespace); the event loop
calls them in a thread.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from enforcer_daemon.dataplane.netns import new_netns
from enforcer_daemon.dataplane.ratelimits import QueueLimits
from enforcer_daemon.dataplane.rules_iptables import (
    IPTABLES_JUMPS,
    iptables_chains,
    render_iptables,
    render_iptables_addresses,
)
from enforcer_daemon.dataplane.rules_nft import (
    NFT_NODE_SETS,
    NFT_TABLE,
    nft_rule_counts,
    render_nft,
    render_nft_addresses,
)
from enforcer_daemon.dataplane.ruleset import EndpointRules, Family
from enforcer_daemon.dataplane.takeover import are_bridges_shut, shut_bridges
from enforcer_daemon.dataplane.tampering import RulesWatch, watch_legacy, watch_nft
from enforcer_daemon.dataplane.tools import run_in
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import IPAddress
from enforcer_daemon.settings import RulesBackend as BackendSetting

_PROBE = EndpointRules(("eth0",), 0, frozenset(), QueueLimits(per_source=1_000, total=1_000))
_PROTOCOL = re.compile(r"-p (\S+) ")
_PROTOCOL_NAMES = {"1": "icmp", "2": "igmp", "6": "tcp", "58": "ipv6-icmp", "icmpv6": "ipv6-icmp"}
_Result = TypeVar("_Result")


class RulesBackend(Protocol):
    """Rules in the kernel. Each method raises DataplaneError, with what the tool said, where the kernel refuses."""

    @property
    def name(self) -> str:
        """Return how status and logs call it."""

    def apply(self, netns_fd: int, rules: EndpointRules) -> None:
        """Put the rules in place, all at once; again and again gives the same, and packets that wait stay queued."""

    def update_node_addresses(self, netns_fd: int, addresses: Iterable[IPAddress]) -> None:
        """Replace the node's addresses, all at once."""

    def is_intact(self, netns_fd: int, rules: EndpointRules) -> bool:
        """Return whether the rules are in place; where not, `apply` repairs them."""

    def watch(self, netns_fd: int) -> RulesWatch:
        """Watch for changes of the namespace's rules by others; the caller closes it."""

    def remove(self, netns_fd: int) -> None:
        """Take the rules away; the kernel may drop what waits in the queue. Without rules it does nothing."""


class NftBackend:
    """A table of our own, by `nft -f -`."""

    name = "nft"

    def apply(self, netns_fd: int, rules: EndpointRules) -> None:
        """Put the rules in place."""
        run_in(netns_fd, ("nft", "-f", "-"), render_nft(rules))

    def update_node_addresses(self, netns_fd: int, addresses: Iterable[IPAddress]) -> None:
        """Replace the two sets."""
        run_in(netns_fd, ("nft", "-f", "-"), render_nft_addresses(addresses))

    def is_intact(self, netns_fd: int, rules: EndpointRules) -> bool:
        """Compare chains, numbers of rules and addresses: nft prints rules in another form than it reads them."""
        try:
            listing = run_in(netns_fd, ("nft", "-j", "list", "table", "inet", NFT_TABLE))
        except DataplaneError:
            return False  # nft fails where there is no such table
        objects: list[dict[str, Any]] = json.loads(listing)["nftables"]
        counts = {entry["chain"]["name"]: 0 for entry in objects if "chain" in entry}
        for entry in objects:
            if "rule" in entry:
                counts[entry["rule"]["chain"]] += 1
        sets = [entry["set"] for entry in objects if "set" in entry and entry["set"]["name"] in NFT_NODE_SETS]
        addresses = {element for found in sets for element in found.get("elem", ())}
        return counts == nft_rule_counts(rules) and addresses == set(map(str, rules.node_addresses))

    def watch(self, netns_fd: int) -> RulesWatch:
        """Watch the generation of the rules."""
        return watch_nft(netns_fd)

    def remove(self, netns_fd: int) -> None:
        """Delete the table."""
        table = f"table inet {NFT_TABLE}"
        run_in(netns_fd, ("nft", "-f", "-"), f"add {table}\ndelete {table}\n")


class IptablesBackend:
    """Chains of our own in the tables raw, filter and mangle, by iptables-restore; each family by its own tool."""

    def __init__(self, variant: Literal["nft", "legacy"]) -> None:
        self.name = f"iptables-{variant}"
        self._variant = variant
        self._tools: dict[Family, str] = {4: f"iptables-{variant}"}
        if Path("/proc/net/if_inet6").exists():  # else the kernel has no IPv6, and ip6tables fails
            self._tools[6] = f"ip6tables-{variant}"

    def apply(self, netns_fd: int, rules: EndpointRules) -> None:
        """Refill the chains, and add the jumps that are missing or not first; do nothing if all is in place."""

        def apply_family(family: Family) -> None:
            found = self._save(netns_fd, family)
            # To refill with the nf_tables tool takes 0.1 s, which a restart would pay for every pod of the node.
            if not _is_intact(found, rules, family):
                self._restore(netns_fd, family, render_iptables(rules, family) + _jump_repairs(found))

        self._each_family(apply_family)

    def update_node_addresses(self, netns_fd: int, addresses: Iterable[IPAddress]) -> None:
        """Refill the chains of addresses."""
        known = tuple(addresses)
        self._each_family(lambda family: self._restore(netns_fd, family, render_iptables_addresses(known, family)))

    def is_intact(self, netns_fd: int, rules: EndpointRules) -> bool:
        """Compare our chains rule by rule, and the jumps."""

        return all(self._each_family(lambda family: _is_intact(self._save(netns_fd, family), rules, family)))

    def watch(self, netns_fd: int) -> RulesWatch:
        """Watch the generation of the rules, or the sizes of the legacy tables."""
        return (watch_nft if self._variant == "nft" else watch_legacy)(netns_fd)

    def remove(self, netns_fd: int) -> None:
        """Delete the jumps, then the chains."""

        def remove_family(family: Family) -> None:
            self._restore(netns_fd, family, _removal(self._save(netns_fd, family), family))

        self._each_family(remove_family)

    def _save(self, netns_fd: int, family: Family) -> dict[str, list[str]]:
        return parse_saved(run_in(netns_fd, (f"{self._tools[family]}-save",)))

    def _restore(self, netns_fd: int, family: Family, text: str) -> None:
        # The legacy tool takes a lock that all namespaces share.
        run_in(netns_fd, (f"{self._tools[family]}-restore", "--noflush", "-w", "5"), text)

    def _each_family(self, work: Callable[[Family], _Result]) -> list[_Result]:
        """Do the work for both families side by side: nearly all of it is waiting for the tools."""
        with ThreadPoolExecutor(max_workers=len(self._tools)) as pool:
            return list(pool.map(work, self._tools))


class BridgeShuttingBackend:
    """Another backend, and a table beside its rules that shuts bridges in the pod (takeover.py)."""

    def __init__(self, backend: RulesBackend) -> None:
        self._backend = backend
        self.name = backend.name
        self._has_bridges = True
        """Whether nft on this kernel knows bridges; if not, the daemon closes the interface once there is one."""

    def apply(self, netns_fd: int, rules: EndpointRules) -> None:
        """Put the rules in place."""
        self._backend.apply(netns_fd, rules)
        if self._has_bridges and not are_bridges_shut(netns_fd, rules.ifnames):
            try:
                shut_bridges(netns_fd, rules.ifnames)
            except DataplaneError:
                self._has_bridges = False

    def update_node_addresses(self, netns_fd: int, addresses: Iterable[IPAddress]) -> None:
        """Replace the node's addresses."""
        self._backend.update_node_addresses(netns_fd, addresses)

    def is_intact(self, netns_fd: int, rules: EndpointRules) -> bool:
        """Return whether rules and table are in place."""
        is_shut = not self._has_bridges or are_bridges_shut(netns_fd, rules.ifnames)
        return is_shut and self._backend.is_intact(netns_fd, rules)

    def watch(self, netns_fd: int) -> RulesWatch:
        """Watch for changes by others."""
        return self._backend.watch(netns_fd)

    def remove(self, netns_fd: int) -> None:
        """Take the rules away; the table stays, since another backend's rules may be in force beside it."""
        self._backend.remove(netns_fd)


def parse_saved(text: str) -> dict[str, list[str]]:
    """Return table -> rules (each begins with its chain) of what iptables-save printed."""
    tables: dict[str, list[str]] = {}
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
            tables[table] = []
        elif line.startswith("-A "):
            tables[table].append(_PROTOCOL.sub(_protocol_name, line[3:].strip()))
    return tables


def _is_intact(found: Mapping[str, Sequence[str]], rules: EndpointRules, family: Family) -> bool:
    return not _jump_repairs(found) and all(
        _rules_of(found, table, chain) == [f"{chain} {rule}" for rule in chain_rules]
        for table, chains in iptables_chains(rules, family).items()
        for chain, chain_rules in chains.items()
    )


def _rules_of(found: Mapping[str, Sequence[str]], table: str, chain: str) -> list[str]:
    return [rule for rule in found.get(table, ()) if rule.startswith(f"{chain} ")]


def _protocol_name(match: re.Match[str]) -> str:
    """Without /etc/protocols, as in a small image, the tool prints numbers."""
    return f"-p {_PROTOCOL_NAMES.get(match[1], match[1])} "


def _jump_repairs(found: Mapping[str, Sequence[str]]) -> str:
    """Return what makes each jump the first rule of its built-in chain, once; nothing if all are."""
    lines: list[str] = []
    for jump in IPTABLES_JUMPS:
        siblings = _rules_of(found, jump.table, jump.builtin)
        count = siblings.count(jump.rule)
        if count != 1 or siblings[0] != jump.rule:
            deletions = [f"-D {jump.rule}"] * count
            lines += [f"*{jump.table}", *deletions, f"-I {jump.builtin} 1 -j {jump.chain}", "COMMIT"]
    return "".join(line + "\n" for line in lines)


def _removal(found: Mapping[str, Sequence[str]], family: Family) -> str:
    lines: list[str] = []
    for table, chains in iptables_chains(_PROBE, family).items():
        jumps = [jump.rule for jump in IPTABLES_JUMPS if jump.table == table]
        lines.append(f"*{table}")
        lines += [f"-D {rule}" for rule in found.get(table, ()) if rule in jumps]
        # To name a chain here makes it, empty, or empties it; so all can be deleted, also where none was there.
        lines += [f":{chain} - [0:0]" for chain in chains]
        lines += [f"-X {chain}" for chain in chains]
        lines.append("COMMIT")
    return "\n".join(lines) + "\n"


_MAKERS: dict[str, Callable[[], RulesBackend]] = {
    "nft": NftBackend,
    "iptables-nft": lambda: IptablesBackend("nft"),
    "iptables-legacy": lambda: IptablesBackend("legacy"),
}
_CANDIDATES = {BackendSetting.NFT: ("nft",), BackendSetting.IPTABLES: ("iptables-nft", "iptables-legacy")}


def make_backend(name: str) -> RulesBackend:
    """Return the backend of this name; raise DataplaneError if there is none."""
    try:
        return BridgeShuttingBackend(_MAKERS[name]())
    except KeyError:
        raise DataplaneError(f"{name}: no such backend of rules; there are {', '.join(_MAKERS)}") from None


def choose_backend(setting: BackendSetting) -> RulesBackend:
    """Return the first backend that can apply its rules in a scratch namespace; raise DataplaneError if none can."""
    candidates = (
        _CANDIDATES[BackendSetting.NFT] + _CANDIDATES[BackendSetting.IPTABLES]
        if setting is BackendSetting.AUTO
        else _CANDIDATES[setting]
    )
    refusals: list[str] = []
    for name in candidates:
        backend = make_backend(name)
        scratch = new_netns()
        try:
            backend.apply(scratch, _PROBE)
            if backend.is_intact(scratch, _PROBE):
                return backend
            refusals.append(f"{backend.name}: the rules are not there after they were applied")
        except DataplaneError as err:
            refusals.append(f"{backend.name}: {err}")
        finally:
            os.close(scratch)
    raise DataplaneError(f"dataplane.rulesBackend {setting.value}: nothing works here: " + "; ".join(refusals))
