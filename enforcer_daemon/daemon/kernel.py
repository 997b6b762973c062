# SPDX-License-Identifier: Apache-2.0
"""The kernel side that endpoints share: how rules are applied, and the guard on the host, one change at a time."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache, partial

from enforcer_daemon.daemon.endpoint import Endpoint
from enforcer_daemon.daemon.sandbox import Sandbox
from enforcer_daemon.dataplane.backends import RulesBackend
from enforcer_daemon.dataplane.guard import Guard
from enforcer_daemon.dataplane.guard_rules import GuardedEndpoint
from enforcer_daemon.dataplane.nodeflows import SentTuple
from enforcer_daemon.dataplane.takeover import remove_tables
from enforcer_daemon.model import AttachmentId, Identity, IPAddress
from enforcer_daemon.policy.evaluate import PodPolicy
from enforcer_daemon.settings import NetworkSettings
from enforcer_daemon.virtual import VirtualChange


class Kernel:
    """Applies rules and guards; for the event loop's thread alone."""

    def __init__(self, backend: RulesBackend, guard: Guard) -> None:
        self.backend = backend
        self.earlier: tuple[RulesBackend, ...] = ()
        """Those that earlier daemons used, whose rules pods may still have."""
        self._guard = guard
        self._guarding = asyncio.Lock()

    @property
    def guard_problem(self) -> str:
        """What the guard cannot do on this node."""
        return self._guard.problem

    async def remove_rules(self, netns_fd: int) -> None:
        """Take all rules out of a pod; raise DataplaneError or NetnsError."""
        await asyncio.to_thread(self.backend.remove, netns_fd)
        await asyncio.to_thread(remove_tables, netns_fd)
        await self.remove_earlier_rules(netns_fd)

    async def remove_earlier_rules(self, netns_fd: int) -> None:
        """Take those rules out of a pod that another backend made; raise DataplaneError or NetnsError."""
        for backend in self.earlier:
            await asyncio.to_thread(backend.remove, netns_fd)

    async def guard_drops(self) -> dict[str, int]:
        """Count what the guard dropped, by reason; raise DataplaneError."""
        # Changes do not wait for it: nft reads all rules before it tells of counters.
        return await asyncio.to_thread(self._guard.drops)

    async def restore_guard(self) -> bool:
        """Put the guard back where somebody else removed it, and tell whether that was so; raise DataplaneError."""
        async with self._guarding:
            return await asyncio.to_thread(self._guard.restore)

    async def guard(self, *endpoints: Endpoint) -> None:
        """Guard endpoints by their present policies, unless they are closed, all at once; raise DataplaneError."""
        async with self._guarding:  # What waited last is made by the last policy.
            present = [guarded(e.sandbox, e.policy) for e in endpoints if e.is_open]
            await asyncio.to_thread(self._guard.apply, *present)

    async def remove_guard(self, name: AttachmentId) -> None:
        """Forget a sandbox by its name on the host."""
        async with self._guarding:
            await asyncio.to_thread(self._guard.remove, name)

    async def freshen(self, addresses: Iterable[IPAddress], *, is_clean: bool = True) -> None:
        """Have the guard doubt what these addresses send in flows that it does not know; raise DataplaneError.

        Where they are not clean, entries of before their pod are left, and the guard doubts these flows, too.
        """
        async with self._guarding:
            await asyncio.to_thread(partial(self._guard.freshen, tuple(addresses), is_clean=is_clean))

    async def vouch(self, live: Iterable[SentTuple], refused: Iterable[SentTuple]) -> None:
        """Let connections pass that the node lost, and refuse what comes in those no pod has; raise DataplaneError."""
        async with self._guarding:
            await asyncio.to_thread(self._guard.vouch, tuple(live), tuple(refused))

    def fresh_udp_s(self, addresses: Iterable[IPAddress]) -> float:
        """Return how long some of these addresses is fresh for UDP yet, seconds; 0 if none is."""
        return self._guard.fresh_udp_s(addresses)

    async def guard_node(self, addresses: Iterable[IPAddress]) -> None:
        """Let nobody pass for the node under these addresses; raise DataplaneError."""
        async with self._guarding:
            await asyncio.to_thread(self._guard.set_node_addresses, addresses)

    def set_networks(self, networks: NetworkSettings) -> None:
        """Take over the networks that frames are sent to; the guard, when it is replaced next."""
        self._guard.set_networks((*networks.enforced, *networks.virtual), networks.enforced)

    async def change_virtual(self, change: VirtualChange) -> None:
        """Take over what Services make virtual, or no longer do; raise DataplaneError: `restore_guard` tries again."""
        async with self._guarding:
            await asyncio.to_thread(self._guard.change_virtual, change)

    async def replace_guard(self, endpoints: Iterable[Endpoint]) -> None:
        """Replace the whole table by these endpoints, as they are when their turn comes; raise DataplaneError."""
        async with self._guarding:
            present = [guarded(e.sandbox, e.policy) for e in endpoints if e.is_open]
            await asyncio.to_thread(self._guard.replace, present)

    async def guard_exactly(self, endpoints: Iterable[GuardedEndpoint]) -> None:
        """Replace the whole table, so that no masqueraded flow finds it without its pod."""
        async with self._guarding:
            await asyncio.to_thread(self._guard.replace, endpoints)


def guarded(sandbox: Sandbox, policy: PodPolicy) -> GuardedEndpoint:
    """Return what the guard must know of a pod."""
    ingress, egress = policy.ingress.address_rules(), policy.egress.address_rules()
    links, by_identity = sandbox.links, policy.egress.names_pods
    life = _life(guard_name(sandbox), policy.identity)
    return GuardedEndpoint(guard_name(sandbox), sandbox.ips, ingress, egress, links, by_identity, life)


@lru_cache(maxsize=4_096)
def _life(name: AttachmentId, identity: Identity) -> str:
    """Name a pod's life under one identity, which the next daemon compares. Identities are told apart by object."""
    stated = (str(name), str(identity.pod), identity.service_account, sorted(identity.labels.items()))
    ports = sorted((port.name, port.protocol.value, port.number) for port in identity.named_ports)
    text = json.dumps([*stated, sorted(identity.namespace_labels.items()), ports])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def guard_name(sandbox: Sandbox) -> AttachmentId:
    """Name a sandbox on the host: by its first attachment."""
    return min(sandbox.requests)
