# SPDX-License-Identifier: Apache-2.0
"""What all endpoints of the node share: keys, verified peers, networks, the node's addresses, conntrack."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from ipaddress import ip_address

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from enforcer_daemon.datapath.context import NodeContext
from enforcer_daemon.datapath.judging import Networks
from enforcer_daemon.dataplane.conntrack import Conntrack
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.handshake.local import LocalToken, sign_local_token
from enforcer_daemon.handshake.peers import PeerVerifier
from enforcer_daemon.identity.keystore import NodeIdentity, open_node_identity
from enforcer_daemon.model import Identity, IPAddress
from enforcer_daemon.settings import Settings
from enforcer_daemon.telemetry.logs import Logger

_TOKEN_NONCE_BYTES = 9
_RANDOM_POOL_BYTES = 4_096
"""Random bytes are taken from the OS in pieces of this size: one system call for 256 nonces."""


class RandomPool:
    """Cryptographically strong random bytes, read from the OS in large pieces; no byte is given out twice."""

    def __init__(self) -> None:
        self._pool = b""
        self._at = 0

    def take(self, count: int) -> bytes:
        """Give fresh bytes, at most 4,096."""
        end = self._at + count
        if end > len(self._pool):
            self._pool = os.urandom(_RANDOM_POOL_BYTES)
            self._at, end = 0, count
        taken, self._at = self._pool[self._at : end], end
        return taken


class Node:
    """The node's own side: signs for its pods, and traces what its NAT rewrote."""

    def __init__(self, settings: Settings, log: Logger) -> None:
        """Open the node's keys (creating files in the state directory) and its conntrack table."""
        self._settings = settings
        self._log = log
        self.keys: NodeIdentity = open_node_identity(settings, time.time())
        self.conntrack = Conntrack()
        self.verifier = PeerVerifier(self.keys.bundle, settings.handshake)
        self.addresses: frozenset[IPAddress] = frozenset()
        self.context = NodeContext(
            settings.handshake,
            settings.deny_with,
            Networks(settings.networks),
            self.verifier,
            RandomPool().take,
            self._true_source,
        )
        self.follow_clock()

    def follow_clock(self) -> None:
        """Take over a step of the wall clock; call it about once a second."""
        self.context.wall_offset_s = time.time() - time.monotonic()

    def set_addresses(self, addresses: Iterable[IPAddress]) -> None:
        """Take over the addresses of the node's own interfaces."""
        self.addresses = frozenset(addresses)
        self.context.addresses = frozenset(address.packed for address in self.addresses)

    def renew_keys(self) -> bool:
        """Issue the certificate anew where its time has come; tell whether tokens must be signed again."""
        if time.time() < self.keys.renew_at:
            return False
        self.keys = open_node_identity(self._settings, time.time())
        self.verifier.replace_bundle(self.keys.bundle)
        self._log.info("certificate renewed", not_after=self.keys.credential.not_after)
        return True

    def sign(self, identity: Identity) -> LocalToken:
        """Sign a fresh token with a fresh ephemeral key."""
        now = time.time()
        validity = (now, now + self._settings.handshake.token_lifetime_s)
        return sign_local_token(
            identity,
            self.keys.credential,
            self.keys.key,
            X25519PrivateKey.generate(),
            os.urandom(_TOKEN_NONCE_BYTES),
            validity,
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
