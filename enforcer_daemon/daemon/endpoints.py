# SPDX-License-Identifier: Apache-2.0
"""All endpoints of the node: registered, recovered after a restart, kept in step with the state, deleted."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Mapping
from functools import partial

from cni_plugin import messages
from enforcer_daemon.daemon.announcements import Announcements
from enforcer_daemon.daemon.clusterstate import CompiledState
from enforcer_daemon.daemon.endpoint import Change, Endpoint
from enforcer_daemon.daemon.flowstore import FlowStore
from enforcer_daemon.daemon.following import Following, FollowingWork
from enforcer_daemon.daemon.kernel import Kernel, guard_name, guarded
from enforcer_daemon.daemon.node import Node
from enforcer_daemon.daemon.recovery import Recovery, with_found_links
from enforcer_daemon.daemon.reevaluation import Reevaluation
from enforcer_daemon.daemon.sandbox import Sandbox, recorded_identity
from enforcer_daemon.daemon.staleflows import StaleFlows
from enforcer_daemon.dataplane.netns import current_netns
from enforcer_daemon.errors import DataplaneError, EnforcerError, IdentityTooLargeError, NetnsError, RegistrationError
from enforcer_daemon.model import AttachmentId, NetnsId
from enforcer_daemon.nsfs import netns_id
from enforcer_daemon.registration.registry import Record, Registry
from enforcer_daemon.registration.request import AddRequest
from enforcer_daemon.registration.server import Availability, Readiness
from enforcer_daemon.settings import Settings
from enforcer_daemon.sources.turns import Turns
from enforcer_daemon.telemetry.flowlog import FlowLog
from enforcer_daemon.telemetry.logs import Logger
from enforcer_daemon.telemetry.metrics import Metrics

_REFRESH_AT = 0.5
"""Part of a token's life after which a new one is signed."""


