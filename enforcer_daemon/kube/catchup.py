# SPDX-License-Identifier: Apache-2.0
"""Labels and policies of a namespace at least as new as a pod, before the pod is admitted.

The watches of pods, namespaces and policies are independent: a pod may be heard of before its namespace, or before the
policy that was made first and isolates it. A kind of which nothing newer than the pod was heard is asked for, in the
pod's namespace alone. A version that a pod has is newer than all that was made before it (etcd's revision).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from enforcer_daemon.kube.client import ClusterApi
from enforcer_daemon.kube.intake import Intake
from enforcer_daemon.kube.reflector import Reflector, is_older, read_list

_MAX_REMEMBERED = 4_096
"""Namespaces of which is remembered what was asked last."""


@dataclass(slots=True)
class CatchUp:
    """Asks for what the watches have not brought. For the event loop's thread alone."""

    api: ClusterApi
    intake: Intake
    namespaces: Reflector[Any]
    policies: Reflector[Any]
    silence_s: float
    """How long an answer may take, seconds."""
    _asked: OrderedDict[str, str] = field(default_factory=OrderedDict)
    """The newest pod of each namespace that its policies and labels were asked for."""

    async def until(self, namespace: str, version: str) -> None:
        """Have the tables hold what the namespace had at a version; raise ApiError if it cannot be asked for.

        What an earlier daemon kept has no version, and was kept together: there is nothing to ask.
        """
        if not version:
            return
        is_asked = namespace in self._asked and not is_older(self._asked[namespace], version)
        behind = [reflector for reflector in (self.namespaces, self.policies) if self._is_behind(reflector, version)]
        if behind and not is_asked:
            if self.namespaces in behind:
                await self._ask_namespace(namespace)
            if self.policies in behind:
                await self._ask_policies(namespace)
            self._remember(namespace, version)
        await self.intake.until_taken(self.namespaces.table, "", namespace)
        await self.intake.until_taken(self.policies.table, namespace)

    @staticmethod
    def _is_behind(reflector: Reflector[Any], version: str) -> bool:
        heard = reflector.version
        return not heard.isdecimal() or is_older(heard, version)

    async def _ask_namespace(self, namespace: str) -> None:
        """Ask by a list, which needs no permission beside the watch's; a deleted one is gone, and the pod goes too."""
        resource, table = self.namespaces.resource, self.namespaces.table
        body = await self.api.get(resource.path, {"fieldSelector": f"metadata.name={namespace}"}, self.silence_s)
        for entry in read_list(resource, body, table.entries):
            self.namespaces.take(entry)

    async def _ask_policies(self, namespace: str) -> None:
        resource, table = self.policies.resource, self.policies.table
        group, _, plural = resource.path.rpartition("/")
        body = await self.api.get(f"{group}/namespaces/{namespace}/{plural}", {}, self.silence_s)
        entries = await asyncio.to_thread(read_list, resource, body, table.entries)
        self.policies.take_namespace(namespace, entries)

    def _remember(self, namespace: str, version: str) -> None:
        self._asked[namespace] = version
        self._asked.move_to_end(namespace)
        if len(self._asked) > _MAX_REMEMBERED:
            self._asked.popitem(last=False)
