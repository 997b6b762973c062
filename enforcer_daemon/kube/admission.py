# SPDX-License-Identifier: Apache-2.0
"""Who a pod is that registers: looked up in what is watched, asked for by name where it is not there yet.

The runtime's word counts for the namespace and the addresses; labels, service account and ports are the API server's.
A pod is known by its name and its UID: the sandbox of an earlier pod of that name does not get the labels of the next.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import replace

from cni_plugin import messages
from enforcer_daemon.errors import RegistrationError
from enforcer_daemon.kube.client import NOT_FOUND, ApiError
from enforcer_daemon.kube.resources import PODS
from enforcer_daemon.kube.source import ClusterSource
from enforcer_daemon.kube.table import Entry, read_entry
from enforcer_daemon.policy import Pod
from enforcer_daemon.registration.request import AddRequest

_CONFIG_HASH = re.compile(r"[0-9a-f]{32}", re.ASCII)
"""What kubelet calls a static pod: an MD5 sum, which has no hyphens as a UID has."""


class Admission:
    """Answers registrations from the cluster's state."""

    def __init__(self, source: ClusterSource, node: str, timeout_s: float) -> None:
        self._source = source
        self._node = node
        self._timeout_s = timeout_s

    async def admit(self, request: AddRequest) -> AddRequest:
        """Return the request with the pod's own labels, once the pod is in the state in force; raise RegistrationError.

        The labels go into the attachment's record, for a daemon that starts after the pod was deleted.
        """
        if problem := self._source.problem():
            raise RegistrationError(messages.TRY_AGAIN, problem, retryable=True)
        try:
            async with asyncio.timeout(self._timeout_s):
                if not request.uid:
                    request = replace(request, uid=await self._uid_of(request))
                elif self._source.find(request.pod, request.uid) is None:
                    await self._ask(request)
                pod = await self._source.until_in_force(request.pod, request.uid)
        except ApiError as err:
            why = f"its namespace's labels and policies may be older than it, and cannot be asked for: {err}"
            raise _retry_later(request, why) from err
        except TimeoutError as err:
            why = f"its labels, or its namespace's policies, could not be had in {self._timeout_s:g} s"
            raise _retry_later(request, why) from err
        return replace(request, labels=pod.labels)

    async def _uid_of(self, request: AddRequest) -> str:
        """Return the UID of the pod whose sandbox a runtime sets up that gives none (cri-dockerd).

        Always asked for, since what is watched may be the pod that had the name before. Kubelet frees a name when the
        sandbox of its pod is gone; a pod that is being deleted gets no new sandbox, so the request is an earlier one's.
        """
        manifest, pod = await self._ask(request)
        metadata = manifest.get("metadata")
        if isinstance(metadata, Mapping) and metadata.get("deletionTimestamp"):
            raise _retry_later(request, "it is being deleted, and the runtime gave no UID to tell it from the next")
        return pod.uid

    async def _ask(self, request: AddRequest) -> tuple[Mapping[str, object], Pod]:
        """Ask the API server for a pod that was not heard of, and take it over."""
        path = f"/api/v1/namespaces/{request.pod.namespace}/pods/{request.pod.name}"
        try:
            manifest = json.loads(await self._source.api.get(path, {}, self._timeout_s))
        except ApiError as err:
            raise self._unknown(request, err) from err
        except ValueError as err:
            raise _retry_later(request, f"the API server's answer cannot be read: {err}") from err
        entry = read_entry(PODS, manifest, {}) if isinstance(manifest, Mapping) else None
        if not isinstance(entry, Entry) or entry.value is None:
            problems = "; ".join(map(str, entry.problems)) if isinstance(entry, Entry) else "no object"
            raise _retry_later(request, f"it cannot be read: {problems}")
        self._require_same(request, entry.value)
        self._source.pods.add(manifest)
        return manifest, entry.value

    def _unknown(self, request: AddRequest, err: ApiError) -> RegistrationError:
        if err.status != NOT_FOUND:
            return _retry_later(request, f"it is not known here, and cannot be asked for: {err}")
        if _CONFIG_HASH.fullmatch(request.uid):
            return _retry_later(request, "a static pod whose mirror is not in the API yet, so its labels are not known")
        return RegistrationError(messages.POD_GONE, f"pod {request.pod} is gone")

    def _require_same(self, request: AddRequest, pod: Pod) -> None:
        if pod.ref != request.pod:
            raise _retry_later(request, f"the API server answered with {pod.ref}")
        if request.uid and pod.uid != request.uid:
            message = f"its UID is {pod.uid}, the runtime's is {request.uid}"
            if _CONFIG_HASH.fullmatch(request.uid):
                raise _retry_later(request, f"the mirror is that of another version of the static pod: {message}")
            raise RegistrationError(messages.POD_GONE, f"pod {request.pod} was replaced: {message}")
        if pod.node != self._node:
            raise RegistrationError(messages.FAILED, f"pod {request.pod} is on node {pod.node or '(none)'}, not here")


def _retry_later(request: AddRequest, why: str) -> RegistrationError:
    return RegistrationError(messages.TRY_AGAIN, f"pod {request.pod}: {why}", retryable=True)
