# SPDX-License-Identifier: Apache-2.0
"""Leases of one endpoint: whether its peers still stand for the flows that are released (docs/protocol.md, Leases).

One lease a pair of pods, by their present tokens. A message is a sign of life only if it echoes a nonce that was sent
lately, and counts from the time when that nonce was sent: neither clocks nor withheld messages matter. What lapses is
given as events, which the shell carries out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from typing import NamedTuple

from enforcer_daemon.errors import FrameError, PeerError
from enforcer_daemon.handshake.fairtable import Limit, LimitHits
from enforcer_daemon.handshake.leaseframes import (
    NO_ID,
    NO_NONCE,
    LeaseFlag,
    LeaseMessage,
    decode_lease,
    encode_lease,
    lease_key,
    require_mac,
    token_id,
)
from enforcer_daemon.handshake.leasepairs import (
    ANSWER_S,
    MAX_PAIRS,
    Lapse,
    LeaseEvent,
    LeaseTimes,
    Pair,
    PairKey,
    PairTable,
    Replaced,
    is_same_pod,
    states_the_same,
)
from enforcer_daemon.handshake.local import LocalToken
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.handshake.signaturebudget import TokenBucket
from enforcer_daemon.model import Identity, Protocol
from enforcer_daemon.reasons import Reason

MAX_UNPROVEN_PER_S = 64.0
"""Answers of one endpoint to messages that prove nothing, in a second."""
PRESENTATIONS_PER_S = 64
"""Presentations of a new token by one endpoint, in a second."""
_PROBES = 3
"""Probes that stay without an answer before silence counts."""
_KEPT_S = 600.0
"""How long a pair without released flows is remembered, seconds; also the longest time between two tries to reach a
peer that never answered."""
_RETRY_S = 1.0
"""The time between the first two tries of what is not confirmed, seconds; it doubles each time."""


class Outgoing(NamedTuple):
    """A lease message to be sent from one of the pod's own addresses to a peer's."""

    own: bytes
    remote: bytes
    content: bytes


class Leases:
    """The leases of one endpoint."""

    def __init__(self, times: LeaseTimes, random: Callable[[int], bytes], hits: LimitHits) -> None:
        self._times = times
        self._random = random
        self._pairs = PairTable(hits)
        self._recent: dict[tuple[Peer, bytes], Pair] = {}
        """Pairs by token and address, for the next release; a token keys faster than a name."""
        self._due: list[tuple[float, int, Pair]] = []
        self._count = 0
        self._locals: tuple[LocalToken, ...] = ()
        """The present token and the one before it."""
        self._unproven = TokenBucket(MAX_UNPROVEN_PER_S, hits, Limit.LEASES)
        self.events: list[LeaseEvent] = []
        self._ending: set[bytes] = set()
        """Addresses of peers whose flows have lapsed and are being ended."""
        self.answered: dict[PairKey, float] = {}
        """Pairs of which a message came through to an earlier daemon, and how long they were silent then, seconds."""

    def __len__(self) -> int:
        """Return the number of pairs with released flows."""
        return sum(1 for pair in self._pairs if pair.protocols)

    def unanswered(self) -> int:
        """Count the pairs with released flows of which no message has come through in several tries."""
        return sum(1 for pair in self._pairs if pair.protocols and not pair.worked and pair.tries >= _PROBES)

    def worked(self, now: float, *, is_last: bool = False) -> dict[PairKey, float]:
        """Return the pairs with released flows of which a message has come through, for the next daemon.

        Of each, its silence in seconds; that of a live pair is 0, so that what is written seldom changes, but not if
        it is written for the last time. A pair of which this daemon heard nothing yet is not live: a daemon that is
        killed again and again counts its silence all the same.
        """
        pairs = (pair for pair in self._pairs if pair.protocols and pair.worked)
        silences = ((pair.key, now - pair.heard_at, is_last or pair.heard == NO_NONCE) for pair in pairs)
        return {
            key: silence if is_kept or silence >= self._times.silent_s else 0.0 for key, silence, is_kept in silences
        }

    def take_events(self) -> list[LeaseEvent]:
        """Return what happened since the last call."""
        events, self.events = self.events, []
        return events

    # What the datapath and the kernel's table say.

    def note(self, peer: Peer, ends: tuple[bytes, bytes], protocol: Protocol, local: LocalToken, now: float) -> None:
        """Take note that a flow with a peer was released: its proof shows that the peer lives.

        `ends`: the peer's own address and the pod's. `local`: the token that the handshake showed the peer.
        """
        address, own = ends
        recent = self._recent.get((peer, address))
        if recent is not None and recent.peer is peer and recent.next_at >= 0.0 and protocol in recent.protocols:
            self._note_heard(recent, now)
            recent.noted_at = now
            return
        key = (peer.identity.trust_domain, peer.identity.pod, address)
        pair = self._pairs.get(key)
        if pair is None:
            self.suspect(peer, address, now)
            pair = self._open(key, peer.identity, own, now)
            if pair is None:
                return
            pair.shown = token_id(local.token_hash)
        elif not pair.protocols:
            self._schedule(pair, now + self._times.lease_s if pair.worked else now)
        self._note_heard(pair, now)
        pair.noted_at = now
        if protocol not in pair.protocols:
            pair.protocols |= {protocol}
        if pair.peer is not peer:
            self._set_peer(pair, peer)
        if len(self._recent) >= MAX_PAIRS:
            self._recent.clear()
        self._recent[(peer, address)] = pair

    def use(self, flows: Iterable[tuple[Identity, bytes, bytes, Protocol]], looked_at: float, now: float) -> None:
        """Take over which flows the kernel has: identity and address of the peer, own address, protocol.

        `looked_at` is when the look at the kernel began: what was released since may be missing.
        """
        found: dict[PairKey, frozenset[Protocol]] = {}
        replaced: dict[int, LeaseEvent] = {}
        for identity, address, own, protocol in flows:
            key = (identity.trust_domain, identity.pod, address)
            pair = self._pairs.get(key) or self._open(key, identity, own, now)
            if pair is not None:
                found[key] = found.get(key, frozenset()) | {protocol}
                if pair.peer is not None and not states_the_same(identity, pair.peer.identity):
                    replaced[id(identity)] = Replaced(identity, pair.peer.identity)
        self.events += replaced.values()
        for pair in self._pairs:
            if pair.key in found:
                if not pair.protocols and pair.next_at > now + self._times.lease_s:
                    self._schedule(pair, now)
                pair.protocols, pair.noted_at = found[pair.key], max(pair.noted_at, looked_at)
            elif pair.noted_at < looked_at:
                pair.protocols = frozenset()

    def suspect(self, peer: Peer, address: bytes, now: float) -> bool:
        """Probe the pairs with other pods at a verified peer's address; tell whether that is under way."""
        is_suspected = address in self._ending
        for pair in self._pairs.at(address):
            if pair.peer is peer or is_same_pod(pair.identity, peer.identity) or not pair.protocols or not pair.worked:
                continue
            if pair.suspect_until is None:
                if now < pair.cleared_until:
                    continue  # It has just answered.
                pair.suspect_until, pair.tries = now + self._times.suspicion_s, 0
                self._schedule(pair, now)
            is_suspected = True
        return is_suspected

    def is_suspected(self, address: bytes) -> bool:
        """Tell whether a pair at an address is being probed, or its flows are being ended."""
        return address in self._ending or any(pair.suspect_until is not None for pair in self._pairs.at(address))

    def note_ended(self, lapses: Iterable[Lapse]) -> None:
        """Take note that the flows of lapses are ended."""
        self._ending.difference_update(lapse.address for lapse in lapses)

    def _open(self, key: PairKey, identity: Identity, own: bytes, now: float) -> Pair | None:
        pair = self._pairs.open(key, identity, own, now)
        if pair is not None:
            silence = self.answered.get(key)
            if silence is not None:
                pair.worked, pair.heard_at, self.answered[key] = True, now - silence, 0.0
            self._schedule(pair, now)
        return pair

    def _set_peer(self, pair: Pair, peer: Peer) -> None:
        """Take a token for the pair's present one, unless a later one is known; it was proven just now."""
        if pair.peer is not None and peer.issued_at < pair.peer.issued_at:
            return
        pair.peer, pair.candidate = peer, None
        old, pair.identity = pair.identity, peer.identity
        if not states_the_same(old, peer.identity):
            self.events.append(Replaced(old, peer.identity))

    def _note_heard(self, pair: Pair, at: float) -> None:
        if at >= pair.heard_at:
            pair.heard_at = at
            pair.udp_lapsed = False

    # What is due.

    def _schedule(self, pair: Pair, at: float) -> None:
        pair.next_at = at
        self._count += 1  # Pairs have no order among themselves.
        heappush(self._due, (at, self._count, pair))

    def tick(self, local: LocalToken, now: float) -> list[Outgoing]:
        """Return the messages that are due; call it a few times a second. Lapses become events."""
        if not self._locals or self._locals[0] is not local:
            self._rotate(local, now)
        out = []
        while self._due and self._due[0][0] <= now:
            at, _, pair = heappop(self._due)
            if pair.next_at == at and (message := self._attend(pair, now)) is not None:
                out.append(message)
        return out

    def _rotate(self, local: LocalToken, now: float) -> None:
        """Present a new token to every peer with open flows, so many a second."""
        is_first = not self._locals
        self._locals = (local, *self._locals[:1])
        if not is_first:
            for n, pair in enumerate(pair for pair in self._pairs if pair.protocols):
                pair.tries = 0 if pair.worked else pair.tries
                self._schedule(pair, now + n / PRESENTATIONS_PER_S)

    def _attend(self, pair: Pair, now: float) -> Outgoing | None:
        times = self._times
        if pair.suspect_until is not None:
            if now >= pair.suspect_until and pair.tries >= _PROBES:
                self._lapse(pair, frozenset(Protocol))
                return None
            self._schedule(pair, now + times.suspicion_s / (_PROBES + 1))
            return self._message(pair, LeaseFlag.PROBE, now)
        if not pair.protocols:
            if now - pair.noted_at >= _KEPT_S:
                self._pairs.close(pair)
            else:
                self._schedule(pair, pair.noted_at + _KEPT_S)
            return None
        silence = now - pair.heard_at
        if pair.worked and pair.tries >= _PROBES:
            if silence >= times.tcp_lapse_s:
                self._lapse(pair, frozenset(Protocol))
                return None
            if silence >= times.udp_lapse_s and Protocol.UDP in pair.protocols and not pair.udp_lapsed:
                pair.udp_lapsed = True
                self.events.append(Lapse(pair.identity, pair.remote, frozenset({Protocol.UDP})))
        is_confirmed = pair.worked and pair.shown == token_id(self._locals[0].token_hash)
        flags = LeaseFlag(0) if is_confirmed and silence < times.silent_s else LeaseFlag.PROBE
        self._schedule(pair, now + self._interval(pair, silence, is_confirmed=is_confirmed))
        return self._message(pair, flags, now)

    def _interval(self, pair: Pair, silence: float, *, is_confirmed: bool) -> float:
        """Return the time until the next message, with some spread, so that pairs do not come all at once."""
        times = self._times
        if is_confirmed and silence < times.silent_s:
            return times.lease_s * (1.0 - self._random(1)[0] / 2_560)
        if pair.worked and silence >= times.silent_s:
            return times.probe_s
        longest = times.lease_s if pair.worked else _KEPT_S
        return float(min(min(_RETRY_S, times.probe_s) * 2 ** min(pair.tries, 10), longest))

    def _lapse(self, pair: Pair, protocols: frozenset[Protocol]) -> None:
        self.events.append(Lapse(pair.identity, pair.remote, protocols))
        self._ending.add(pair.remote)
        self._pairs.close(pair)

    def _message(self, pair: Pair, flags: LeaseFlag, now: float) -> Outgoing:
        """Write a message that nothing unproven has asked for."""
        pair.tries += 1
        if pair.shown != token_id(self._locals[0].token_hash):
            flags |= LeaseFlag.PRESENTS
        return self._write(pair, pair.peer, flags, pair.heard, self._nonce(pair.sent, now))

    def _nonce(self, ring: deque[tuple[bytes, float]], now: float) -> bytes:
        nonce = self._random(16)
        ring.append((nonce, now))
        return nonce

    def _write(self, pair: Pair, to: Peer | None, flags: LeaseFlag, echo: bytes, nonce: bytes) -> Outgoing:
        """Write a message to a peer; one that is not known yet is shown the own token, without a MAC."""
        local = self._locals[0]
        if to is None:
            flags |= LeaseFlag.PRESENTS
        receiver = NO_ID if to is None else token_id(to.token_hash)
        block = local.block if flags & LeaseFlag.PRESENTS else b""
        message = LeaseMessage(nonce, echo, token_id(local.token_hash), receiver, flags, block=block)
        key = None if to is None else lease_key(local, to)
        return Outgoing(pair.own, pair.remote, encode_lease(message, key))

    # What comes in.

    def receive(
        self, content: bytes, ends: tuple[bytes, bytes], verify: Callable[[bytes], Peer], now: float
    ) -> list[Outgoing]:
        """Take in a message; return the answers. Raise PeerError where it does not hold.

        `ends`: the packed addresses that it came from and to. `verify` gives the peer of an identity block.
        """
        message = decode_lease(content)
        source, own = ends
        if not self._locals:
            return []
        if message.flags & LeaseFlag.REQUEST:
            return self._requested(message, source, now)
        peer = self._presented(message, source, verify) if message.block else self._pairs.peer(source, message.sender)
        if peer is None:
            return self._request(message, ends, now)
        key = (peer.identity.trust_domain, peer.identity.pod, source)
        pair = self._pairs.get(key) or self._open(key, peer.identity, own, now)
        if pair is None or not is_same_pod(pair.identity, peer.identity):
            return []
        local = next((each for each in self._locals if token_id(each.token_hash) == message.receiver), None)
        if local is None:
            return self._present(pair, peer, message, now)
        require_mac(content, lease_key(local, peer))
        return self._heard(pair, peer, message, local, now)

    def _presented(self, message: LeaseMessage, source: bytes, verify: Callable[[bytes], Peer]) -> Peer:
        peer = verify(message.block)
        if token_id(peer.token_hash) != message.sender:
            raise FrameError(Reason.MALFORMED_FRAME, "lease message presents another token than it names")
        if source not in peer.addresses:
            raise PeerError(Reason.SOURCE_MISMATCH, f"the token is of {peer.identity.pod}")
        return peer

    def _heard(self, pair: Pair, peer: Peer, message: LeaseMessage, local: LocalToken, now: float) -> list[Outgoing]:
        """Take in a message whose MAC holds; it counts if it echoes one of the last nonces."""
        sent_at = next((at for nonce, at in (*pair.sent, *pair.offered) if nonce == message.echo), None)
        if sent_at is not None:
            pair.heard = message.nonce
            pair.worked, pair.tries = True, 0
            self._note_heard(pair, sent_at)
            if pair.suspect_until is not None and sent_at >= pair.suspect_until - self._times.suspicion_s:
                pair.suspect_until, pair.cleared_until = None, now + self._times.suspicion_s
            self._set_peer(pair, peer)
            if local is self._locals[0]:
                pair.shown = token_id(local.token_hash)
            if pair.next_at > now + self._times.lease_s and pair.protocols:
                self._schedule(pair, now + self._times.lease_s)
        elif peer is not pair.peer:
            pair.candidate = peer
        if sent_at is not None or self._is_ours(message.echo, pair.remote):
            self.suspect(peer, pair.remote, now)  # It answers where another pod was.
        wants_answer = bool(message.flags & (LeaseFlag.PROBE | LeaseFlag.PRESENTS)) or sent_at is None
        if not wants_answer or now - pair.answered_at < ANSWER_S:
            return []
        pair.answered_at = now
        # The peer knows its own token, so it knows this one if it named it.
        flags = LeaseFlag(0) if local is self._locals[0] else LeaseFlag.PRESENTS
        return [self._write(pair, peer, flags, message.nonce, self._nonce(pair.sent, now))]

    def _is_ours(self, nonce: bytes, address: bytes) -> bool:
        """Tell whether a nonce was sent lately to whatever pod has, or had, an address."""
        return any(sent == nonce for pair in self._pairs.at(address) for sent, _ in (*pair.sent, *pair.offered))

    def _present(self, pair: Pair, peer: Peer, message: LeaseMessage, now: float) -> list[Outgoing]:
        """Answer a message that names no token of ours by a presentation: nothing in it is believed."""
        if not self._unproven.take(now):
            return []
        if peer is not pair.peer:
            pair.candidate = peer
        flags = LeaseFlag.PROBE | LeaseFlag.PRESENTS
        return [self._write(pair, peer, flags, message.nonce, self._nonce(pair.offered, now))]

    def _request(self, message: LeaseMessage, ends: tuple[bytes, bytes], now: float) -> list[Outgoing]:
        """Ask for the token of a sender that is not known."""
        if not self._unproven.take(now):
            return []
        own_id = token_id(self._locals[0].token_hash)
        answer = LeaseMessage(self._random(16), message.nonce, own_id, message.sender, LeaseFlag.REQUEST)
        return [Outgoing(ends[1], ends[0], encode_lease(answer, None))]

    def _requested(self, message: LeaseMessage, source: bytes, now: float) -> list[Outgoing]:
        """Present the own token to a peer that does not know it, if it answers a message of ours."""
        for pair in self._pairs.at(source):
            is_ours = any(nonce == message.echo for nonce, _ in (*pair.sent, *pair.offered))
            if is_ours and self._unproven.take(now):
                # It may have another token since, which is not known here: then ours is shown without a MAC.
                peer = self._pairs.peer(source, message.sender)
                flags = LeaseFlag.PROBE | LeaseFlag.PRESENTS
                return [self._write(pair, peer, flags, message.nonce, self._nonce(pair.offered, now))]
        return []
