# SPDX-License-Identifier: Apache-2.0
"""The kernel side that endpoints share: how rules are applied, and the guard on the host, one change at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from enforcer_daemon.daemon.endpoint import Endpoint
from enforcer_daemon.daemon.sandbox import Sandbox
from enforcer_daemon.dataplane.backends import RulesBackend
from enforcer_daemon.dataplane.guard import Guard, GuardedEndpoint
from enforcer_daemon.model import AttachmentId
from enforcer_daemon.policy.evaluate import PodPolicy


class Kernel:
    """Applies rules and guards; for the event loop's thread alone."""

    def __init__(self, backend: RulesBackend, guard: Guard) -> None:
        self.backend = backend
        self._guard = guard
        self._guarding = asyncio.Lock()

    async def guard(self, endpoint: Endpoint) -> None:
        """Guard an endpoint by its present policy, unless it is closed; raise DataplaneError."""
        async with self._guarding:  # What waited last is made by the last policy.
            if endpoint.is_open:
                await asyncio.to_thread(self._guard.apply, guarded(endpoint.sandbox, endpoint.policy))

    async def unguard(self, name: AttachmentId) -> None:
        """Forget a sandbox by its name on the host."""
        async with self._guarding:
            await asyncio.to_thread(self._guard.remove, name)

    async def guard_exactly(self, endpoints: Iterable[GuardedEndpoint]) -> None:
        """Replace the whole table, so that no masqueraded flow finds it without its pod."""
        async with self._guarding:
            await asyncio.to_thread(self._guard.replace, endpoints)


def guarded(sandbox: Sandbox, policy: PodPolicy) -> GuardedEndpoint:
    """Give what the guard must know of a pod."""
    return GuardedEndpoint(guard_name(sandbox), sandbox.ips, policy.ingress.address_rules())


def guard_name(sandbox: Sandbox) -> AttachmentId:
    """Name a sandbox on the host: by its first attachment."""
    return min(sandbox.requests)
