# SPDX-License-Identifier: Apache-2.0
"""Build the daemon from its settings, keep it going, and stop it in order.

Start: keys, rules backend, first state, the endpoints of an earlier daemon, queued deletions, then the sockets. What
cannot start ends the process with a message; systemd or kubelet starts it again, and meanwhile released flows go on.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress

from enforcer_daemon.daemon.announcements import UNENFORCED, Announcements
from enforcer_daemon.daemon.clusterstate import CompiledState, compile_state, with_large_namespaces
from enforcer_daemon.daemon.discovery import Discovery
from enforcer_daemon.daemon.endpoints import Endpoints
from enforcer_daemon.daemon.following import namespaces_of
from enforcer_daemon.daemon.kernel import Kernel
from enforcer_daemon.daemon.leases import LeaseKeeper
from enforcer_daemon.daemon.limits import DEFAULT_LIMITS, DaemonLimits
from enforcer_daemon.daemon.node import Node
from enforcer_daemon.daemon.notices import Notices
from enforcer_daemon.daemon.placement import PlacementGuard
from enforcer_daemon.daemon.policylimits import PolicyLimits
from enforcer_daemon.daemon.registrar import Registrar
from enforcer_daemon.daemon.status import Status
from enforcer_daemon.daemon.takeovers import Takeovers
from enforcer_daemon.daemon.unenforced import UnenforcedPods
from enforcer_daemon.daemon.vouching import Vouching
from enforcer_daemon.dataplane.addresses import watch_addresses
from enforcer_daemon.dataplane.backendrecord import BackendRecord
from enforcer_daemon.dataplane.backends import choose_backend
from enforcer_daemon.dataplane.guard import Guard
from enforcer_daemon.errors import DataplaneError, SettingsError
from enforcer_daemon.kube.credentials import ClusterCredentials
from enforcer_daemon.kube.events import EventSender
from enforcer_daemon.kube.placement import PlacementCheck
from enforcer_daemon.kube.source import ClusterSource
from enforcer_daemon.model import IPAddress
from enforcer_daemon.policy import Pod
from enforcer_daemon.registration.admin import AdminServer
from enforcer_daemon.registration.deletions import drain
from enforcer_daemon.registration.registry import Registry
from enforcer_daemon.registration.server import RegistrationServer
from enforcer_daemon.settings import CredentialSource, NetworkSettings, Settings
from enforcer_daemon.settings_effects import warnings_of
from enforcer_daemon.settings_file import split_listen
from enforcer_daemon.sources.directory import DirectorySource
from enforcer_daemon.sources.manifests import ClusterState, Problem
from enforcer_daemon.sources.turns import SWITCH_INTERVAL_S, Turns
from enforcer_daemon.telemetry.events import EventBook
from enforcer_daemon.telemetry.logs import Logger
from enforcer_daemon.telemetry.metrics import LOST_CAUSES, Metrics

_TIMERS_EVERY_S = 0.1
"""How often endpoints give up what took too long, seconds."""
_SPACING = 5.0
"""Between two states passes this many times the processor time that the first took on the loop."""
_UPKEEP_S = 1.0
"""How often the clock, tokens, queued deletions and vanished namespaces are looked at, seconds."""


async def serve(settings: Settings, log: Logger, limits: DaemonLimits = DEFAULT_LIMITS) -> None:
    """Run the daemon until SIGTERM or SIGINT; raise EnforcerError if something that is needed fails.

    Where the node's certificate comes from the cluster, the first one is awaited here, however long that takes: no pod
    can be registered before it, so kubelet waits too.
    """
    if settings.credentials.source is not CredentialSource.KUBERNETES:
        await Daemon(settings, log, None, limits).run()
        return
    credentials = ClusterCredentials(settings, log, limits.cluster)
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(credentials.run(), name="credentials")
        await credentials.until_there()
        await Daemon(settings, log, credentials, limits).run()
        following.cancel()


class Daemon:
    """The parts, wired."""

    def __init__(
        self,
        settings: Settings,
        log: Logger,
        credentials: ClusterCredentials | None = None,
        limits: DaemonLimits = DEFAULT_LIMITS,
    ) -> None:
        self._settings = settings
        self._limits = limits
        self._log = log
        self._node = Node(settings, log, limits=limits)
        if credentials is not None:
            self._node.outside_problem = lambda: credentials.problem
        self._metrics = Metrics(self._node.context.limit_hits)
        backend = choose_backend(settings.dataplane.rules_backend)
        run_dir = settings.registration.run_dir
        self._deletions = run_dir / "deletions"
        self._kernel = Kernel(backend, Guard(syns_per_s=2 * settings.dataplane.syn_rate_limit_per_source))
        registry = Registry(run_dir / "endpoints")
        turns = Turns()
        self._endpoints = Endpoints(settings, self._node, self._kernel, registry, log, self._metrics, turns)
        self._cluster: ClusterSource | None = None
        if settings.kubernetes.enabled:
            self._cluster = ClusterSource(settings, log, self._metrics, turns, limits.cluster)
        self._announcements, self._events = None, None
        if self._cluster is not None and settings.kubernetes.send_events:
            book = EventBook(limits.events, time.monotonic)
            self._announcements = self._endpoints.announcements = Announcements(book)
            self._events = EventSender(self._cluster.api, book, settings.node, log, self._metrics)
        self._placement: PlacementGuard | None = None
        if self._cluster is not None and settings.kubernetes.verify_placement:
            check = PlacementCheck(limits.placement, self._cluster.api, log, self._metrics)
            self._node.context.placement = check.open(settings)
            check.placement.has_namespace = self._cluster.has_namespace
            self._placement = PlacementGuard(check, self._endpoints, self._announcements)
        self._takeovers = Takeovers(self._endpoints.__iter__, log, self._metrics)
        self._notices = Notices(self._endpoints.__iter__, Vouching(self._kernel, log), log)
        self._leases = LeaseKeeper(self._endpoints, limits.leases, log, self._metrics)
        self._registrar = Registrar(self._endpoints, settings, self._cluster, self._takeovers.look)
        results = settings.registration.cni_results_dir
        self._discovery = None if results is None else Discovery(results, self._registrar, self._endpoints.knows, log)
        self._policy_limits = PolicyLimits(self._endpoints.__iter__, self._announcements, log)
        self._status = Status(settings, self._node, self._registrar, self._metrics, self._kernel, self._policy_limits)
        self._registry = registry
        excluded = settings.registration.excluded_namespaces
        self._unenforced = self._status.unenforced = UnenforcedPods(excluded, self._tell_unenforced)
        self._status.placement = self._placement
        self._admin = AdminServer(run_dir / "admin.sock", self._status.commands())
        self._registration = RegistrationServer(run_dir / "registration.sock", self._registrar)
        self._networks: NetworkSettings | None = None
        self._state: CompiledState | None = None
        self._reported: set[Problem] = set()
        for warning in warnings_of(settings):
            log.warning("setting to check", setting=warning)
        log.info("starting", node=settings.node, rules_backend=backend.name, run_dir=str(run_dir))

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; raise EnforcerError if something that is needed fails."""
        with ExitStack() as stack:
            stack.callback(self._node.close)
            stack.callback(self._endpoints.close)
            # The sockets' lock comes first: two daemons on one directory would fight over its endpoints.
            stack.enter_context(self._admin)
            stack.enter_context(self._registration)
            # Objects are decoded and compiled in threads, and a packet must not wait for one of them.
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            loop, work = asyncio.get_running_loop(), asyncio.ensure_future(self._work())
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, work.cancel)
            loop.add_signal_handler(signal.SIGHUP, self._renew_keys)
            with suppress(asyncio.CancelledError):
                await work
        self._log.info("stopped")

    async def _work(self) -> None:
        addresses, states = watch_addresses(), self._states()
        async with asyncio.TaskGroup() as tasks:
            if self._cluster is not None:
                await self._cluster.open()
                tasks.create_task(self._cluster.run(), name="cluster")
            if self._placement is not None:
                tasks.create_task(self._placement.run(), name="placement")
            if self._events is not None:
                tasks.create_task(self._events.run(), name="events")
            # Operators are answered while the first state is awaited, which takes as long as the API server is away.
            tasks.create_task(self._admin.serve(), name="admin")
            await self._take_addresses(await anext(addresses))
            await self._take(await anext(states))
            self._endpoints.load()
            # A pod that was deleted meanwhile may lack its interfaces already: there is nothing to recover.
            drained = await drain(self._deletions, self._endpoints.delete)
            await self._recover()
            # Asking for the next state says that the first is in force; before, the cluster admits no pod.
            tasks.create_task(self._follow_states(states), name="policies")
            if self._discovery is not None:
                await self._discovery.look(is_start=True)
                tasks.create_task(self._discover(self._discovery), name="discovery")
            _leave_out_of_collections()
            self._registrar.is_started = True
            self._log.info("ready", endpoints=len(self._endpoints), queued_deletions=drained.deleted)
            tasks.create_task(self._registration.serve(), name="registration")
            if self._settings.metrics.listen is not None:
                tasks.create_task(self._serve_metrics(self._settings.metrics.listen), name="metrics")
            tasks.create_task(self._run_timers(), name="run_timers")
            tasks.create_task(self._leases.run(), name="leases")
            tasks.create_task(self._upkeep(), name="upkeep")
            tasks.create_task(self._keep_rules(), name="rules")
            tasks.create_task(self._takeovers.run(), name="links")
            tasks.create_task(self._endpoints.stale.run(), name="stale flows")
            tasks.create_task(self._notices.run(), name="guard's log")
            tasks.create_task(self._follow_addresses(addresses), name="addresses")

    async def _recover(self) -> None:
        backend = self._kernel.backend
        backend_record = BackendRecord(self._settings.registration.run_dir)
        self._kernel.earlier = backend_record.begin(backend)
        if await self._endpoints.recover():
            backend_record.finish(backend)
        self._kernel.earlier = ()  # Pods that come from now on have no other rules.

    def _states(self) -> AsyncIterator[ClusterState]:
        return self._directory_states() if self._cluster is None else self._cluster.states()

    async def _directory_states(self) -> AsyncIterator[ClusterState]:
        directory = self._settings.policy_dir
        if directory is not None:
            if not directory.is_dir():
                # Without policies every pod would be open: not what somebody meant who configured some.
                raise SettingsError(f"policyDir: {directory} is not a directory")
            async for state in DirectorySource(directory, self._settings.state_dir / "last-good").watch():
                yield state
        yield ClusterState()
        await asyncio.Event().wait()

    async def _follow_states(self, states: AsyncIterator[ClusterState]) -> None:
        """Follow one state after the other; a namespace that takes long holds up neither later ones nor others."""
        async with asyncio.TaskGroup() as tasks:
            async for state in states:
                started, working = time.monotonic(), time.thread_time()
                tasks.create_task(self._put_in_force(await self._compile(state), started))
                # New pods are evaluated by it from here on, so it may be called in force. Changes that follow one
                # another without end leave the loop most of its time.
                await asyncio.sleep((time.thread_time() - working) * _SPACING)

    async def _take(self, state: ClusterState) -> None:
        await self._put_in_force(await self._compile(state), time.monotonic())

    async def _compile(self, state: ClusterState) -> CompiledState:
        await self._follow_networks()
        namespaces = {ref.namespace for ref in state.pods} | namespaces_of(self._endpoints)
        compiled = compile_state(state, self._settings, self._state, namespaces)
        self._state = with_large_namespaces(compiled, namespaces)
        return self._state

    async def _put_in_force(self, compiled: CompiledState, started: float) -> None:
        state, generation = compiled.cluster, compiled.snapshot.generation
        await self._endpoints.follow(compiled)
        self._metrics.update_seconds.observe(time.monotonic() - started)
        if self._status.cluster is not None and self._status.cluster.snapshot.generation > generation:
            return  # A later one was in force sooner.
        self._status.cluster = compiled
        self._metrics.snapshot_generation.set(generation)
        replaced = sum(problem.has_earlier is True for problem in state.problems)
        self._metrics.count_refused(replaced, len(state.problems) - replaced)
        if self._announcements is not None and self._cluster is not None:
            self._announcements.note_refused(self._cluster.refused_policies())
            self._announcements.note_refused_services(self._cluster.refused_services())
            self._announcements.note_ignored_addresses(self._cluster.ignored_addresses())
        told, self._reported = self._reported, set(state.problems)
        for problem in self._reported - told:
            self._log.error("object refused", problem=str(problem), earlier_in_force=problem.has_earlier)
        self._log.info("policies in force", generation=generation, policies=len(state.policies))

    async def _follow_networks(self) -> None:
        """Class addresses by the networks in force; the guard learns them at recovery, and of later ones here."""
        networks = self._settings.networks if self._cluster is None else self._cluster.networks()
        await self._follow_services()
        if networks == self._networks:
            return
        self._node.context.networks.replace(networks)
        self._kernel.set_networks(networks)
        self._log.info("networks", enforced=list(map(str, networks.enforced)), virtual=list(map(str, networks.virtual)))
        try:
            if self._networks is not None:
                await self._endpoints.reconcile_guard()
        except DataplaneError as err:
            self._log.error("guard not changed, will try again", error=str(err))
        else:
            self._networks = networks

    async def _follow_services(self) -> None:
        """Take over the addresses and node ports that Services made virtual, or no longer do."""
        if self._cluster is None or (change := self._cluster.take_virtual_change()).is_empty:
            return
        self._node.context.networks.change_virtual(change)
        try:
            await self._kernel.change_virtual(change)
        except DataplaneError as err:
            self._log.error("guard not changed, will try again", error=str(err))

    async def _follow_addresses(self, addresses: AsyncIterator[frozenset[IPAddress]]) -> None:
        async for current in addresses:
            await self._take_addresses(current)
            await self._endpoints.follow_addresses()
            self._log.info("node addresses", addresses=sorted(map(str, current)))

    async def _take_addresses(self, addresses: frozenset[IPAddress]) -> None:
        self._node.set_addresses(addresses)
        try:
            await self._kernel.guard_node(addresses)
        except DataplaneError as err:
            self._log.error("guard not changed, will try again", error=str(err))

    async def _discover(self, discovery: Discovery) -> None:
        while True:
            await asyncio.sleep(self._limits.discovery_interval_s)
            await discovery.look()

    async def _run_timers(self) -> None:
        while True:
            await asyncio.sleep(_TIMERS_EVERY_S)
            self._endpoints.run_timers()

    async def _upkeep(self) -> None:
        while True:
            await asyncio.sleep(_UPKEEP_S)
            self._node.follow_clock()
            self._renew_keys()
            await drain(self._deletions, self._endpoints.delete)
            await self._endpoints.forget_gone()
            await self._endpoints.settle()
            await self._follow_networks()
            if self._announcements is not None:
                self._announcements.note_problems(
                    (endpoint.sandbox.requests, endpoint.problem) for endpoint in self._endpoints
                )
                self._announcements.note_closed(
                    (endpoint.sandbox.requests, endpoint.closed) for endpoint in self._endpoints
                )
            self._policy_limits.report(self._status.cluster)
            self._look_for_unenforced()
            self._measure()

    def _look_for_unenforced(self) -> None:
        """Compare the pods that the cluster shows on this node with those that registered."""
        if self._cluster is None or not self._cluster.is_synced:
            return
        registered = {(record.request.pod, record.request.uid) for record in self._registry.records.values()}
        self._unenforced.look(self._cluster.node_pods(), registered, time.monotonic())
        for started, pods in (("before", self._unenforced.earlier), ("past", self._unenforced.passed)):
            self._metrics.unenforced_pods.labels(started).set(len(pods))

    def _tell_unenforced(self, pod: Pod) -> None:
        self._log.error("pod not enforced", pod=str(pod.ref), why=UNENFORCED)
        if self._announcements is not None:
            self._announcements.note_unenforced(pod)

    def _measure(self) -> None:
        """Bring the metrics up to date that nobody pushes."""
        for endpoint in self._endpoints:
            for field, count in endpoint.count_lost()._asdict().items():
                self._metrics.lost_packets.labels(LOST_CAUSES[field]).inc(count)
        if self._placement is not None:
            self._placement.measure()
        datapaths = [endpoint.datapath for endpoint in self._endpoints]
        self._metrics.half_open_flows.set(sum(datapath.half_open_flows for datapath in datapaths))
        self._metrics.held_packets.set(sum(datapath.held_packets for datapath in datapaths))

    async def _keep_rules(self) -> None:
        while True:
            await asyncio.sleep(_UPKEEP_S)
            await self._endpoints.restore_rules()

    async def _serve_metrics(self, listen: str) -> None:
        # A web server is much memory for what is off by default.
        from enforcer_daemon.telemetry.listener import serve_metrics

        await serve_metrics(split_listen(listen), self._status.render_metrics)

    def _renew_keys(self) -> None:
        """Take over changed key files; operators who do not want to wait a second send SIGHUP."""
        self._endpoints.refresh_tokens(is_forced=self._node.renew_keys())


def _leave_out_of_collections() -> None:
    """Let no search for cyclic garbage walk what is known by now.

    With the objects of a large cluster each full one takes tenths of a second, in which no packet is evaluated. They
    are trees without cycles, so what goes out of use is still freed at once.
    """
    gc.collect()
    gc.freeze()
