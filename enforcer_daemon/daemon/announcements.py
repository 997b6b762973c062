# SPDX-License-Identifier: Apache-2.0
"""What the cluster is told by Events: of which pod, of which policy, in the daemon's words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from enforcer_daemon.datapath.context import FlowReport
from enforcer_daemon.kube.source import RefusedPolicy
from enforcer_daemon.kube.table import Entry, Key
from enforcer_daemon.model import AttachmentId
from enforcer_daemon.policy import Pod
from enforcer_daemon.reasons import Reason
from enforcer_daemon.registration.request import AddRequest
from enforcer_daemon.telemetry.events import EventBook, EventKind, Notice, Subject, note_denial


class Announcements:
    """Puts into the book what the parts of the daemon notice."""

    def __init__(self, book: EventBook) -> None:
        self._book = book

    def denials_of(self, requests: Mapping[AttachmentId, AddRequest]) -> Callable[[FlowReport], None]:
        """Return what counts the denied flows of a pod."""
        book, subject = self._book, pod_subject(requests)
        return lambda report: note_denial(book, subject, report)

    def note_identity(self, requests: Mapping[AttachmentId, AddRequest], problem: str) -> None:
        """Take note that a pod's identity fits no packet."""
        subject = pod_subject(requests)
        text = f"{Reason.IDENTITY_TOO_LARGE.value}: {problem}"
        self._book.note_state(
            subject, EventKind.IDENTITY_TOO_LARGE, lambda: Notice(subject, EventKind.IDENTITY_TOO_LARGE, text)
        )

    def note_problems(self, pods: Iterable[tuple[Mapping[AttachmentId, AddRequest], str]]) -> None:
        """Take note of the pods that cannot open connections at present; the others' problem is empty."""
        for requests, problem in pods:
            if problem:
                self.note_identity(requests, problem)

    def note_unenforced(self, pod: Pod) -> None:
        """Tell that a pod started without an enforcer."""
        subject = Subject("v1", "Pod", pod.ref.namespace, pod.ref.name, pod.uid)
        notice = Notice(subject, EventKind.NOT_ENFORCED, UNENFORCED)
        self._book.note_state(subject, EventKind.NOT_ENFORCED, partial(_same, notice))

    def note_closed(self, pods: Iterable[tuple[Mapping[AttachmentId, AddRequest], str]]) -> None:
        """Take note of the pods that are closed, and why; for the others the reason is empty."""
        for requests, why in pods:
            if why:
                subject = pod_subject(requests)
                notice = Notice(subject, EventKind.INTERFACE_TAKEN, f"nothing passes to or from the pod: {why}")
                self._book.note_state(subject, why, partial(_same, notice))

    def note_policy_limit(self, requests: Mapping[AttachmentId, AddRequest], text: str) -> None:
        """Note that the policies that select a pod exceed a limit."""
        subject = pod_subject(requests)
        notice = Notice(subject, EventKind.POLICY_LIMIT_EXCEEDED, text)
        self._book.note_state(subject, text, partial(_same, notice))

    def note_denied_node(self, node: str, why: str) -> None:
        """Tell that a node is believed no longer; `kubectl describe node` asks for its name in place of a UID."""
        subject = Subject("v1", "Node", "", node, node)
        text = f"{Reason.NODE_DENIED.value}: {why}"
        self._book.note(subject, why, lambda: Notice(subject, EventKind.NODE_DENIED, text))

    def note_refused(self, policies: Iterable[RefusedPolicy]) -> None:
        """Take note of the policies that are refused at present."""
        for policy in policies:
            subject = Subject("networking.k8s.io/v1", "NetworkPolicy", policy.namespace, policy.name, policy.uid)
            notice = Notice(subject, EventKind.POLICY_REFUSED, policy.problems, is_shared=True)
            self._book.note_state(subject, policy.problems, partial(_same, notice))

    def note_refused_services(self, services: Iterable[Entry[Any]]) -> None:
        """Take note of the Services that are refused at present."""
        for service in services:
            subject = Subject("v1", "Service", *service.key, service.uid)
            instead = "an earlier version stays in force" if service.problems[0].has_earlier else _NONE_COUNTS
            text = f"{instead}: {'; '.join(f'{problem.field}: {problem.message}' for problem in service.problems)}"
            notice = Notice(subject, EventKind.SERVICE_REFUSED, text, is_shared=True)
            self._book.note_state(subject, text, partial(_same, notice))

    def note_ignored_addresses(self, services: Iterable[tuple[Key, str, str]]) -> None:
        """Note which Services ask for addresses that are not virtual: key, UID, and what is ignored, and why."""
        for key, uid, text in services:
            subject = Subject("v1", "Service", *key, uid)
            notice = Notice(subject, EventKind.ADDRESS_NOT_VIRTUAL, text, is_shared=True)
            self._book.note_state(subject, text, partial(_same, notice))


UNENFORCED = "the pod started, and its runtime did not call the plugin: no policy holds for it on this node"
_NONE_COUNTS = "none of its load balancers' and external addresses and node ports counts"


def _same(notice: Notice) -> Notice:
    return notice


def pod_subject(requests: Mapping[AttachmentId, AddRequest]) -> Subject:
    """Name a pod as the API server does; its UID is what the runtime said."""
    request = next(iter(requests.values()))
    return Subject("v1", "Pod", request.pod.namespace, request.pod.name, request.uid)
