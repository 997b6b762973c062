# SPDX-License-Identifier: Apache-2.0
"""Report pods whose policies exceed a limit (`policy/limits.py`): in the status, once in the log, and by Events."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from enforcer_daemon.daemon.announcements import Announcements
from enforcer_daemon.daemon.clusterstate import CompiledState
from enforcer_daemon.daemon.endpoint import Endpoint
from enforcer_daemon.sources.manifests import Problem
from enforcer_daemon.telemetry.logs import Logger


class PolicyLimits:
    """Reports limits. For the event loop's thread alone."""

    def __init__(
        self, endpoints: Callable[[], Iterable[Endpoint]], announcements: Announcements | None, log: Logger
    ) -> None:
        self._endpoints = endpoints
        self._announcements = announcements
        self._log = log
        self._told: set[Problem] = set()

    def problems(self) -> list[Problem]:
        """Return the problems of single pods; those of namespaces are among the state's."""
        return [problem for endpoint in self._endpoints() for problem in _problems(endpoint)]

    def report(self, state: CompiledState | None) -> None:
        """Log what is new, and note Events on the pods."""
        told, self._told = self._told, set(self.problems())
        for problem in self._told - told:
            self._log.error("policy limit exceeded", problem=str(problem))
        if self._announcements is None:
            return
        large = {} if state is None else state.large
        for endpoint in self._endpoints():
            of_namespace = large.get(endpoint.identity.pod.namespace)
            for text in [of_namespace] if of_namespace else endpoint.policy.problems:
                self._announcements.note_policy_limit(endpoint.sandbox.requests, text)


def _problems(endpoint: Endpoint) -> list[Problem]:
    pod = f"Pod {endpoint.identity.pod}"
    return [Problem("networkpolicies", 0, pod, "", text) for text in endpoint.policy.problems]
