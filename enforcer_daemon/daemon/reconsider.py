# SPDX-License-Identifier: Apache-2.0
"""Established flows after a change of policy or labels: which of them may go on.

Each end evaluates its own direction. Where the pod's own labels changed, its node also evaluates the peer's direction,
since the peer's node knows the old labels until the next handshake; every node has all policies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from enforcer_daemon.daemon.clusterstate import CompiledState
from enforcer_daemon.datapath.flowindex import BY_ADDRESS, EvaluatedBy, FlowIndex
from enforcer_daemon.dataplane.established import ReleasedFlow
from enforcer_daemon.dataplane.netlink import End
from enforcer_daemon.dataplane.nodeflows import SentTuple
from enforcer_daemon.model import Direction, EvaluatedFlow, Identity, IPAddress, Protocol
from enforcer_daemon.policy.evaluate import DirectionPolicy, PodPolicy

_PROTOCOLS = frozenset(Protocol)
TrueSource = Callable[[int, IPAddress, int, IPAddress, int], IPAddress | None]
"""(protocol, source, source port, destination, destination port) of a flow as the pod sees it -> who opened it; None
where the node does not know."""

Translation = Callable[[SentTuple], End | None]
"""What the pod sends in a flow -> the address and port that the node sends it to; None if the dialed address is not
virtual, or the node does not know the flow."""


@dataclass(frozen=True, slots=True)
class MasqueradedFlows:
    """Flows of one endpoint that were let in as the node's, and of which some are those of masqueraded clients.

    The guard let these in by their own address, and by that they are evaluated again.
    """

    home: frozenset[IPAddress]
    """Addresses of the node and of the pod itself, who may always reach it."""
    ingress: DirectionPolicy
    true_source: TrueSource

    def is_ended(self, flow: ReleasedFlow) -> bool:
        """Return whether a flow is another's than the node's, who is no longer allowed."""
        if flow.protocol not in _PROTOCOLS:
            return False
        ends = flow.source, flow.source_port, flow.destination, flow.destination_port
        source = self.true_source(flow.protocol, *ends)
        if source is None or source in self.home:
            return False
        return not self.ingress.evaluate(None, source, flow.destination_port, Protocol(flow.protocol)).is_allowed


@dataclass(slots=True)
class Reconsideration:
    """One endpoint after one change."""

    own: Identity
    policy: PodPolicy
    flows: FlowIndex
    state: CompiledState
    is_identity_new: bool
    is_peer_denied: Callable[[Identity], bool] = lambda _: False
    """Tells whether a peer is believed no longer, whatever policy says."""
    translation: Translation = lambda _: None
    """Asked for flows by address that are denied by what was dialed."""
    _known: dict[int, bool] = field(default_factory=dict)
    """Indexes, and whether their flows are allowed as a whole."""

    def is_moot(self, indexes: Iterable[int]) -> bool:
        """Return whether every flow evaluated by an identity may go on; `indexes` are all those of the flow index."""
        return self.flows.is_complete and all(self.is_index_allowed(index) for index in indexes)

    def is_index_allowed(self, index: int) -> bool:
        """Return whether all flows of an index may go on; by address or unknown, each is looked at."""
        known = self._known.get(index)
        if known is None:
            evaluated = self.flows.get(index)
            known = self._known[index] = evaluated is not None and not self.is_denied(evaluated)
        return known

    def is_ended(self, flow: ReleasedFlow) -> bool:
        """Return whether a flow is no longer allowed; one of which nothing is known counts as denied."""
        if flow.index == BY_ADDRESS:
            return self._is_denied_by_address(flow)
        if self.flows.get(flow.index) is None:
            return self._side(flow)[0].is_isolated
        return not self.is_index_allowed(flow.index)

    def is_index_denied(self, index: EvaluatedBy) -> bool:
        """Return whether handshakes that were evaluated under an index, or will have one, are no longer allowed.

        Their peers have identities; where the table had no room for one, either direction's isolation counts.
        """
        if isinstance(index, EvaluatedFlow):
            return self.is_denied(index)
        if self.flows.get(index) is None:
            return self.policy.ingress.is_isolated or self.policy.egress.is_isolated
        return not self.is_index_allowed(index)

    def is_denied(self, flow: EvaluatedFlow) -> bool:
        """Evaluate what the flows of one index have in common by the state as it is now."""
        peer = flow.peer
        if peer.pod == self.own.pod and peer.trust_domain == self.own.trust_domain:
            return False
        if self.is_peer_denied(peer):
            return True
        is_local = peer.trust_domain == self.own.trust_domain
        if is_local:
            peer = replace(peer, namespace_labels=self.state.cluster.labels_of(peer.pod.namespace))
        own_side = self.policy.direction(flow.direction)
        if not own_side.evaluate(peer, flow.address, flow.port, flow.protocol).is_allowed:
            return True
        return self.is_identity_new and is_local and self._is_denied_by_peer(flow, peer)

    def _is_denied_by_peer(self, flow: EvaluatedFlow, peer: Identity) -> bool:
        if not self.state.evaluates(peer):
            return False  # Its node does.
        opposite = Direction.INGRESS if flow.direction is Direction.EGRESS else Direction.EGRESS
        policy = self.state.snapshot.pod_policy(peer).direction(opposite)
        address = next((ip for ip in self.own.ips if ip.version == flow.address.version), self.own.ips[0])
        return not policy.evaluate(self.own, address, flow.port, flow.protocol).is_allowed

    def _is_denied_by_address(self, flow: ReleasedFlow) -> bool:
        policy, address = self._side(flow)
        if flow.protocol not in _PROTOCOLS:
            return not policy.evaluate(None, address, None, None).is_allowed
        protocol = Protocol(flow.protocol)
        if policy.evaluate(None, address, flow.destination_port, protocol).is_allowed:
            return False
        if policy is not self.policy.egress:
            return True
        behind = self.translation(flow.sent_by(self.own.ips))
        return behind is None or not policy.evaluate(None, *behind, protocol).is_allowed

    def _side(self, flow: ReleasedFlow) -> tuple[DirectionPolicy, IPAddress]:
        """Return the pod's policy for the direction in which the flow was opened, and the remote address."""
        if flow.source in self.own.ips:
            return self.policy.egress, flow.destination
        return self.policy.ingress, flow.source
