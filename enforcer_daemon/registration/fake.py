# SPDX-License-Identifier: Apache-2.0
"""A Registrar for tests, without a kernel behind it."""

from __future__ import annotations

from cni_plugin import messages
from enforcer_daemon.errors import RegistrationError
from enforcer_daemon.model import AttachmentId, NetnsId
from enforcer_daemon.registration.descriptors import identify_netns
from enforcer_daemon.registration.request import AddRequest
from enforcer_daemon.registration.server import Availability, Readiness


class FakeRegistrar:
    """Takes what comes, remembers it, and fails as it is told to."""

    def __init__(self) -> None:
        self.added: dict[AttachmentId, tuple[AddRequest, NetnsId]] = {}
        self.calls: list[tuple[object, ...]] = []
        self.failure: Exception | None = None
        self.state = Readiness(Availability.READY)

    async def add(self, request: AddRequest, netns_fd: int) -> None:
        netns = _consume(netns_fd)
        self._record("add", request.attachment)
        self.added[request.attachment] = (request, netns)

    async def delete(self, attachment: AttachmentId) -> None:
        self._record("delete", attachment)
        self.added.pop(attachment, None)

    async def check(self, attachment: AttachmentId, netns_fd: int) -> None:
        netns = _consume(netns_fd)
        self._record("check", attachment)
        if attachment not in self.added or self.added[attachment][1] != netns:
            raise RegistrationError(messages.NOT_ENFORCED, f"{attachment} is not registered")

    async def collect(self, network: str, valid: frozenset[AttachmentId]) -> None:
        self._record("collect", network, valid)
        for attachment, (request, _) in list(self.added.items()):
            if request.network == network and attachment not in valid:
                del self.added[attachment]

    def readiness(self) -> Readiness:
        return self.state

    def _record(self, *call: object) -> None:
        self.calls.append(call)
        if self.failure is not None:
            raise self.failure


def _consume(netns_fd: int) -> NetnsId:
    with open(netns_fd, "rb", buffering=0):
        return identify_netns(netns_fd)
