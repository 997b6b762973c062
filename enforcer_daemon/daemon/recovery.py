# SPDX-License-Identifier: Apache-2.0
"""What an earlier daemon left of its endpoints: their namespaces, found again by the records, and what cannot be."""

from __future__ import annotations

import os
from collections.abc import Callable

from enforcer_daemon.daemon.flowstore import FlowStore
from enforcer_daemon.daemon.kernel import Kernel
from enforcer_daemon.daemon.sandbox import Sandbox, open_netns
from enforcer_daemon.errors import DataplaneError, NetnsError
from enforcer_daemon.model import AttachmentId, NetnsId, PodRef
from enforcer_daemon.registration.registry import Record, Registry
from enforcer_daemon.registration.request import AddRequest
from enforcer_daemon.telemetry.logs import Logger


class Recovery:
    """The records that a start begins with, and the pods that it could not take over."""

    def __init__(self, registry: Registry, log: Logger) -> None:
        self._registry = registry
        self._log = log
        self._cut_off: dict[AttachmentId, PodRef] = {}
        self._gone: list[AddRequest] = []

    @property
    def cut_off(self) -> list[str]:
        """Pods that could not be recovered, or the records that do not say which: nobody serves their queues."""
        pods = [str(pod) for pod in dict.fromkeys(self._cut_off.values())]
        return pods + [f"record {aside.path} ({aside.problem})" for aside in self._registry.set_aside]

    def load(self) -> None:
        """Read the records; call it once, before anything is deleted or recovered."""
        for unreadable in self._registry.load():
            self._log.error("record set aside", path=str(unreadable.path), error=unreadable.problem)

    def sandboxes(
        self, is_excluded: Callable[[AddRequest], bool], flow_store: Callable[[NetnsId], FlowStore]
    ) -> list[Sandbox]:
        """Return the recorded namespaces that still exist, opened; forget the records of the others."""
        found: dict[NetnsId, Sandbox] = {}
        for record in list(self._registry.records.values()):
            known = found.get(record.netns)
            if is_excluded(record.request):
                continue
            if known is not None:
                found[record.netns] = known.with_request(record.request)
                continue
            descriptor = open_netns(record.request.netns_path, record.netns)
            if descriptor is None:
                self._drop(record)
                flow_store(record.netns).remove()  # The number of a namespace is used again.
            else:
                found[record.netns] = Sandbox(descriptor, record.netns, {record.attachment: record.request})
        return [with_found_links(sandbox, self._log) for sandbox in found.values()]

    async def detach(
        self, is_excluded: Callable[[AddRequest], bool], flow_store: Callable[[NetnsId], FlowStore], kernel: Kernel
    ) -> None:
        """Take the rules out of excluded pods: they may be of a time before, and nobody serves their queues now."""
        for sandbox in self.sandboxes(lambda request: not is_excluded(request), flow_store):
            try:
                await kernel.remove_rules(sandbox.netns_fd)
            except (DataplaneError, NetnsError) as err:
                self.give_up(sandbox, err)
            else:
                flow_store(sandbox.netns).remove()
                self._log.info("endpoint not enforced: its namespace is excluded", pod=str(sandbox.pod))
            finally:
                os.close(sandbox.netns_fd)

    def give_up(self, sandbox: Sandbox, err: Exception) -> None:
        """Remember that a pod could not be recovered."""
        self._cut_off.update(dict.fromkeys(sandbox.requests, sandbox.pod))
        self._log.error("endpoint not recovered", pod=str(sandbox.pod), error=str(err))

    def forget(self, attachment: AttachmentId) -> None:
        """The pod was deleted."""
        self._cut_off.pop(attachment, None)

    def take_gone(self) -> list[AddRequest]:
        """Return the recorded pods that no longer exist, since the last call."""
        gone, self._gone = self._gone, []
        return gone

    def _drop(self, record: Record) -> None:
        self._registry.remove(record.attachment)
        self._gone.append(record.request)
        self._log.info("endpoint is gone", pod=str(record.request.pod), attachment=str(record.attachment))


def with_found_links(sandbox: Sandbox, log: Logger) -> Sandbox:
    """Find a pod's ends on the node again; where the kernel does not say, what was found before stays."""
    try:
        return sandbox.with_links()
    except (DataplaneError, NetnsError) as err:
        log.error("ends of a pod on the node not found", namespace=str(sandbox.netns), error=str(err))
        return sandbox
