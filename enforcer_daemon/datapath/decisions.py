# SPDX-License-Identifier: Apache-2.0
"""Decisions on flows: one function for what comes in, one for what goes out, one for who answers; all protocols.

What policy says is remembered for each peer, address and port until policy or the networks change.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import NamedTuple
from typing import Protocol as Interface

from enforcer_daemon.datapath.flowindex import BY_ADDRESS, UNKNOWN, FlowIndex
from enforcer_daemon.datapath.networks import Destination
from enforcer_daemon.datapath.node import NodeContext
from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.flowkey import FlowKey
from enforcer_daemon.handshake.frames import SynAckFrame
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.handshake.session import Grant
from enforcer_daemon.marks import NODE, RELEASED, released_mark
from enforcer_daemon.model import Decision, Direction, EvaluatedFlow, Identity, IPAddress, PodRef, Protocol
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import Action, Verdict

MAX_DECISIONS = 16_384
"""Remembered decisions of one endpoint and kind; if there are more, all are made again."""
_PROTOCOLS_WITH_IDENTITY = frozenset({Protocol.TCP, Protocol.UDP})
_NAMED_PROTOCOLS = frozenset(Protocol)
"""Those that a rule can name; any other is allowed by rules without ports alone."""


class DirectionRules(Interface):
    """What policy offers for one direction of a pod."""

    @property
    def is_isolated(self) -> bool:
        """Tell whether any policy selects the pod for this direction."""

    def evaluate(
        self, peer: Identity | None, address: IPAddress, port: int | None, protocol: Protocol | None
    ) -> Decision:
        """Decide on a flow with a peer, or with an address if no identity was shown.

        `protocol` None: one that no rule can name, and so has no ports that a rule could name either.
        """

    def could_allow(self, address: IPAddress | None, port: int | None, protocol: Protocol) -> bool:
        """Tell whether some peer there could be allowed; None: address or port are not known yet."""


class PodRules(Interface):
    """What policy offers for a pod."""

    @property
    def ingress(self) -> DirectionRules:
        """Rules for what comes in."""

    @property
    def egress(self) -> DirectionRules:
        """Rules for what goes out."""


class Opener(Interface):
    """A packet that opens a flow."""

    @property
    def src(self) -> bytes: ...

    @property
    def dst(self) -> bytes: ...

    @property
    def sport(self) -> int | None: ...

    @property
    def dport(self) -> int | None: ...


class Evaluation(NamedTuple):
    """A decision, and how a flow that it allows is released."""

    decision: Decision
    grant: Grant | None
    """None: it is denied."""


class Inbound(NamedTuple):
    """What is decided on a flow that is opened to the pod."""

    source: bytes
    """The packed address that counts as the peer's."""
    evaluation: Evaluation


class Outbound(NamedTuple):
    """What is decided on a flow that the pod opens, before anybody has answered."""

    evaluation: Evaluation
    """By the dialed address alone; a denial of any pod there, if `needs_handshake` is not set."""
    needs_handshake: bool
    """Whether a peer there may show an identity, which decides."""


_BY_ADDRESS = Grant(Verdict(Action.RELEASE, mark=released_mark(BY_ADDRESS)))
_UNINDEXED = Verdict(Action.RELEASE, mark=released_mark(UNKNOWN))
_FROM_NODE = Evaluation(
    Decision(True, Reason.NODE, Direction.INGRESS), Grant(Verdict(Action.RELEASE, mark=RELEASED | NODE))
)
_IDENTITY_REQUIRED = Evaluation(Decision(False, Reason.IDENTITY_REQUIRED, Direction.INGRESS), None)

_Question = tuple[Peer | None, bytes, int | None, int]
"""Peer (None: no identity was shown), address, port and protocol of a flow."""


class Answered(NamedTuple):
    """What is decided on a flow whose other end showed no identity."""

    evaluation: Evaluation
    remote: bytes
    """Packed address that decided: the dialed one, or the one that the node sends the flow to."""
    port: int
    detail: str
    """For a denial of a virtual address: what is behind it; else empty."""