class Endpoints:
    """The registrar behind the plugin's socket, and what the daemon's other tasks act on."""

    def __init__(
        self, settings: Settings, node: Node, kernel: Kernel, registry: Registry, log: Logger, metrics: Metrics,
        turns: Turns,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._node = node
        self._kernel = kernel
        self._registry = registry
        self._log = log
        self._metrics = metrics
        self.announcements: Announcements | None = None
        """Where the cluster is told of denials and of identities that do not fit."""
        self._state: CompiledState | None = None
        self._by_netns: dict[NetnsId, Endpoint] = {}
        self._pending: set[NetnsId] = set()
        """Endpoints whose rules or guard the kernel refused to change; tried again until it does."""
        with os.fdopen(current_netns(), "rb") as own:
            self._own_netns = netns_id(own.fileno())
        self._reevaluation = Reevaluation(log, metrics)
        self.stale = StaleFlows(kernel, self.__iter__, log, metrics)
        self._turns = turns
        work = FollowingWork(kernel, turns, self._reevaluation, self.stale)
        self._following = Following(self._by_netns, work, self._leave_pending)
        self._recovery = Recovery(registry, log)
        self._changing = asyncio.Lock()
        """Registrations take turns; a change of the state does not wait for them."""

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(list(self._by_netns.values()))

    def __len__(self) -> int:
        return len(self._by_netns)

    async def add(self, request: AddRequest, netns_fd: int) -> None:
        """Enforce a pod's interface; a repetition changes nothing, a second interface joins its sandbox."""
        started = time.monotonic()
        try:
            netns = netns_id(netns_fd)
            if netns == self._own_netns:
                raise RegistrationError(messages.NODE_NETNS, "the network namespace is the node's own")
            if self._is_excluded(request):
                self._registry.put(Record(request, netns))
                return
            await self._prepare({request.attachment: request})
            async with self._changing:
                await self._add(request, netns_fd, netns)
            await self.stale.start_clean(netns)
        except IdentityTooLargeError as err:
            if self.announcements is not None:
                self.announcements.note_identity({request.attachment: request}, str(err))
            raise RegistrationError(messages.FAILED, str(err)) from err
        except NetnsError as err:
            raise RegistrationError(messages.UNUSABLE_NETNS, str(err)) from err
        except DataplaneError as err:
            raise RegistrationError(messages.TRY_AGAIN, str(err), retryable=True) from err
        finally:
            os.close(netns_fd)
        self._metrics.registration_seconds.observe(time.monotonic() - started)

    async def _prepare(self, requests: Mapping[AttachmentId, AddRequest]) -> None:
        """Compile a pod's policies in a thread, before anybody has to wait for it."""
        state = self._require_state()
        identity = state.identity_of(requests)
        await self._turns.run(identity.pod.namespace, partial(state.prepare, identity), is_urgent=True)

    async def _add(self, request: AddRequest, netns_fd: int, netns: NetnsId) -> None:
        known = self._by_netns.get(netns)
        if known is not None and known.identity.pod != request.pod:
            raise RegistrationError(messages.FAILED, f"the network namespace is that of {known.identity.pod}")
        if self._settings.registration.require_labels:
            self._require_state().require_labels(request)
        await self._forget_elsewhere(request.attachment, netns)
        before = known.sandbox.ips if known else ()
        if known is None:
            known = await self._open(Sandbox(os.dup(netns_fd), netns, {request.attachment: request}))
        else:
            await self._resize(known, known.sandbox.with_request(request).with_links())
        if not set(known.sandbox.ips) <= set(before):
            self.stale.note_start(netns, known.identity)
        self._registry.put(Record(request, netns))
        self._log.info("endpoint enforced", pod=str(request.pod), attachment=str(request.attachment))
        if not self._require_state().knows_labels({request.attachment: request}):
            self._log.warning("no labels known, policies that select by label do not reach it", pod=str(request.pod))

    async def _open(self, sandbox: Sandbox) -> Endpoint:
        """Make an endpoint: queue first, then rules, then the guard; the sandbox's descriptor goes with it."""
        state = self._require_state()
        try:
            sandbox = sandbox if sandbox.links.names else sandbox.with_links()
            identity = state.identity_of(sandbox.requests)
            on_denial = None if self.announcements is None else self.announcements.denials_of(sandbox.requests)
            flow_log = FlowLog(identity.pod, self._log, self._metrics, time.time, on_denial)
            policy = state.snapshot.pod_policy(identity)
            endpoint = Endpoint(sandbox, self._node, policy, flow_log, self._flow_store(sandbox.netns))
            endpoint.on_ended = self.stale.note_ended
            endpoint.open(self._log)
        except BaseException:
            os.close(sandbox.netns_fd)
            raise
        try:
            await self._apply(endpoint)
            await self._catch_up(endpoint, state)
        except BaseException:
            endpoint.close()
            raise
        # From the last comparison to the entry nothing else runs, so no change of the state is missed.
        self._by_netns[sandbox.netns] = endpoint
        self._metrics.endpoints.set(len(self._by_netns))
        return endpoint

    async def _catch_up(self, endpoint: Endpoint, state: CompiledState) -> None:
        """Take over the states that came while rules were applied by `state`."""
        while state is not self._state:
            await self._prepare(endpoint.sandbox.requests)
            state, before = self._require_state(), guarded(endpoint.sandbox, endpoint.policy)
            endpoint.update(state.identity_of(endpoint.sandbox.requests, endpoint.identity), state.snapshot)
            if guarded(endpoint.sandbox, endpoint.policy) != before:
                await self._kernel.guard(endpoint)

    def _flow_store(self, netns: NetnsId) -> FlowStore:
        return FlowStore.of(self._settings.registration.run_dir, netns, self._log)

    async def _resize(self, endpoint: Endpoint, sandbox: Sandbox) -> None:
        before = guard_name(endpoint.sandbox)
        identity = self._require_state().identity_of(sandbox.requests, endpoint.identity)
        endpoint.replace_sandbox(sandbox, identity)
        await self._apply(endpoint)
        if guard_name(sandbox) != before:
            await self._kernel.remove_guard(before)

    async def _apply(self, endpoint: Endpoint) -> None:
        rules = endpoint.rules(self._settings.dataplane)
        await asyncio.to_thread(self._kernel.backend.apply, endpoint.sandbox.netns_fd, rules)
        endpoint.note_rules(self._kernel.backend)
        await self._kernel.guard(endpoint)

    async def delete(self, attachment: AttachmentId) -> None:
        """Forget an attachment; the last one of a namespace closes its queue."""
        async with self._changing:
            await self._forget_elsewhere(attachment, None)
            record = self._registry.records.get(attachment)
            self._registry.remove(attachment)
            self._recovery.forget(attachment)
            if record is not None:  # Also of a pod that was never recovered.
                self.stale.note_gone(recorded_identity(record.request, self._settings))
                if all(known.netns != record.netns for known in self._registry.records.values()):
                    self._flow_store(record.netns).remove()

    async def _forget_elsewhere(self, attachment: AttachmentId, netns: NetnsId | None) -> None:
        """Take an attachment out of every endpoint but the one of `netns`."""
        for endpoint in list(self._by_netns.values()):
            if endpoint.sandbox.netns != netns and attachment in endpoint.sandbox.requests:
                await self._forget(endpoint, attachment)

    async def _forget(self, endpoint: Endpoint, attachment: AttachmentId) -> None:
        left = endpoint.sandbox.without(attachment)
        if left.requests:
            await self._resize(endpoint, with_found_links(left, self._log))
            return
        del self._by_netns[endpoint.sandbox.netns]
        self._metrics.endpoints.set(len(self._by_netns))
        endpoint.close()
        endpoint.store.remove()
        self.stale.note_stop(endpoint.sandbox.netns)
        self.stale.note_gone(endpoint.identity)
        await self._kernel.remove_guard(guard_name(endpoint.sandbox))
        self._log.info("endpoint forgotten", pod=str(endpoint.identity.pod), attachment=str(attachment))

    async def check(self, attachment: AttachmentId, netns_fd: int) -> None:
        """Return where the attachment is enforced in this namespace; repair its rules where they were touched."""
        try:
            record = self._registry.records.get(attachment)
            if record is not None and self._is_excluded(record.request):
                return
            endpoint = self._by_netns.get(netns_id(netns_fd))
            if endpoint is None or attachment not in endpoint.sandbox.requests or not endpoint.is_open:
                raise RegistrationError(messages.NOT_ENFORCED, f"{attachment} is not enforced")
            async with self._changing:
                await self._repair(endpoint)
        except (DataplaneError, NetnsError) as err:
            raise RegistrationError(messages.NOT_ENFORCED, f"{attachment} cannot be repaired: {err}") from err
        finally:
            os.close(netns_fd)

    async def _repair(self, endpoint: Endpoint) -> None:
        rules = endpoint.rules(self._settings.dataplane)
        backend, netns_fd = self._kernel.backend, endpoint.sandbox.netns_fd
        if not await asyncio.to_thread(backend.is_intact, netns_fd, rules):
            await asyncio.to_thread(backend.apply, netns_fd, rules)
            self._metrics.repaired_rules.labels("pod").inc()
            self._log.warning("rules repaired", pod=str(endpoint.identity.pod))
        endpoint.note_rules(backend)

    async def restore_rules(self) -> None:
        """Put back what somebody else took away, in the pods and on the node; call it about once a second."""
        try:
            if await self._kernel.restore_guard():
                self._metrics.repaired_rules.labels("node").inc()
                self._log.warning("guard put back: somebody else had removed or emptied its tables")
        except DataplaneError as err:
            self._log.error("guard not put back, will try again", error=str(err))
        for endpoint in list(self._by_netns.values()):
            try:
                if endpoint.are_rules_touched():
                    async with self._changing:
                        # What was touched may have been our own change, noted by now.
                        if endpoint.is_open and endpoint.are_rules_touched():
                            await self._repair(endpoint)
            except (DataplaneError, NetnsError) as err:
                self._leave_pending(endpoint, err)

    async def collect(self, network: str, valid: frozenset[AttachmentId]) -> None:
        """Forget what the runtime no longer lists for a network."""
        for attachment, record in list(self._registry.records.items()):
            if record.request.network == network and attachment not in valid:
                await self.delete(attachment)

    def readiness(self) -> Readiness:
        """Return whether a registration could be served now."""
        if self._recovery.cut_off:
            return Readiness(Availability.PODS_CUT_OFF, f"not recovered: {', '.join(self._recovery.cut_off)}")
        if self._pending:
            return Readiness(
                Availability.NOT_READY, f"kernel rules of {len(self._pending)} endpoints are not up to date"
            )
        if self._reevaluation:
            return Readiness(
                Availability.NOT_READY,
                f"established flows of {len(self._reevaluation)} endpoints could not be evaluated",
            )
        if self._state is None:
            return Readiness(Availability.NOT_READY, "the policies have not been read yet")
        return Readiness(Availability.READY)

    def _is_excluded(self, request: AddRequest) -> bool:
        """Return whether the operator has exempted the pod's namespace: it is recorded, and left alone."""
        return request.pod.namespace in self._settings.registration.excluded_namespaces

    def _require_state(self) -> CompiledState:
        if self._state is None:
            raise RegistrationError(messages.TRY_AGAIN, "the policies have not been read yet", retryable=True)
        return self._state

    def load(self) -> None:
        """Read the records of an earlier daemon; call it once, before all else."""
        self._recovery.load()

    async def recover(self) -> bool:
        """Take over the recorded pods that still exist, after `load` and a state; tell whether all could be."""
        async with self._changing:
            sandboxes = self._recovery.sandboxes(self._is_excluded, self._flow_store)
            state = self._require_state()
            for sandbox in sandboxes:
                await self._prepare(sandbox.requests)
            guards = [guarded(each, state.snapshot.pod_policy(state.identity_of(each.requests))) for each in sandboxes]
            await self._kernel.guard_exactly(guards)
            if self._kernel.guard_problem:
                self._log.error("guard incomplete", problem=self._kernel.guard_problem)
            for sandbox in sandboxes:
                await self._recover(sandbox)
            await self._recovery.detach(self._is_excluded, self._flow_store, self._kernel)
            for gone in self._recovery.take_gone():
                self.stale.note_gone(recorded_identity(gone, self._settings))
            return not self._recovery.cut_off

    async def _recover(self, sandbox: Sandbox) -> None:
        try:
            endpoint = await self._open(sandbox)
            endpoint.keep_fresh(self._kernel.fresh_udp_s(endpoint.identity.ips))
            await self._kernel.remove_earlier_rules(sandbox.netns_fd)
        except EnforcerError as err:
            self._recovery.give_up(sandbox, err)
        else:
            self._log.info("endpoint recovered", pod=str(endpoint.identity.pod))
            # Policies and labels may have changed while no daemon ran.
            await self._reevaluation.reevaluate_all(endpoint, self._require_state())

    async def follow(self, state: CompiledState) -> None:
        """Evaluate by another state from now on; return when all that it changes is in force."""
        self._state = state
        await self._following.follow(state)

    async def reevaluate(self) -> None:
        """End flows with peers that are believed no longer."""
        state, change = self._require_state(), Change(False, True, False)
        async with asyncio.TaskGroup() as tasks:
            for endpoint in self._by_netns.values():
                endpoint.end_half_open(state, change)
                tasks.create_task(self._reevaluation.evaluate(endpoint, state, change))

    async def follow_addresses(self) -> None:
        """Tell every endpoint's rules the node's present addresses."""
        backend = self._kernel.backend
        async with self._changing:
            for endpoint in list(self._by_netns.values()):
                netns_fd = endpoint.sandbox.netns_fd
                try:
                    await asyncio.to_thread(backend.update_node_addresses, netns_fd, self._node.addresses)
                    endpoint.note_rules(backend)
                except DataplaneError as err:
                    self._leave_pending(endpoint, err)

    def _leave_pending(self, endpoint: Endpoint, err: EnforcerError) -> None:
        self._pending.add(endpoint.sandbox.netns)
        self._log.error("kernel rules not changed, will try again", pod=str(endpoint.identity.pod), error=str(err))

    async def settle(self) -> None:
        """Try again what the kernel refused before."""
        for netns in list(self._pending):
            endpoint = self._by_netns.get(netns)
            try:
                if endpoint is not None:
                    async with self._changing:
                        await self._apply(endpoint)
            except DataplaneError:
                continue
            self._pending.discard(netns)
        if self._reevaluation:
            await self._reevaluation.retry(self._by_netns, self._require_state())

    def refresh_tokens(self, *, is_forced: bool) -> None:
        """Sign anew where half of a token's life is over, or everywhere after the node's key changed."""
        latest = time.time() - self._settings.credentials.token_lifetime_s * _REFRESH_AT
        for endpoint in self._by_netns.values():
            if is_forced or endpoint.token_signed_at < latest or endpoint.token_signed_at > time.time():
                endpoint.sign()

    def run_timers(self) -> None:
        """Give up what took too long on every endpoint."""
        now = time.monotonic()
        for endpoint in self._by_netns.values():
            endpoint.run_timers(now)

    async def forget_gone(self) -> None:
        """Close the endpoints whose namespace vanished without a DEL: an open queue would keep it alive."""
        for endpoint in list(self._by_netns.values()):
            if endpoint.is_gone():
                self._log.warning("namespace vanished without a DEL", pod=str(endpoint.identity.pod))
                for attachment in list(endpoint.sandbox.requests):
                    await self.delete(attachment)

    async def reconcile_guard(self) -> None:
        """Make the guard's tables anew, as after a change of the networks; raise DataplaneError."""
        async with self._changing:
            await self._kernel.replace_guard(list(self._by_netns.values()))

    def knows(self, attachment: AttachmentId) -> bool:
        """Return whether an attachment is recorded, as enforced or as excluded."""
        return attachment in self._registry.records

    def close(self) -> None:
        """Stop serving; rules and records stay for the next daemon."""
        for endpoint in self._by_netns.values():
            endpoint.close()
        self._by_netns.clear()
