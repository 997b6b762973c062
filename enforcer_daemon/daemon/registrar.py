# SPDX-License-Identifier: Apache-2.0
"""The registrar behind the plugin's socket: the endpoints, and before them the cluster, which says who a pod is."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import replace

from enforcer_daemon.daemon.endpoints import Endpoints
from enforcer_daemon.kube.admission import Admission
from enforcer_daemon.kube.source import ClusterSource
from enforcer_daemon.model import AttachmentId
from enforcer_daemon.registration.request import AddRequest
from enforcer_daemon.registration.server import Availability, Readiness
from enforcer_daemon.settings import Settings

_ADMISSION_TIMEOUT_S = 5.0
"""How long a registration waits for a pod that is not known yet, seconds; half of the plugin's addTimeoutSeconds."""


class Registrar:
    """Registers pods as `registration.server.Registrar` wants it done."""

    def __init__(
        self,
        endpoints: Endpoints,
        settings: Settings,
        cluster: ClusterSource | None,
        on_added: Callable[[], Awaitable[None]],
    ) -> None:
        """`on_added` is awaited after each registration, before the pod may run."""
        self.endpoints = endpoints
        self._on_added = on_added
        self.cluster = cluster
        self._excluded = frozenset(settings.registration.excluded_namespaces)
        self._admission = None
        if cluster is not None:
            self._admission = Admission(cluster, settings.node, _ADMISSION_TIMEOUT_S)
        self.is_started = False
        """Whether the endpoints of an earlier daemon have been recovered."""

    async def add(self, request: AddRequest, netns_fd: int) -> None:
        """Enforce a pod's interface, as the pod that the cluster knows under its name and UID."""
        try:
            if self._admission is not None and request.pod.namespace not in self._excluded:
                request = await self._admission.admit(request)
        except BaseException:
            os.close(netns_fd)
            raise
        await self.endpoints.add(request, netns_fd)
        await self._on_added()

    async def delete(self, attachment: AttachmentId) -> None:
        """Forget an attachment."""
        await self.endpoints.delete(attachment)

    async def check(self, attachment: AttachmentId, netns_fd: int) -> None:
        """Return where the attachment is enforced; repair its rules."""
        await self.endpoints.check(attachment, netns_fd)

    async def collect(self, network: str, valid: frozenset[AttachmentId]) -> None:
        """Forget what the runtime no longer lists for a network."""
        await self.endpoints.collect(network, valid)

    def readiness(self) -> Readiness:
        """Return whether a registration could be served now, and what is not followed although it could."""
        if self.cluster is not None and (problem := self.cluster.problem()):
            return Readiness(Availability.NOT_READY, problem)
        readiness = self.endpoints.readiness()
        if readiness.availability is not Availability.READY:
            return readiness
        if not self.is_started:
            return Readiness(Availability.NOT_READY, "the endpoints of an earlier daemon are being recovered")
        return replace(readiness, detail="" if self.cluster is None else self.cluster.lag())