class FlowPolicy:
    """Policy as one endpoint's packets meet it."""

    def __init__(self, node: NodeContext, pod: PodRef, trust_domain: str, rules: PodRules, flows: FlowIndex) -> None:
        self._node = node
        self._pod = pod
        self._trust_domain = trust_domain
        self._rules = rules
        self.flows = flows
        self._ingress: dict[_Question, Evaluation] = {}
        self._egress: dict[_Question, Evaluation] = {}
        self._outbound: dict[tuple[bytes, int | None, int], Outbound] = {}
        self._changes = node.networks.changes

    def replace_rules(self, rules: PodRules) -> None:
        """Decide by another snapshot from now on."""
        self._rules = rules
        for table in (self._ingress, self._egress, self._outbound):
            table.clear()

    def is_own(self, peer: Peer) -> bool:
        """Tell whether a peer is this very pod."""
        identity, own = peer.identity, self._pod
        pod = identity.pod
        return pod.name == own.name and pod.namespace == own.namespace and identity.trust_domain == self._trust_domain

    def inbound(self, packet: Opener, protocol: int, peer: Peer | None = None, *, is_answer: bool = False) -> Inbound:
        """Decide on a flow that a packet opens to the pod; raise PeerError if the peer is not at its source.

        A peer that shows an identity counts by that. Else the node's own traffic passes, an address of the enforced
        networks may be required to show one, and policy decides on the address that the packet really came from.
        `is_answer`: the pod has dialed the same ends, so the packet is the other half of a simultaneous open
        (RFC 9293, section 3.5), and connect() returns: then egress to the peer must be allowed as well.
        """
        source = packet.src
        if peer is not None:
            if source not in peer.addresses or self.is_own(peer):
                source = self._source_of(packet, protocol, peer)
        else:
            source, is_node = self._trace(packet, protocol)
            if is_node:
                return Inbound(source, _FROM_NODE)
            if self._node.networks.must_show_identity(source):
                return Inbound(source, _IDENTITY_REQUIRED)
        question = peer, source, packet.dport, protocol
        evaluation = self._ingress.get(question) or self._ask(Direction.INGRESS, question)
        if is_answer and evaluation.grant is not None:
            answered = self.egress(peer, source, packet.sport, protocol)
            return Inbound(source, evaluation if answered.grant is not None else answered)
        return Inbound(source, evaluation)

    def outbound(self, address: bytes, port: int | None, protocol: int) -> Outbound:
        """Decide on a flow that the pod opens to an address.

        Outside the enforced and virtual networks, and if the protocol carries no identity, policy decides on the
        address. Inside them a peer's identity decides, unless no rule could allow any peer there.
        """
        if self._node.networks.changes != self._changes:
            self._changes = self._node.networks.changes
            self._outbound.clear()
        question = address, port, protocol
        known = self._outbound.get(question)
        if known is None:
            if len(self._outbound) >= MAX_DECISIONS:
                self._outbound.clear()
            known = self._outbound[question] = self._decide_outbound(address, port, protocol)
        return known

    def egress(self, peer: Peer | None, address: bytes, port: int | None, protocol: int) -> Evaluation:
        """Decide on a flow to a peer that has answered; None: without an identity."""
        question = peer, address, port, protocol
        return self._egress.get(question) or self._ask(Direction.EGRESS, question)

    def answered(self, key: FlowKey) -> Answered:
        """Decide on a flow of the pod's whose other end showed no identity, by address.

        A rule may name the dialed address, or, if that is virtual, the address and port behind it, as implementations
        that evaluate after translation do. The node's conntrack knows it once the flow's first packet has left.
        """
        protocol, dialed = key.protocol, (key.remote, key.remote_port)
        evaluation = self.egress(None, *dialed, protocol)
        if evaluation.grant is not None or not self._is_virtual(*dialed, protocol):
            return Answered(evaluation, *dialed, "")
        behind = self._node.true_destination(protocol, key.own, key.own_port, *dialed)
        if behind is None or behind == dialed:
            return Answered(evaluation, *dialed, "")
        translated = self.egress(None, *behind, protocol)
        if translated.grant is None:
            return Answered(evaluation, *dialed, f"the node sends it to {ip_address(behind[0])}, port {behind[1]}")
        return Answered(translated, *behind, "")

    def may_lead_to_allowed(self, key: FlowKey) -> bool:
        """Return whether a virtual address is dialed, and a rule allows the protocol to some address."""
        if not self._is_virtual(key.remote, key.remote_port, key.protocol):
            return False
        return self._rules.egress.could_allow(None, None, Protocol(key.protocol))

    def _is_virtual(self, address: bytes, port: int, protocol: int) -> bool:
        is_named = protocol in _NAMED_PROTOCOLS
        return is_named and self._node.networks.destination(address, port, Protocol(protocol)) is Destination.VIRTUAL

    def require_dialled(self, answer: SynAckFrame, peer: Peer, dialed: tuple[bytes, int], protocol: Protocol) -> None:
        """Raise PeerError unless the pod is at the address it states, and that one was dialed or is virtual."""
        if answer.address not in peer.addresses:
            raise PeerError(Reason.RESPONDER_MISMATCH, f"{peer.identity.pod} answers for an address not its own")
        if (answer.address, answer.port) != dialed and (
            self._node.networks.destination(*dialed, protocol) is not Destination.VIRTUAL
        ):
            raise PeerError(Reason.RESPONDER_MISMATCH, f"{peer.identity.pod} answers for another address")

    def _trace(self, packet: Opener, protocol: int) -> tuple[bytes, bool]:
        return self._node.trace(protocol, (packet.src, packet.sport or 0), (packet.dst, packet.dport or 0))

    def _source_of(self, packet: Opener, protocol: int, peer: Peer) -> bytes:
        """Return a peer's own address behind the node's NAT or a known masquerade.

        The pod's own token is at home only if the node's own NAT brought it back: a hairpin through a Service.
        """
        address, is_own = packet.src, self.is_own(peer)
        true_source, _ = self._trace(packet, protocol)
        if true_source != address and true_source in peer.addresses:
            return true_source
        if true_source == address and not is_own and address in self._node.networks.masquerade:
            return min((known for known in peer.addresses if len(known) == len(address)), default=address)
        if is_own:
            raise PeerError(Reason.OWN_IDENTITY)
        raise PeerError(Reason.SOURCE_MISMATCH, f"the token is of {peer.identity.pod}")

    def _decide_outbound(self, address: bytes, port: int | None, protocol: int) -> Outbound:
        by_address = self.egress(None, address, port, protocol)
        if protocol not in _PROTOCOLS_WITH_IDENTITY:
            return Outbound(by_address, False)
        named = Protocol(protocol)
        destination, rules = self._node.networks.destination(address, port, named), self._rules.egress
        if destination is Destination.EXTERNAL:
            return Outbound(by_address, False)
        if destination is Destination.VIRTUAL:  # Any peer may be behind it.
            could_allow = rules.could_allow(None, None, named)
        else:
            could_allow = rules.could_allow(ip_address(address), port, named)
        if could_allow:
            return Outbound(by_address, True)
        denied = Decision(False, Reason.EGRESS_DENIED, Direction.EGRESS, by_address.decision.rules)
        return Outbound(Evaluation(denied, None), False)

    def _ask(self, direction: Direction, question: _Question) -> Evaluation:
        peer, packed, port, number = question
        address, protocol = ip_address(packed), Protocol(number) if number in _NAMED_PROTOCOLS else None
        is_ingress = direction is Direction.INGRESS
        table = self._ingress if is_ingress else self._egress
        if peer is not None and self.is_own(peer):
            decision = Decision(True, Reason.SELF, direction)
        else:
            rules = self._rules.ingress if is_ingress else self._rules.egress
            identity = None if peer is None else peer.identity
            decision = rules.evaluate(identity, address, port if protocol is not None else None, protocol)
        if not decision.is_allowed and peer is None:
            is_authenticated = number in _PROTOCOLS_WITH_IDENTITY
            reason = Reason.UNIDENTIFIED_PEER if is_authenticated else Reason.PROTOCOL_NOT_AUTHENTICATED
            decision = Decision(False, reason, direction, decision.rules)
        grant = None
        if decision.is_allowed:
            grant = _BY_ADDRESS
            if peer is not None and port is not None and protocol is not None:
                grant = Grant(_UNINDEXED, EvaluatedFlow(direction, peer.identity, address, port, protocol))
        if len(table) >= MAX_DECISIONS:
            table.clear()
        evaluation = table[question] = Evaluation(decision, grant)
        return evaluation
