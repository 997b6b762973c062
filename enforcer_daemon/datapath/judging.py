# SPDX-License-Identifier: Apache-2.0
"""Ask policy, and remember what it said: decisions are kept for each peer and port until the policy changes."""

from __future__ import annotations

from enum import IntEnum
from ipaddress import ip_address
from typing import Protocol as Interface

from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.model import Decision, Direction, Identity, IPAddress, IPNetwork, PodRef, Protocol
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings import NetworkSettings

_MAX_DECISIONS = 16_384
"""Remembered decisions of one endpoint and direction; when there are more, all are asked again."""
_MAX_DESTINATIONS = 16_384
"""Remembered classes of addresses."""


class DirectionRules(Interface):
    """What policy offers for one direction of a pod."""

    @property
    def is_isolated(self) -> bool:
        """Tell whether any policy selects the pod for this direction."""

    def judge(self, peer: Identity | None, address: IPAddress, port: int | None, protocol: Protocol) -> Decision:
        """Decide on a flow with a peer, or with an address where no identity was shown."""

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
    """The configured networks, with the class of each address remembered. Shared by the endpoints of a node."""

    def __init__(self, settings: NetworkSettings) -> None:
        self._enforced = settings.enforced
        self._virtual = settings.virtual
        self._known: dict[bytes, Destination] = {}
        self.masquerade = frozenset(address.packed for address in settings.masquerade)

    def destination(self, packed: bytes) -> Destination:
        """Give the class of an address; a virtual network may lie inside an enforced one."""
        known = self._known.get(packed)
        if known is None:
            if len(self._known) >= _MAX_DESTINATIONS:
                self._known.clear()
            known = self._known[packed] = self._classify(ip_address(packed))
        return known

    def _classify(self, address: IPAddress) -> Destination:
        if _is_in(address, self._virtual):
            return Destination.VIRTUAL
        return Destination.ENFORCED if _is_in(address, self._enforced) else Destination.EXTERNAL


def _is_in(address: IPAddress, networks: tuple[IPNetwork, ...]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


class Judge:
    """Policy as one endpoint's packets meet it."""

    def __init__(self, pod: PodRef, trust_domain: str, rules: PodRules) -> None:
        self._pod = pod
        self._trust_domain = trust_domain
        self._rules = rules
        self._ingress: dict[tuple[Peer | None, bytes, int | None, int], Decision] = {}
        self._egress: dict[tuple[Peer | None, bytes, int | None, int], Decision] = {}
        self._could: dict[tuple[bytes, int], bool] = {}

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

    def ingress(self, peer: Peer | None, address: bytes, port: int | None, protocol: int = Protocol.TCP) -> Decision:
        """Decide on a flow that comes in to a port of the pod."""
        key = (peer, address, port, protocol)
        decision = self._ingress.get(key)
        if decision is None:
            decision = self._ask(self._rules.ingress, Direction.INGRESS, key)
            _remember(self._ingress, key, decision)
        return decision

    def egress(self, peer: Peer | None, address: bytes, port: int | None, protocol: int = Protocol.TCP) -> Decision:
        """Decide on a flow that goes out to a port of the peer."""
        key = (peer, address, port, protocol)
        decision = self._egress.get(key)
        if decision is None:
            decision = self._ask(self._rules.egress, Direction.EGRESS, key)
            _remember(self._egress, key, decision)
        return decision

    def could_allow_egress(self, destination: Destination, address: bytes, port: int) -> bool:
        """Tell whether the pod could be allowed to reach some peer there; behind a virtual address it may be any."""
        known = self._could.get((address, port))
        if known is None:
            rules = self._rules.egress
            if destination is Destination.VIRTUAL:
                known = rules.could_allow(None, None, Protocol.TCP)
            else:
                known = rules.could_allow(ip_address(address), port, Protocol.TCP)
            if len(self._could) >= _MAX_DECISIONS:
                self._could.clear()
            self._could[(address, port)] = known
        return known

    def _ask(
        self, rules: DirectionRules, direction: Direction, key: tuple[Peer | None, bytes, int | None, int]
    ) -> Decision:
        peer, address, port, number = key
        if peer is not None and self.is_own(peer):
            return Decision(True, Reason.SELF, direction)
        if number not in (Protocol.TCP, Protocol.UDP, Protocol.SCTP):
            reason = Reason.PROTOCOL_NOT_AUTHENTICATED if rules.is_isolated else Reason.NOT_ISOLATED
            return Decision(not rules.is_isolated, reason, direction)
        identity = None if peer is None else peer.identity
        decision = rules.judge(identity, ip_address(address), port, Protocol(number))
        if decision.is_allowed or peer is not None:
            return decision
        reason = Reason.UNIDENTIFIED_PEER if number == Protocol.TCP else Reason.PROTOCOL_NOT_AUTHENTICATED
        return Decision(False, reason, direction, decision.rules)


def _remember(
    table: dict[tuple[Peer | None, bytes, int | None, int], Decision],
    key: tuple[Peer | None, bytes, int | None, int],
    decision: Decision,
) -> None:
    if len(table) >= _MAX_DECISIONS:
        table.clear()
    table[key] = decision
