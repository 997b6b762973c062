# SPDX-License-Identifier: Apache-2.0
"""One enforced pod: its queue and rules in the kernel, joined to its datapath, its token and its policy."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

from enforcer_daemon.daemon.clusterstate import CompiledState
from enforcer_daemon.daemon.flowstore import FlowStore
from enforcer_daemon.daemon.leasestore import LeaseStore
from enforcer_daemon.daemon.node import Node
from enforcer_daemon.daemon.reconsider import MasqueradedFlows, Reconsideration
from enforcer_daemon.daemon.room import require_room
from enforcer_daemon.daemon.sandbox import Sandbox
from enforcer_daemon.daemon.service import QueueService
from enforcer_daemon.daemon.slices import batches, in_slices
from enforcer_daemon.datapath.context import EndpointContext
from enforcer_daemon.datapath.decisions import FlowPolicy
from enforcer_daemon.datapath.endpoint import EndpointDatapath, Output
from enforcer_daemon.datapath.flowindex import EvaluatedBy, is_of
from enforcer_daemon.datapath.networks import Destination
from enforcer_daemon.dataplane.addresses import interface
from enforcer_daemon.dataplane.backends import RulesBackend
from enforcer_daemon.dataplane.conntrack import Conntrack
from enforcer_daemon.dataplane.established import (
    EndedIndexes,
    ReleasedFlow,
    end_flows,
    end_masqueraded,
    highest_index,
    indexes_in_use,
    take_back,
)
from enforcer_daemon.dataplane.liveflows import list_live
from enforcer_daemon.dataplane.netlink import End
from enforcer_daemon.dataplane.netns import tune_conntrack
from enforcer_daemon.dataplane.nodeflows import SentTuple
from enforcer_daemon.dataplane.queue import MAX_COPIED_BYTES, PacketQueue
from enforcer_daemon.dataplane.queuecounters import LostPackets
from enforcer_daemon.dataplane.ratelimits import TOTAL_PER_SOURCE, QueueLimits
from enforcer_daemon.dataplane.ruleset import QUEUE_NUMBER, EndpointRules
from enforcer_daemon.dataplane.tampering import RulesWatch
from enforcer_daemon.errors import IdentityTooLargeError
from enforcer_daemon.handshake.leasepairs import Lapse
from enforcer_daemon.handshake.leases import Leases
from enforcer_daemon.model import Direction, EvaluatedFlow, Identity, IPAddress, Protocol
from enforcer_daemon.policy.compile import PolicySnapshot
from enforcer_daemon.policy.evaluate import PodPolicy
from enforcer_daemon.settings import DataplaneSettings
from enforcer_daemon.telemetry.flowlog import FlowLog
from enforcer_daemon.telemetry.logs import Logger

T = TypeVar("T")

_WAKE_SLACK_S = 0.005
"""Timers that are due within so short a time run together, seconds."""


PeerChange = tuple[Identity, Identity | None]
"""A peer pod's identity until now, and its new one; None if the pod is gone."""


class Change(NamedTuple):
    """What a new state means for an endpoint."""

    is_identity_new: bool
    is_policy_new: bool
    are_addresses_new: bool
    """Whether what is allowed by address alone is another."""

    def also(self, other: Change) -> Change:
        """Return both changes as one."""
        return Change(*(one or another for one, another in zip(self, other, strict=True)))


def _is_lapsed(flow: EvaluatedFlow, lapse: Lapse) -> bool:
    is_peer = (flow.peer.pod, flow.peer.trust_domain) == (lapse.peer.pod, lapse.peer.trust_domain)
    return is_peer and flow.address.packed == lapse.address and flow.protocol in lapse.protocols


def _is_stranger(flow: EvaluatedFlow, newcomer: Identity) -> bool:
    """Return whether a flow is with another pod that had one of a newcomer's addresses before."""
    return not is_of(flow.peer, newcomer) and any(ip in newcomer.ips for ip in flow.peer.ips)


