# SPDX-License-Identifier: Apache-2.0
"""A pod's network namespace and the attachments in it that are enforced."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from enforcer_daemon.dataplane.guard_links import find_links
from enforcer_daemon.dataplane.guard_rules import Links
from enforcer_daemon.errors import NetnsError
from enforcer_daemon.model import AttachmentId, Identity, IPAddress, NetnsId, PodRef
from enforcer_daemon.nsfs import netns_id
from enforcer_daemon.registration.request import AddRequest
from enforcer_daemon.settings import Settings


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A pod's network namespace and the attachments in it; the descriptor is the endpoint's own."""

    netns_fd: int
    netns: NetnsId
    requests: Mapping[AttachmentId, AddRequest]
    links: Links = field(default_factory=Links)
    """The attachments' ends on the node, as they were found last."""

    @property
    def pod(self) -> PodRef:
        """Whose namespace it is."""
        return next(iter(self.requests.values())).pod

    @property
    def ifnames(self) -> tuple[str, ...]:
        """Names of the enforced interfaces."""
        return tuple(sorted(request.attachment.ifname for request in self.requests.values()))

    @property
    def ips(self) -> tuple[IPAddress, ...]:
        """Addresses of all enforced interfaces, each once, in the order of their registration."""
        return tuple(dict.fromkeys(ip for request in self.requests.values() for ip in request.ips))

    def with_request(self, request: AddRequest) -> Sandbox:
        """Add or replace one attachment."""
        return replace(self, requests={**self.requests, request.attachment: request})

    def without(self, attachment: AttachmentId) -> Sandbox:
        """Take one attachment away."""
        left = {known: request for known, request in self.requests.items() if known != attachment}
        return replace(self, requests=left)

    def with_links(self) -> Sandbox:
        """Find the attachments' ends on the node; raise DataplaneError or NetnsError where the kernel does not say."""
        ends = {request.attachment.ifname: request.host_interfaces for request in self.requests.values()}
        return replace(self, links=find_links(self.netns_fd, ends))

    def is_mounted(self) -> bool:
        """Return whether any path of an attachment still leads to this namespace."""
        for request in self.requests.values():
            descriptor = open_netns(request.netns_path, self.netns)
            if descriptor is not None:
                os.close(descriptor)
                return True
        return False


def recorded_identity(request: AddRequest, settings: Settings) -> Identity:
    """Say of a pod that is gone what tells whose its flows were."""
    return Identity(request.pod, request.ips, {}, {}, settings.node, trust_domain=settings.trust_domain)


def open_netns(path: str, expected: NetnsId) -> int | None:
    """Open a namespace by its path; None if nothing, or another namespace, is there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if netns_id(descriptor) == expected:
            return descriptor
    except NetnsError:
        pass
    os.close(descriptor)
    return None
