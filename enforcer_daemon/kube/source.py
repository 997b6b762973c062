# SPDX-License-Identifier: Apache-2.0
"""The cluster as the source of the daemon's state: what is watched, kept on disk, and put together.

NetworkPolicies and Namespaces of the cluster, the Pods of this node, the Nodes' networks, ServiceCIDRs, and the
addresses of Services unless that is switched off. While the API server is away, the last state stays in force; a daemon
that starts meanwhile goes on with what an earlier one kept.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from enforcer_daemon.kube import kept
from enforcer_daemon.kube.catchup import CatchUp
from enforcer_daemon.kube.client import ClusterApi
from enforcer_daemon.kube.ignored import IgnoredLog
from enforcer_daemon.kube.intake import Intake
from enforcer_daemon.kube.limits import ClusterLimits
from enforcer_daemon.kube.networks import VirtualAddresses, discover, missing_networks
from enforcer_daemon.kube.reflector import Reflector, Surroundings, WatchHealth
from enforcer_daemon.kube.resources import NAMESPACES, NETWORK_POLICIES, NODES, PODS, SERVICE_CIDRS, SERVICES
from enforcer_daemon.kube.table import Entry, Key, Table
from enforcer_daemon.model import PodRef
from enforcer_daemon.policy import AnyPolicy, Pod
from enforcer_daemon.settings import NetworkSettings, Settings
from enforcer_daemon.sources.manifests import ClusterState, Problem
from enforcer_daemon.sources.turns import Turns
from enforcer_daemon.telemetry.logs import Logger
from enforcer_daemon.telemetry.metrics import Metrics
from enforcer_daemon.virtual import VirtualChange

_SECURITY = (NETWORK_POLICIES, NAMESPACES, PODS)
_MAX_TOLD_WARNINGS = 100
"""Warnings in the status, of policies (for each field that an API server would refuse today) and of Services each."""
_STANDS_IN = "no version of it is in force, the pods that it selects are isolated"
"""Without these on disk, a start waits for the API server, however long."""


@dataclass(frozen=True, slots=True)
class RefusedPolicy:
    """A NetworkPolicy whose present version is not in force."""

    namespace: str
    name: str
    uid: str
    problems: str


class ClusterSource:
    """Run `run` as a task; take states from `states`, one after the other."""

    def __init__(
        self,
        settings: Settings,
        log: Logger,
        metrics: Metrics,
        turns: Turns | None = None,
        limits: ClusterLimits | None = None,
    ) -> None:
        self._settings = settings
        self._limits = limits = limits or ClusterLimits()
        self._log = log
        self._directory = settings.state_dir / "cluster"
        self.api = ClusterApi(settings.kubernetes.kubeconfig, settings.registration.run_dir / "kubeconfig")
        self._intake = Intake(turns or Turns(), self._note_change)
        surroundings = Surroundings(self.api, limits, log, self._note_change, random.random, self._intake)
        self._policies: Table[AnyPolicy] = Table(NETWORK_POLICIES)
        self._namespaces: Table[Any] = Table(NAMESPACES)
        self._pods: Table[Pod] = Table(PODS)
        self._nodes: Table[Any] = Table(NODES)
        self._service_cidrs: Table[Any] = Table(SERVICE_CIDRS)
        self._virtual = VirtualAddresses(settings.networks)
        self._services: Table[Any] = Table(SERVICES, self._virtual.put)
        self._ignored = IgnoredLog(self._virtual.ignored, log, time.monotonic())
        self.namespaces = Reflector(self._namespaces, surroundings)
        self.pods = Reflector(self._pods, surroundings, f"spec.nodeName={settings.node}")
        networks = settings.networks
        policies = Reflector(self._policies, surroundings)
        self._catch_up = CatchUp(self.api, self._intake, self.namespaces, policies, limits.request_timeout_s)
        self._reflectors: list[Reflector[Any]] = [
            policies,
            self.namespaces,
            self.pods,
            # Other nodes matter for their pods' networks, and for addresses: of node ports, and that no Service earns.
            Reflector(
                self._nodes,
                surroundings,
                f"metadata.name={settings.node}" if networks.enforced and networks.virtual else "",
            ),
        ]
        if not networks.virtual:
            self._reflectors.append(Reflector(self._service_cidrs, surroundings))
            if settings.kubernetes.watch_services:
                self._reflectors.append(Reflector(self._services, surroundings))
        for reflector in self._reflectors:
            health = reflector.health
            metrics.watch(reflector.resource.plural, health.up, health.silence_s)
        self._discovered: tuple[tuple[int, ...], NetworkSettings] = (), networks
        self._labels: tuple[int, Mapping[str, Mapping[str, str]]] = -1, {}
        self._local: tuple[int, frozenset[str]] = -1, frozenset()
        """Revision of the pods, and their namespaces."""
        self._kept_problems: list[str] = []
        self._is_kept = False
        self._written: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._taken = asyncio.Condition()
        self._in_force = ClusterState()
        self._revisions = -1, -1
        """Of policies and namespaces, as they are in force."""
        self.is_settled = False
        """Whether a state is in force that the API server gave, to this daemon or to an earlier one."""

    # Tasks.

    async def open(self) -> None:
        """Take over what an earlier daemon kept, and the credentials; raise SettingsError."""
        await self.api.open()
        await asyncio.to_thread(self._load)

    async def run(self) -> None:
        """Watch, and keep what is in force on disk, until cancelled; the last state is written at the end, too."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for reflector in self._reflectors:
                    tasks.create_task(reflector.run(), name=f"watch {reflector.resource.plural}")
                tasks.create_task(self._intake.run(), name="objects")
                tasks.create_task(self._save_forever(), name="cluster state on disk")
        finally:
            self._intake.close()
            await self.keep()
            await self.api.close()

    async def states(self) -> AsyncIterator[ClusterState]:
        """Yield the state once it is complete, and again after each change; asking for the next says it is in force."""
        await self._wait_until_settled()
        while True:
            self._changed.clear()
            state, revisions = self._state(), (self._policies.revision, self._namespaces.revision)
            yield state
            self.is_settled = True
            async with self._taken:
                self._in_force, self._revisions = state, revisions
                self._taken.notify_all()
            await self._changed.wait()

    async def _wait_until_settled(self) -> None:
        timeout_s = self._limits.sync_timeout_s
        try:
            async with asyncio.timeout(timeout_s if self._is_kept else None):
                while not self.is_synced:
                    await self._changed.wait()
                    self._changed.clear()
        except TimeoutError:
            self._log.warning("the API server does not answer; what an earlier daemon kept is put in force")

    # What is known.

    @property
    def is_synced(self) -> bool:
        """Whether every kind was listed since the start."""
        return all(reflector.health.is_synced for reflector in self._reflectors)

    def find(self, ref: PodRef, uid: str) -> Pod | None:
        """Return a pod of this node by its name and by what the runtime calls its UID."""
        entry = self._pods.entries.get((ref.namespace, ref.name))
        pod = None if entry is None else entry.value
        return pod if pod is not None and pod.uid == uid else None

    def node_pods(self) -> list[Pod]:
        """Return the pods of this node."""
        return self._pods.values()

    def has_namespace(self, name: str) -> bool:
        """Return whether the cluster has a namespace; while that is not followed, any."""
        return not self.namespaces.health.is_up or ("", name) in self._namespaces.entries

    async def until_in_force(self, ref: PodRef, uid: str) -> Pod:
        """Wait until the state that all endpoints are evaluated by has this pod, and what its namespace had before it.

        Raises ApiError if that was not heard of, and cannot be asked for.
        """
        entry = self._pods.entries.get((ref.namespace, ref.name))
        await self._catch_up.until(ref.namespace, "" if entry is None else entry.version)
        wanted = self._policies.revision, self._namespaces.revision
        async with self._taken:
            while (pod := self._in_force.find_pod(ref, uid)) is None or not self._are_in_force(wanted):
                await self._taken.wait()
            return pod

    def _are_in_force(self, wanted: tuple[int, int]) -> bool:
        return all(have >= want for have, want in zip(self._revisions, wanted, strict=True))

    def networks(self) -> NetworkSettings:
        """Return the networks in force: the configured ones, and in place of what is not configured the discovered."""
        revisions = self._nodes.revision, self._service_cidrs.revision
        if revisions != self._discovered[0]:
            nodes = self._nodes.values()
            found = discover(self._settings.networks, nodes, self._service_cidrs.values())
            if not self._settings.networks.virtual:
                self._virtual.set_networks(found, nodes)
            self._discovered = revisions, found
        return self._discovered[1]

    def take_virtual_change(self) -> VirtualChange:
        """Return what Services have made virtual beside these networks, or no longer do, since the last time."""
        self._ignored.follow(time.monotonic())
        return self._virtual.take_change()

    def problem(self) -> str:
        """Return why no pod can be registered; empty if they can."""
        if not self.is_settled:
            waiting = [
                f"{reflector.resource.plural}{f' ({problem})' if (problem := reflector.health.problem) else ''}"
                for reflector in self._reflectors
                if not reflector.health.is_synced
            ]
            return f"the cluster has not been read yet: {', '.join(waiting) or 'policies are being put in force'}"
        return missing_networks(self._settings.networks, self._settings.node, self._nodes.values())

    def lag(self) -> str:
        """Return what is not followed at present; empty if all is."""
        down = [reflector for reflector in self._reflectors if not reflector.health.is_up]
        if not down:
            return ""
        away_s = max(time.monotonic() - reflector.health.down_since for reflector in down)
        named = ", ".join(f"{reflector.resource.plural} ({reflector.health.problem})" for reflector in down)
        return f"the last state stays in force; not followed for {away_s:.0f} s: {named}"

    def refused_policies(self) -> list[RefusedPolicy]:
        """Return the policies that are refused, with all that is wrong with each."""
        return [
            RefusedPolicy(*entry.key, entry.uid, describe(entry.problems))
            for entry in self._policies.entries.values()
            if entry.problems
        ]

    def refused_services(self) -> list[Entry[Any]]:
        """Return the Services whose present version counts for nothing."""
        return self._services.refused()

    def ignored_addresses(self) -> list[tuple[Key, str, str]]:
        """Return Services with addresses that are not virtual, each with its UID and what is ignored, and why."""
        entries = self._services.entries
        return [(key, entries[key].uid, text) for key, text in self._ignored.told.items() if key in entries]

    def status(self) -> Mapping[str, object]:
        """Describe the source, for operators."""
        return {
            "server": self.api.server,
            "synced": self.is_synced,
            "lag": self.lag(),
            "problems": self._kept_problems,
            "warnings": [
                *[str(warning) for warning in self._policies.warnings()][:_MAX_TOLD_WARNINGS],
                *self._virtual.refusals(_MAX_TOLD_WARNINGS),
            ],
            "virtual_ports": len(self._virtual),
            "watches": {
                reflector.resource.plural: _describe(reflector.health) | {"objects": len(reflector.table.entries)}
                for reflector in self._reflectors
            },
        }

    def _state(self) -> ClusterState:
        problems: tuple[Problem, ...] = tuple(
            problem for reflector in self._reflectors for problem in reflector.table.problems()
        )
        if self._labels[0] != self._namespaces.revision:
            labels = {namespace.name: namespace.labels for namespace in self._namespaces.values()}
            self._labels = self._namespaces.revision, labels
        self._unload()
        return ClusterState(
            tuple(self._policies.values()),
            self._labels[1],
            {pod.ref: pod for pod in self._pods.values()},
            problems,
            is_cluster=True,
        )

    def _unload(self) -> None:
        """Keep policies of namespaces without a pod here as bytes alone."""
        if self._local[0] != self._pods.revision:
            local = frozenset(namespace for namespace, _ in self._pods.entries)
            for policy in self._policies.values() if local != self._local[1] else ():
                if policy.namespace not in local:
                    policy.unload()
            self._local = self._pods.revision, local
        for policy in self._policies.take_changed():
            if policy.namespace not in self._local[1]:
                policy.unload()

    def _note_change(self) -> None:
        self._changed.set()

    # Disk.

    def _scope(self, reflector: Reflector[Any]) -> str:
        return self._settings.node if reflector is self.pods else ""

    def _load(self) -> None:
        found = {}
        for reflector in self._reflectors:
            state = found[reflector.resource.plural] = kept.load(
                self._directory, reflector.resource, self._scope(reflector)
            )
            if state.problem:
                self._kept_problems.append(state.problem)
                self._log.error("kept state not used", problem=state.problem)
            reflector.table.replace(state.entries)
        self._is_kept = all(found[resource.plural].is_there for resource in _SECURITY)

    async def _save_forever(self) -> None:
        while True:
            await asyncio.sleep(self._limits.save_interval_s)
            await self.keep()

    async def keep(self) -> None:
        """Write what changed since the last time, of the kinds that are complete."""
        problems = []
        for reflector in self._reflectors:
            plural, table = reflector.resource.plural, reflector.table
            revision = table.revision
            if not reflector.health.is_synced or self._written.get(plural) == revision:
                continue
            documents = kept.documents(table.entries.values())
            try:
                await asyncio.to_thread(
                    kept.save, self._directory, reflector.resource, self._scope(reflector), documents
                )
                self._written[plural] = revision
            except OSError as err:
                problems.append(f"{kept.file_of(self._directory, reflector.resource)}: cannot be kept: {err}")
                self._log.error("state not kept", problem=problems[-1])
        self._kept_problems = problems


def describe(problems: Iterable[Problem]) -> str:
    """Return what is wrong with one policy, and what is in force instead."""
    listed = list(problems)
    instead = "an earlier version stays in force" if listed[0].has_earlier else _STANDS_IN
    return f"{instead}: {'; '.join(f'{problem.field}: {problem.message}' for problem in listed)}"


def _describe(health: WatchHealth) -> dict[str, object]:
    return {
        "up": health.is_up,
        "synced": health.is_synced,
        "silent_s": round(health.silence_s(), 1),
        "problem": health.problem,
    }
