# SPDX-License-Identifier: Apache-2.0
"""Ask policy, and remember what it said: decisions are kept for each peer and port until the policy changes."""

from __future__ import annotations

from enum import IntEnum
from ipaddress import ip_address
from typing import NamedTuple
from typing import Protocol as Interface

from enforcer_daemon.datapath.flowindex import BY_ADDRESS, UNKNOWN, FlowIndex
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.marks import released_mark
from enforcer_daemon.model import Decision, Direction, Identity, IPAddress, JudgedFlow, PodRef, Protocol
from enforcer_daemon.prefixes import PrefixSet
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings import NetworkSettings
from enforcer_daemon.verdict import Action, Verdict
from enforcer_daemon.virtual import NodePort, ServicePort, VirtualChange

_MAX_DECISIONS = 16_384
"""Remembered decisions of one endpoint and direction; when there are more, all are asked again."""
_MAX_DESTINATIONS = 16_384
"""Remembered classes of addresses."""


_NAMED_PROTOCOLS = frozenset(Protocol)
"""Those that a rule can name; any other is allowed by rules without ports alone."""


class DirectionRules(Interface):
    """What policy offers for one direction of a pod."""

    @property
    def is_isolated(self) -> bool:
        """Tell whether any policy selects the pod for this direction."""

    def judge(self, peer: Identity | None, address: IPAddress, port: int | None, protocol: Protocol | None) -> Decision:
        """Decide on a flow with a peer, or with an address where no identity was shown.

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


class Destination(IntEnum):
    """What lies at an address that the pod dials."""

    EXTERNAL = 0
    ENFORCED = 1
    VIRTUAL = 2


class Networks:
    """The networks in force, asked for the class of an address. Shared by the endpoints of a node.

    The class by configured networks is remembered for each address. What Services add or take away is looked up beside
    it, so a change of theirs costs what it changes, and no other address is classed anew.
    """

    def __init__(self, settings: NetworkSettings) -> None:
        self._known: dict[bytes, Destination] = {}
        self._services: set[ServicePort] = set()
        self._nodes: set[bytes] = set()
        self._ports: set[NodePort] = set()
        self.replace(settings)

    def replace(self, settings: NetworkSettings) -> None:
        """Class addresses by other networks from now on; what Services made virtual stays."""
        self._enforced = PrefixSet(settings.enforced)
        self._virtual = PrefixSet(settings.virtual)
        self.masquerade = frozenset(address.packed for address in settings.masquerade)
        self.require_identity = settings.require_identity
        self._known.clear()

    def change_virtual(self, change: VirtualChange) -> None:
        """Take over what Services make virtual beside the configured networks, or no longer do."""
        added, removed = change
        self._services.difference_update(removed.services)
        self._services.update(added.services)
        self._nodes.difference_update(removed.nodes)
        self._nodes.update(added.nodes)
        self._ports.difference_update(removed.ports)
        self._ports.update(added.ports)

    def destination(self, packed: bytes, port: int | None = None, protocol: Protocol = Protocol.TCP) -> Destination:
        """Return the class of an address that is dialled; a Service's and a node's are virtual on their ports alone.

        A configured virtual network may lie inside an enforced one; what a Service lists there stays a pod's address.
        """
        if packed in self._nodes and (protocol, port) in self._ports:
            return Destination.VIRTUAL
        configured = self._by_networks(packed)
        if configured is Destination.EXTERNAL and port is not None and (packed, protocol, port) in self._services:
            return Destination.VIRTUAL
        return configured

    def must_show_identity(self, packed: bytes) -> bool:
        """Tell whether a connection from there needs an identity, whatever policy says, and whatever Services list."""
        return self.require_identity and self._by_networks(packed) is Destination.ENFORCED

    def _by_networks(self, packed: bytes) -> Destination:
        known = self._known.get(packed)
        if known is None:
            if len(self._known) >= _MAX_DESTINATIONS:
                self._known.clear()
            known = self._known[packed] = self._classify(packed)
        return known

    def _classify(self, packed: bytes) -> Destination:
        if packed in self._virtual:
            return Destination.VIRTUAL
        return Destination.ENFORCED if packed in self._enforced else Destination.EXTERNAL


_Question = tuple[Peer | None, bytes, int | None, int]
"""Peer (None: nobody showed an identity), address, port and protocol of a flow."""


_BY_ADDRESS = Verdict(Action.RELEASE, mark=released_mark(BY_ADDRESS))
_UNINDEXED = Verdict(Action.RELEASE, mark=released_mark(UNKNOWN))


class Ruling(NamedTuple):
    """A decision, and how a flow that it allows is released."""

    decision: Decision
    release: Verdict
    """Under no index yet where `judged` says what the flow was allowed by: `Judge.release` gives one."""
    judged: JudgedFlow | None = None


class Judge:
    """Policy as one endpoint's packets meet it."""

    def __init__(self, pod: PodRef, trust_domain: str, rules: PodRules, flows: FlowIndex) -> None:
        self._pod = pod
        self._trust_domain = trust_domain
        self._rules = rules
        self._flows = flows
        self._ingress: dict[_Question, Ruling] = {}
        self._egress: dict[_Question, Ruling] = {}
        self._could: dict[tuple[Destination, bytes, int, int], bool] = {}

    def replace_rules(self, rules: PodRules) -> None:
        """Judge by another snapshot from now on."""
        self._rules = rules
        self._ingress.clear()
        self._egress.clear()
        self._could.clear()

    def is_own(self, peer: Peer) -> bool:
        """Tell whether a peer is this very pod."""
        identity = peer.identity
        return identity.pod == self._pod and identity.trust_domain == self._trust_domain

    def has_met(self, address: bytes) -> bool:
        """Tell whether a pod with this address has shown an identity before, also to an earlier daemon."""
        return self._flows.knows(address)

    def ingress(self, peer: Peer | None, address: bytes, port: int | None, protocol: int = Protocol.TCP) -> Ruling:
        """Decide on a flow that comes in to a port of the pod."""
        question = (peer, address, port, protocol)
        ruling = self._ingress.get(question)
        if ruling is None:
            ruling = self._ask(self._rules.ingress, Direction.INGRESS, question)
            _remember(self._ingress, question, ruling)
        return ruling

    def egress(self, peer: Peer | None, address: bytes, port: int | None, protocol: int = Protocol.TCP) -> Ruling:
        """Decide on a flow that goes out to a port of the peer."""
        question = (peer, address, port, protocol)
        ruling = self._egress.get(question)
        if ruling is None:
            ruling = self._ask(self._rules.egress, Direction.EGRESS, question)
            _remember(self._egress, question, ruling)
        return ruling

    def could_allow_egress(
        self, destination: Destination, address: bytes, port: int, protocol: Protocol = Protocol.TCP
    ) -> bool:
        """Tell whether the pod could be allowed to reach some peer there; behind a virtual address it may be any."""
        known = self._could.get((destination, address, port, protocol))
        if known is None:
            rules = self._rules.egress
            if destination is Destination.VIRTUAL:
                known = rules.could_allow(None, None, protocol)
            else:
                known = rules.could_allow(ip_address(address), port, protocol)
            if len(self._could) >= _MAX_DECISIONS:
                self._could.clear()
            self._could[destination, address, port, protocol] = known
        return known

    def release(self, judged: JudgedFlow) -> Verdict:
        """Return how a flow that has been proven is released, under the index of what it was allowed by."""
        return Verdict(Action.RELEASE, mark=released_mark(self._flows.add(judged)))

    def _ask(self, rules: DirectionRules, direction: Direction, question: _Question) -> Ruling:
        peer, packed, port, number = question
        address = ip_address(packed)
        decision = self._decide(rules, direction, question, address)
        if peer is not None and decision.is_allowed and port is not None:
            return Ruling(decision, _UNINDEXED, JudgedFlow(direction, peer.identity, address, port, Protocol(number)))
        return Ruling(decision, _BY_ADDRESS)

    def _decide(self, rules: DirectionRules, direction: Direction, question: _Question, address: IPAddress) -> Decision:
        peer, _, port, number = question
        if peer is not None and self.is_own(peer):
            return Decision(True, Reason.SELF, direction)
        identity = None if peer is None else peer.identity
        if number in _NAMED_PROTOCOLS:
            decision = rules.judge(identity, address, port, Protocol(number))
        else:
            decision = rules.judge(identity, address, None, None)
        if decision.is_allowed or peer is not None:
            return decision
        is_authenticated = number in (Protocol.TCP, Protocol.UDP)
        reason = Reason.UNIDENTIFIED_PEER if is_authenticated else Reason.PROTOCOL_NOT_AUTHENTICATED
        return Decision(False, reason, direction, decision.rules)


def _remember(table: dict[_Question, Ruling], question: _Question, ruling: Ruling) -> None:
    if len(table) >= _MAX_DECISIONS:
        table.clear()
    table[question] = ruling