class Endpoint:
    """A pod under enforcement, from registration to deletion. For the event loop's thread alone."""

    def __init__(self, sandbox: Sandbox, node: Node, policy: PodPolicy, flow_log: FlowLog, store: FlowStore) -> None:
        """Raise IdentityTooLargeError if no handshake packet of the pod's interface has room for the identity.

        Takes over the sandbox's descriptor only if it succeeds.
        """
        self.sandbox = sandbox
        self.identity = identity = policy.identity
        self.policy = policy
        self.flow_log = flow_log
        self.problem = ""
        """Why the endpoint cannot open connections at present; empty if it can."""
        self.closed = ""
        """What takes an interface from the pod's IP stack, so that nothing passes in or out; empty if nothing does."""
        self.on_ended: Callable[[Endpoint, Sequence[ReleasedFlow]], None] = lambda _endpoint, _flows: None
        """Hears of flows that were ended in the pod, and must end on the node as well."""
        self.endings = 0
        """How often flows were ended in the pod."""
        self._node = node
        self._queue: PacketQueue | None = None
        self._service: QueueService | None = None
        self._watch: RulesWatch | None = None
        # No larger than what the queue shows of a packet: a frame must be read, written and taken off whole.
        self.mtu = min(MAX_COPIED_BYTES, *(interface(sandbox.netns_fd, name).mtu for name in sandbox.ifnames))
        token = node.sign(identity)
        self.identity_bytes, self.budget_bytes = require_room(token, self.mtu)
        self.store = store
        self.flows = store.load(highest_index(sandbox.netns_fd))
        flow_policy = FlowPolicy(node.context, identity.pod, identity.trust_domain, policy, self.flows)
        self._context = EndpointContext(identity.pod, node.context, flow_policy, token, self.mtu)
        self._context.fresh_until = time.monotonic() + node.context.lease_times.udp_lapse_s
        self._leases = LeaseStore(store)
        self._context.leases.answered = self._leases.load()
        self.datapath = EndpointDatapath(self._context)
        self.token_signed_at = time.time()
        self._has_looked = False
        self._index_turn = asyncio.Lock()
        """Held by whoever works on the flow index in slices."""
        self._in_threads = 0
        """Threads at work in the namespace, which may know flows by their index."""
        self._wake_at = math.inf
        self._waking: asyncio.TimerHandle | None = None

    def keep_fresh(self, left_s: float) -> None:
        """Be fresh for what an earlier daemon left of the time, and no longer."""
        self._context.fresh_until = min(self._context.fresh_until, time.monotonic() + left_s)

    def open(self, log: Logger) -> None:
        """Bind the queue inside the namespace and serve it from the running loop; raise DataplaneError."""
        for message in tune_conntrack(self.sandbox.netns_fd):
            log.warning("a setting of the pod's network namespace was refused", error=message)

        def on_error(err: Exception) -> None:
            log.error("packet dropped by an internal error", error=repr(err))

        queue = PacketQueue.open(
            self.sandbox.netns_fd, QUEUE_NUMBER, self._node.limits.queue, self._evaluate, on_error=on_error
        )
        self._service = QueueService(queue, asyncio.get_running_loop(), self._node.work)
        self._queue = queue

    def rules(self, settings: DataplaneSettings) -> EndpointRules:
        """Return what the rules in the pod's namespace depend on."""
        rate = settings.syn_rate_limit_per_source
        limits = QueueLimits(rate, TOTAL_PER_SOURCE * rate)
        return EndpointRules(self.sandbox.ifnames, QUEUE_NUMBER, self._node.addresses, limits)

    def note_rules(self, backend: RulesBackend) -> None:
        """Take the present rules in the namespace for right, after they were applied; raise DataplaneError."""
        if self._watch is None:
            self._watch = backend.watch(self.sandbox.netns_fd)
        self._watch.note()

    def are_rules_touched(self) -> bool:
        """Return whether somebody else may have changed the rules; cheap. Raises DataplaneError."""
        return self._watch is not None and self._watch.is_touched()

    @property
    def lost(self) -> LostPackets:
        """What the kernel dropped of the queue before it was evaluated, as of the last `count_lost`."""
        return LostPackets() if self._queue is None else self._queue.lost

    def count_lost(self) -> LostPackets:
        """Ask the kernel what it dropped of the queue; give what is new since it was asked last."""
        if self._queue is None:
            return LostPackets()
        before = self._queue.lost
        return self._queue.count_lost().since(before)

    @property
    def is_open(self) -> bool:
        """Whether packets are served."""
        return self._queue is not None

    def is_gone(self) -> bool:
        """Return whether the namespace's file vanished without a DEL, or another namespace is mounted there."""
        return not self.sandbox.is_mounted()

    def is_identity_new(self, identity: Identity) -> bool:
        """Return whether an identity states something else than the present one."""
        return not _says_the_same(identity, self.identity)

    def is_touched(self, before: CompiledState, state: CompiledState) -> bool:
        """Return whether a state has other policies of the pod's namespace, or other labels of the pod."""
        if not state.snapshot.has_same(before.snapshot, self.identity.pod.namespace):
            return True
        return self.is_identity_new(state.identity_of(self.sandbox.requests, self.identity))

    def update(self, identity: Identity, snapshot: PolicySnapshot) -> Change:
        """Evaluate new flows by a new snapshot; sign a new token where the identity has changed."""
        is_identity_new = self.is_identity_new(identity)
        if is_identity_new:
            self.identity = identity
            self._context.fresh_until = time.monotonic() + self._node.context.lease_times.udp_lapse_s
            self.sign()
        before, self.policy = self.policy, snapshot.pod_policy(self.identity)
        self._context.policy.replace_rules(self.policy)
        is_same = self.policy.ingress.is_same(before.ingress) and self.policy.egress.is_same(before.egress)
        are_addresses_new = not is_same and _by_address(before) != _by_address(self.policy)
        return Change(is_identity_new, not is_same, are_addresses_new)

    async def reconsider(self, state: CompiledState, change: Change) -> list[ReleasedFlow]:
        """End the established flows that are no longer allowed, in a thread; raise DataplaneError or NetnsError."""
        question = self._reconsideration(state, change)
        indexes = tuple(index for index, _ in self.flows)  # The thread must not walk what the loop adds to.

        def end(netns_fd: int) -> list[ReleasedFlow]:
            if not change.are_addresses_new and question.is_moot(indexes):
                return []  # Without a look at the kernel's table, which takes long: most changes end nothing.
            with Conntrack() as conntrack:
                question.translation = partial(self._translation, conntrack)
                return end_flows(netns_fd, question)

        ended = await self._in_netns(end)
        self._note_ended(ended)
        return ended

    def _translation(self, conntrack: Conntrack, sent: SentTuple) -> End | None:
        destination, port = sent.destination.packed, sent.destination_port
        known = self._node.context.networks.destination(destination, port, Protocol(sent.protocol))
        return conntrack.translated_destination(*sent) if known is Destination.VIRTUAL else None

    async def end_masqueraded(self) -> list[ReleasedFlow]:
        """End the flows of clients that came as the node and are no longer allowed, as `reconsider` does."""
        if not self.policy.ingress.is_isolated:
            return []
        home, ingress = self._node.addresses.union(self.identity.ips), self.policy.ingress

        def end(netns_fd: int) -> list[ReleasedFlow]:
            with Conntrack() as conntrack:
                flows = MasqueradedFlows(home, ingress, conntrack.original_source)
                return end_masqueraded(netns_fd, flows.is_ended)

        ended = await self._in_netns(end)
        self._note_ended(ended)
        return ended

    async def reevaluate_peer(self, old: Identity, new: Identity | None) -> list[ReleasedFlow]:
        """Re-evaluate all flows with a peer pod whose identity changed (None: end them all); return what ended."""
        return await self.reevaluate_peers([(old, new)])

    async def reevaluate_peers(self, changes: Sequence[PeerChange]) -> list[ReleasedFlow]:
        """Do so for several peers; raise DataplaneError or NetnsError (the index then knows the new identities)."""
        was_open = self.is_open
        async with self._index_turn:
            denied: set[int] = set()
            gone: set[int] = set()
            for old, new in changes:
                self._reevaluate_unfinished(old, new)
                flows = self.flows.of_pod(old)
                if new is None:
                    gone.update(flows)
                else:
                    await in_slices(self._reevaluating(flows, new, denied))
            if was_open and not self.is_open:
                return []
            await self.store.compact(self.flows)
            return await self._end_indexes(frozenset(denied | gone), gone)

    def _reevaluate_unfinished(self, old: Identity, new: Identity | None) -> None:
        """Re-evaluate the handshakes under way with a peer pod, whose flows have no index yet."""

        def is_denied(evaluated: EvaluatedBy) -> bool:
            if not isinstance(evaluated, EvaluatedFlow) or not is_of(evaluated.peer, old):
                return False
            return new is None or not self._may_reach(evaluated, new)

        def replaced(evaluated: EvaluatedFlow) -> EvaluatedFlow:
            return replace(evaluated, peer=new) if new is not None and is_of(evaluated.peer, old) else evaluated

        if any(map(is_denied, self.datapath.evaluated_by())):
            self._end_denied(is_denied)
        self.datapath.replace_peers(replaced)

    def _reevaluating(self, flows: Mapping[int, EvaluatedFlow], new: Identity, denied: set[int]) -> Iterator[None]:
        for batch in batches(flows.items()):
            left = [number for number, flow in batch if self.flows.get(number) is flow]
            denied.update(number for number in left if not self._may_reach(flows[number], new))
            self.store.append(self.flows.replace_peer(left, new))
            yield

    def _end_denied(self, is_denied: Callable[[EvaluatedBy], bool]) -> None:
        self._apply(self.datapath.end_denied(is_denied))

    async def end_strangers(self, newcomer: Identity) -> list[ReleasedFlow]:
        """End all flows with pods that had an address before which is a newcomer's now; raises as the others do."""
        strangers = self.flows.of_strangers(newcomer)
        return await self._end_indexes(frozenset(strangers), strangers, lambda flow: _is_stranger(flow, newcomer))

    async def _end_indexes(
        self,
        indexes: frozenset[int],
        gone: Iterable[int],
        is_unfinished_denied: Callable[[EvaluatedFlow], bool] = lambda _: False,
    ) -> list[ReleasedFlow]:
        def is_denied(evaluated: EvaluatedBy) -> bool:
            return is_unfinished_denied(evaluated) if isinstance(evaluated, EvaluatedFlow) else evaluated in indexes

        if indexes or any(map(is_denied, self.datapath.evaluated_by())):
            self._end_denied(is_denied)
        if not indexes:
            return []
        ended = await self._in_netns(lambda netns_fd: end_flows(netns_fd, EndedIndexes(indexes)))
        self.flows.note_ended(gone)
        self._note_ended(ended)
        return ended

    def _note_ended(self, ended: Sequence[ReleasedFlow]) -> None:
        self.endings += bool(ended)
        self.on_ended(self, ended)

    def _may_reach(self, flow: EvaluatedFlow, peer: Identity) -> bool:
        """Return whether the pod's own policy allows a flow with a peer under a new identity."""
        if self._node.is_peer_denied(peer):
            return False
        side = self.policy.direction(flow.direction)
        return side.evaluate(peer, flow.address, flow.port, flow.protocol).is_allowed

    async def take_back(self, flows: Iterable[SentTuple]) -> list[SentTuple]:
        """Take the releases of flows back that the pod opened; their next packets shake hands again."""
        wanted = tuple(flows)
        for flow in wanted:
            remote, own = (flow.destination.packed, flow.destination_port), (flow.source.packed, flow.source_port)
            self._apply(self.datapath.end_opened(remote, own))
        return await self._in_netns(lambda netns_fd: take_back(netns_fd, wanted))

    async def live_flows(self) -> frozenset[SentTuple]:
        """Return the released connections that have a socket, by what the node sees the pod send in them."""
        own = frozenset(self.identity.ips)
        return frozenset(self._as_sent(flow, own) for flow in await self._in_netns(list_live))

    def _as_sent(self, flow: ReleasedFlow, own: frozenset[IPAddress]) -> SentTuple:
        """Return a flow by its true peer: behind a Service the pod's kernel knows it by what was dialed alone."""
        sent, evaluated = flow.sent_by(own), self.flows.get(flow.index)
        if evaluated is None or not evaluated.port or evaluated.direction is not Direction.EGRESS:
            return sent
        return sent._replace(destination=evaluated.address, destination_port=evaluated.port)

    async def _in_netns(self, work: Callable[[int], T]) -> T:
        """Let a thread work in the pod's namespace; the endpoint may be closed meanwhile."""
        netns_fd = os.dup(self.sandbox.netns_fd)

        def run() -> T:
            try:
                return work(netns_fd)
            finally:
                os.close(netns_fd)

        self._in_threads += 1
        try:
            return await asyncio.to_thread(run)
        finally:
            self._in_threads -= 1

    def end_half_open(self, state: CompiledState, change: Change) -> None:
        """Give up the handshakes that are no longer allowed; call it before `reconsider`, on the loop."""
        question = self._reconsideration(state, change)
        if change.is_identity_new:
            self._apply(self.datapath.end_opening())
        self._end_denied(question.is_index_denied)

    @property
    def leases(self) -> Leases:
        """The leases with the pods that the endpoint has released flows with."""
        return self._context.leases

    @property
    def has_flows(self) -> bool:
        """Whether any flow was released by an identity, so that the kernel may have some."""
        return bool(self.leases or (self.flows and not self._has_looked))

    async def look_for_flows(self) -> None:
        """Tell the leases which flows the kernel has; raise DataplaneError or NetnsError."""
        looked_at = time.monotonic()
        self.flows.begin_look()
        indexes = await self._in_netns(indexes_in_use)
        self._has_looked = True
        found = (flow for index in indexes if (flow := self.flows.get(index)) is not None)
        own = {ip.version: ip.packed for ip in reversed(self.identity.ips)}
        flows = [
            (flow.peer, flow.address.packed, own[flow.address.version], flow.protocol)
            for flow in found
            if flow.address.version in own and flow.peer.pod != self.identity.pod
        ]
        self.leases.use(flows, looked_at, time.monotonic())
        if self.is_open:  # It may have ended meanwhile, and its files with it.
            self._leases.save(self.leases.worked(time.monotonic()))
            await self._free(indexes)

    def save_leases(self) -> None:
        """Write how long peers have been silent, if that changed, for a daemon that comes after a crash of this one."""
        if self._has_looked and self.is_open:
            self._leases.save(self.leases.worked(time.monotonic()))

    async def _free(self, in_kernel: Set[int]) -> None:
        """Free the entries of the index that no flow bears any longer."""
        async with self._index_turn:
            borne = in_kernel | {evaluated for evaluated in self.datapath.evaluated_by() if isinstance(evaluated, int)}
            await in_slices(map(self._free_batch, batches(self.flows.unused(borne))))
            if self.is_open:
                await self.store.compact(self.flows)

    def _free_batch(self, numbers: Iterable[int]) -> None:
        if not self._in_threads:  # It would take the next flow of a number for this one.
            self.flows.free(numbers)

    async def end_lapsed(self, lapses: Sequence[Lapse]) -> list[ReleasedFlow]:
        """End the flows that nobody stands for any longer; raise DataplaneError or NetnsError."""

        def is_lapsed(flow: EvaluatedFlow) -> bool:
            return any(_is_lapsed(flow, lapse) for lapse in lapses)

        lapsed = frozenset(index for index, flow in self.flows if is_lapsed(flow))
        return await self._end_indexes(lapsed, (), is_lapsed)

    def _reconsideration(self, state: CompiledState, change: Change) -> Reconsideration:
        is_denied = self._node.is_peer_denied
        return Reconsideration(self.identity, self.policy, self.flows, state, change.is_identity_new, is_denied)

    def sign(self) -> None:
        """Use a fresh token for new flows; one that is too large leaves the pod without a new one, and says so."""
        self.token_signed_at = time.time()
        try:
            token = self._node.sign(self.identity)
            self.identity_bytes, self.budget_bytes = require_room(token, self.mtu)
        except IdentityTooLargeError as err:
            self.problem = str(err)
            self._context.withheld = self._context.local  # It must not be shown any longer; the new one cannot be.
        else:
            self.problem = ""
            self._context.local = token

    def replace_sandbox(self, sandbox: Sandbox, identity: Identity) -> None:
        """Take over another set of attachments of the same namespace."""
        self.sandbox = sandbox
        self.identity = identity
        self.sign()

    def run_timers(self, now: float) -> None:
        """Give up what took too long; call it a few times a second."""
        read_until = now if self._service is None else self._service.timers_now(now)
        self._apply(self.datapath.run_timers(now, read_until))

    def close(self) -> None:
        """Stop serving and let go of the namespace; its rules stay, so that nothing passes unjudged."""
        if self._queue is not None:
            if self._has_looked:  # Else it is not known yet what there is.
                self._leases.save(self.leases.worked(time.monotonic(), is_last=True))
            if self._service is not None:
                self._service.close()
                self._service = None
            self._queue.close()
            self._queue = None
            if self._waking is not None:
                self._waking.cancel()
                self._waking = None
            if self._watch is not None:
                self._watch.close()
                self._watch = None
            os.close(self.sandbox.netns_fd)

    def _evaluate(self, packet: bytes, direction: Direction, mark: int) -> Output:
        """Return what the queue does with a packet, when everything else of the output has been applied."""
        output = self.datapath.process(packet, direction, mark, time.monotonic())
        self._note(output)
        return output

    def _apply(self, output: Output) -> None:
        """Apply an output that belongs to no packet."""
        self._note(output)
        if output.effects and self._queue is not None:
            self._queue.apply(output.effects)

    def _note(self, output: Output) -> None:
        """Log decisions, keep index entries, and wait for the next timer."""
        _, _, reports, entries, wake_at = output
        if entries:
            self.store.append(entries)
        if reports:
            self.flow_log.take(reports)
        if wake_at is not None and wake_at < self._wake_at and self._queue is not None:
            self._wake(wake_at)

    def _wake(self, wake_at: float) -> None:
        if self._waking is not None:
            self._waking.cancel()
        self._wake_at = wake_at
        wait_s = wake_at - time.monotonic() + _WAKE_SLACK_S
        self._waking = asyncio.get_running_loop().call_later(max(0.0, wait_s), self._run_timers)

    def _run_timers(self) -> None:
        self._waking, self._wake_at = None, math.inf
        self.run_timers(time.monotonic())


def _by_address(policy: PodPolicy) -> tuple[object, ...]:
    """Return all that flows without an identity are evaluated by."""
    sides = policy.ingress, policy.egress
    return tuple((side.is_isolated, side.address_rules()) for side in sides)


def _says_the_same(one: Identity, other: Identity) -> bool:
    """Compare what identities state; they are otherwise told apart by object."""
    return (one.labels, one.namespace_labels, one.service_account, one.named_ports, one.ips) == (
        other.labels,
        other.namespace_labels,
        other.service_account,
        other.named_ports,
        other.ips,
    )
