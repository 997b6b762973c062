# SPDX-License-Identifier: Apache-2.0
"""What all endpoints of the node share: keys, verified peers, networks, the node's addresses, conntrack."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import ip_address

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from enforcer_daemon.daemon.limits import DEFAULT_LIMITS, DaemonLimits
from enforcer_daemon.daemon.service import Work
from enforcer_daemon.datapath.networks import Networks
from enforcer_daemon.datapath.node import NodeContext
from enforcer_daemon.dataplane.conntrack import Conntrack
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.handshake.local import LocalToken, sign_local_token
from enforcer_daemon.handshake.peers import PeerVerifier
from enforcer_daemon.identity.keystore import NodeIdentity
from enforcer_daemon.identity.renewal import NodeKeys
from enforcer_daemon.model import Identity, IPAddress
from enforcer_daemon.settings import Settings
from enforcer_daemon.telemetry.logs import Logger

_TOKEN_NONCE_BYTES = 9
_RANDOM_POOL_BYTES = 4_096
"""Random bytes are taken from the OS in pieces of this size: one system call for 256 nonces."""
_CLOCK_STEP_S = 1.0
"""A change of the wall clock by more than this in a second is a step: NTP's slewing stays far below."""


class RandomPool:
    """Cryptographically strong random bytes, read from the OS in large pieces; no byte is given out twice."""

    def __init__(self) -> None:
        self._pool = b""
        self._at = 0

    def take(self, count: int) -> bytes:
        """Return fresh bytes, at most 4,096."""
        end = self._at + count
        if end > len(self._pool):
            self._pool = os.urandom(_RANDOM_POOL_BYTES)
            self._at, end = 0, count
        taken, self._at = self._pool[self._at : end], end
        return taken


class Node:
    """The node's own side: signs for its pods, and traces what its NAT rewrote."""

    def __init__(
        self,
        settings: Settings,
        log: Logger,
        wall_clock: Callable[[], float] = time.time,
        limits: DaemonLimits = DEFAULT_LIMITS,
    ) -> None:
        """Open the node's keys (creating files in the state directory) and its conntrack table."""
        self._settings = settings
        self.limits = limits
        handshake = replace(limits.handshake, clock_leeway_s=settings.credentials.clock_leeway_s)
        self._log = log
        self._wall_clock = wall_clock
        self._keys = NodeKeys(settings, wall_clock())
        self.outside_problem: Callable[[], str] = lambda: ""
        """Says why whoever brings the keys cannot bring newer ones; empty if all is well."""
        self.conntrack = Conntrack()
        self.verifier = PeerVerifier(self.keys.bundle, handshake)
        self.addresses: frozenset[IPAddress] = frozenset()
        self.work = Work()
        """That of all pods' queues, since one loop serves them."""
        self.context = NodeContext(
            handshake,
            settings.deny_with,
            Networks(settings.networks),
            self.verifier,
            RandomPool().take,
            self._true_source,
            self._true_destination,
        )
        self.context.lease_times = limits.leases
        self.context.wall_offset_s = wall_clock() - time.monotonic()

    @property
    def keys(self) -> NodeIdentity:
        """The keys, certificate and bundle in force."""
        return self._keys.identity

    def follow_clock(self) -> None:
        """Take over a step of the wall clock; call it about once a second."""
        offset = self._wall_clock() - time.monotonic()
        step, self.context.wall_offset_s = offset - self.context.wall_offset_s, offset
        if abs(step) > _CLOCK_STEP_S:
            # What was found expired, or valid, was so by another clock.
            self.verifier.replace_bundle(self.keys.bundle)
            self._log.warning("the wall clock was set; peers are verified anew", step_s=round(step, 1))

    def is_peer_denied(self, identity: Identity) -> bool:
        """Return whether a pod's node is believed no longer."""
        placement = self.context.placement
        return placement is not None and placement.is_denied(identity, time.monotonic())

    def set_addresses(self, addresses: Iterable[IPAddress]) -> None:
        """Take over the addresses of the node's own interfaces."""
        self.addresses = frozenset(addresses)
        self.context.addresses = frozenset(address.packed for address in self.addresses)

    def renew_keys(self) -> bool:
        """Take over changed files and renew what is due; tell whether tokens must be signed again."""
        renewal = self._keys.look(self._wall_clock())
        if renewal.is_problem_new:
            if self._keys.problem:
                self._log.error("keys refused, the last good ones stay in force", problem=self._keys.problem)
            else:
                self._log.info("keys are in order again")
        if renewal.is_bundle_new:
            self.verifier.replace_bundle(self.keys.bundle)
            authorities = [authority.subject.rfc4514_string() for authority in self.keys.bundle.authorities]
            self._log.info("trust bundle in force", authorities=authorities)
        if renewal.is_credential_new:
            credential = self.keys.credential
            issuer = credential.certificate.issuer.rfc4514_string()
            self._log.info("certificate renewed", issuer=issuer, not_after=credential.not_after)
        return renewal.is_credential_new

    def key_problems(self) -> list[str]:
        """Return what an operator should mend about keys, certificate and bundle."""
        return [*filter(None, [self.outside_problem()]), *self._keys.problems(self._wall_clock())]

    def sign(self, identity: Identity) -> LocalToken:
        """Sign a fresh token with a fresh ephemeral key; it ends no later than the node's certificate."""
        now = self._wall_clock()
        expiry = min(now + self._settings.credentials.token_lifetime_s, self.keys.credential.not_after)
        return sign_local_token(
            identity,
            self.keys.credential,
            self.keys.key,
            X25519PrivateKey.generate(),
            os.urandom(_TOKEN_NONCE_BYTES),
            (now, expiry),
        )

    def close(self) -> None:
        """Close what is open in the kernel."""
        self.conntrack.close()

    def _true_source(self, protocol: int, src: bytes, sport: int, dst: bytes, dport: int) -> bytes | None:
        try:
            found = self.conntrack.original_source(protocol, ip_address(src), sport, ip_address(dst), dport)
        except DataplaneError as err:
            # Not knowing makes the packet come from an ordinary address: the strict side.
            self._log.warning("conntrack cannot be asked", error=str(err))
            return None
        return None if found is None else found.packed

    def _true_destination(
        self, protocol: int, src: bytes, sport: int, dst: bytes, dport: int
    ) -> tuple[bytes, int] | None:
        try:
            found = self.conntrack.translated_destination(protocol, ip_address(src), sport, ip_address(dst), dport)
        except DataplaneError as err:
            self._log.warning("conntrack cannot be asked", error=str(err))  # What was dialed decides.
            return None
        return None if found is None else (found[0].packed, found[1])
