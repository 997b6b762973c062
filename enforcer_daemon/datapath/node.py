# SPDX-License-Identifier: Apache-2.0
"""What the endpoints of a node share: its settings, addresses and networks, verified peers, and the nonces in use."""

from __future__ import annotations

from collections.abc import Callable

from enforcer_daemon.datapath.networks import Destination, Networks
from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.fairtable import FairTable, Limit
from enforcer_daemon.handshake.leasepairs import LeaseTimes
from enforcer_daemon.handshake.limits import HandshakeLimits
from enforcer_daemon.handshake.peers import Peer, PeerVerifier
from enforcer_daemon.handshake.placement import Placement
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings import DenyWith

TrueSource = Callable[[int, bytes, int, bytes, int], bytes | None]
"""(protocol, source, source port, destination, destination port) of a packet that came from one of the node's addresses
-> the packed address it really came from: the same where the node itself sent it, None where the node does not know."""

TrueDestination = Callable[[int, bytes, int, bytes, int], tuple[bytes, int] | None]
"""(protocol, source, source port, destination, destination port) of what a pod sends -> the packed address and the port
that the node sends it to; None if the node does not know the flow."""

_FINISHED = -1
"""In place of the connection that used a nonce: the hash of none."""


class NodeContext:
    """What the endpoints of a node share."""

    __slots__ = (
        "_nonces",
        "addresses",
        "deny_with",
        "lease_times",
        "limit_hits",
        "networks",
        "placement",
        "random",
        "settings",
        "true_destination",
        "true_source",
        "verifier",
        "wall_offset_s",
    )

    def __init__(
        self,
        settings: HandshakeLimits,
        deny_with: DenyWith,
        networks: Networks,
        verifier: PeerVerifier,
        random: Callable[[int], bytes],
        true_source: TrueSource,
        true_destination: TrueDestination,
    ) -> None:
        self.settings = settings
        self.deny_with = deny_with
        self.networks = networks
        self.verifier = verifier
        self.random = random
        """Cryptographically strong random bytes."""
        self.true_source = true_source
        self.true_destination = true_destination
        self.addresses: frozenset[bytes] = frozenset()
        """Packed addresses of the node's own interfaces."""
        self.wall_offset_s = 0.0
        """Unix time less monotonic time."""
        self.limit_hits = verifier.limit_hits
        self.placement: Placement | None = None
        """Whether pods are where their nodes say; None: that is not looked up."""
        self.lease_times = LeaseTimes()
        self._nonces: FairTable[bytes, int] = FairTable(settings.max_nonces, settings.max_nonces)
        """The oldest of the pod that used most is evicted."""

    def trace(self, protocol: int, source: tuple[bytes, int], destination: tuple[bytes, int]) -> tuple[bytes, bool]:
        """Give the address that a packet really came from, and whether the node itself sent it."""
        address = source[0]
        if address not in self.addresses:
            return address, False
        true_source = self.true_source(protocol, *source, *destination)
        return true_source or address, true_source == address

    def verify(self, block: bytes, source: bytes, now: float) -> Peer:
        """Give the peer of an identity block that came from an address; raise PeerError where it does not hold."""
        peer = self.verifier.known(block, now + self.wall_offset_s)
        if peer is None:
            is_pod = self.networks.destination(source) is Destination.ENFORCED
            peer = self.verifier.verify(block, source, now, now + self.wall_offset_s, is_pod=is_pod)
        if self.placement is not None:
            self.placement.require(peer.identity, now)
        return peer

    def finish_nonce(self, nonce: bytes) -> None:
        """Let no offer with this nonce be accepted again: its flow was released."""
        self._nonces.replace(nonce, _FINISHED)

    def use_nonce(self, nonce: bytes, connection: int, source: bytes) -> None:
        """Remember an initiator's nonce; raise PeerError if it was used before.

        `connection` is the hash of the flow and its ISN. One that ended before its SYN is retransmitted (a lost RST) is
        offered again; 0 if another handshake of these ports is under way, which no old SYN may replace. `source` is the
        pod's address, verified.
        """
        used = self._nonces.get(nonce)
        if used is not None and used != connection:
            raise PeerError(Reason.REPLAYED_NONCE)
        if self._nonces.put(nonce, connection, source) is not None:
            self.limit_hits[Limit.NONCES] += 1
