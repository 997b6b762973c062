# SPDX-License-Identifier: Apache-2.0
"""No sequence of messages without a proof changes the mark of a released flow, or ends it otherwise.

The attacker has everything that ever went by, makes frames of his own with the identity blocks that he copied, and
sends them to either end of a released connection and a released UDP flow, as often and in whatever order he likes.
"""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import event, given, settings
from hypothesis import strategies as st

from enforcer_daemon.handshake.datagrams import PIGGYBACKED_EXID, STANDALONE_EXID
from enforcer_daemon.handshake.frames import (
    MARKER_ID,
    TYPE_ANSWER,
    TYPE_OFFER,
    SynAckFrame,
    SynFrame,
    encode_again,
    encode_proof,
    encode_syn,
    encode_syn_ack,
    proof_option,
)
from enforcer_daemon.identity.authority import make_authority
from enforcer_daemon.marks import RELEASED, REPLY
from enforcer_daemon.model import Direction
from enforcer_daemon.packet.tcp import ACK, RST, SYN, SYN_ACK, TCP, build, with_options_and_payload
from enforcer_daemon.packet.udp import UDP_HEADER, build_udp, decode_udp, encode_option, with_marker, with_option
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import Action, Inject, Settle
from tests.unit.datapath.pair import (
    ENDING,
    SYN_OPTIONS,
    WALL,
    Connection,
    Endpoint,
    FakePolicy,
    Node,
    Result,
    Rules,
    release,
    segment,
)

AUTHORITY = make_authority("cluster.local", datetime.fromtimestamp(WALL, UTC))
TCP_MARK, UDP_MARK = RELEASED | 2 << 12, RELEASED | 3 << 12
UDP_PORTS = 40_000, 53
ISN_I, ISN_R = 1_000, 5_000


class Attacked:
    """A client and a server with one released connection and one released UDP flow."""

    def __init__(self, is_allowed: bool) -> None:
        one, two = Node("node-1", AUTHORITY, 1), Node("node-2", AUTHORITY, 2)
        self.client = one.endpoint("client", "10.1.0.2", "client")
        self.server = two.endpoint("server", "10.2.0.2", "server", FakePolicy(Rules(frozenset({"client"}))))
        self.seen: list[tuple[bool, bytes]] = []
        """What went by: whether it went to the server, and the packet."""
        self.now = 1.0
        for way, endpoint in ((True, self.server), (False, self.client)):
            self._record(way, endpoint)
        self.connection = Connection(self.client, self.server, isn_i=ISN_I, isn_r=ISN_R)
        release(self.connection)
        for packet in self.client.send(build_udp(self.client.address, self.server.address, UDP_PORTS, b"query")):
            self.server.receive(packet)
        for answer in self.server.flush_injected():
            self.client.receive(answer)
        for proof in self.client.flush_injected():
            self.server.receive(proof)
        if not is_allowed:
            self.server.context.policy.replace_rules(FakePolicy(Rules(frozenset({"other"}))))

    def _record(self, to_server: bool, endpoint: Endpoint) -> None:
        receive = endpoint.receive

        def recorded(packet: bytes, now: float = 1.0, mark: int = 0) -> list[bytes]:
            self.seen.append((to_server, packet))
            return receive(packet, now, mark)

        endpoint.receive = recorded  # type: ignore[method-assign]

    def packet(self, kind: str, n: int, at_server: bool) -> bytes:
        """Make one packet of the attacker's."""
        far, near = (self.client, self.server) if at_server else (self.server, self.client)
        nonce, block = bytes((n % 256,)) * 16, (self.client if n % 2 else self.server).context.local.block
        isn = 70_000 + n if kind == "syn-ack" else (ISN_I, ISN_R, ISN_I + 1, ISN_R + 1, 70_000 + n)[n % 5]
        ports = (40_000, 80) if at_server else (80, 40_000)
        udp = UDP_PORTS if at_server else UDP_PORTS[::-1]
        if kind == "replay":
            ours = [packet for to_server, packet in self.seen if to_server is at_server]
            return ours[n % len(ours)]
        if kind in _SEGMENTS:
            flags, acknowledged = _SEGMENTS[kind]
            bare = build(far.address, near.address, ports, (isn, acknowledged), flags, 64_240)
            answer = SynAckFrame(nonce, far.address, ports[0], bytes(16), block)
            payload = {
                "syn": encode_syn(SynFrame(nonce, block)),
                "syn-ack": encode_syn_ack(answer),
                "forged proof": b"data",
            }.get(kind, b"")
            options = proof_option(nonce, is_standalone=bool(n % 2)) if kind == "forged proof" else SYN_OPTIONS
            return with_options_and_payload(segment(bare), options, payload)
        plain = build_udp(far.address, near.address, udp, b"attack")
        if kind == "marker":
            return with_marker(decode_udp(plain), MARKER_ID)
        message = {
            "offer": encode_syn(SynFrame(nonce, block), TYPE_OFFER),
            "answer": encode_syn_ack(SynAckFrame(nonce, far.address, udp[0], bytes(16), block), TYPE_ANSWER),
            "proof": encode_proof(nonce, bytes(16)),
            "again": encode_again(nonce),
        }[kind]
        if n % 3:
            surplus = encode_option(UDP_HEADER, STANDALONE_EXID, message)
            return build_udp(far.address, near.address, udp, b"", surplus)
        return with_option(decode_udp(plain), PIGGYBACKED_EXID, message, MARKER_ID)

    def arrive(self, packet: bytes, at_server: bool) -> None:
        endpoint = self.server if at_server else self.client
        mark = TCP_MARK if packet[9] == TCP else UDP_MARK
        verdict = endpoint.verdict(packet, Direction.INGRESS, self.now, mark | (0 if at_server else REPLY))
        self.check(verdict, mark)

    def check(self, verdict: Result, mark: int) -> None:
        assert verdict.action is not Action.FORGET, "a release was taken back"
        if verdict.action in (Action.RELEASE, Action.CONSUME):
            assert verdict.mark == mark, "a mark was changed"
        for effect in verdict.effects:
            if isinstance(effect, Settle):
                assert effect.verdict.action in ENDING
            else:
                assert not self.is_reset(effect), "a RST of the enforcer's own"

    def is_reset(self, effect: Inject) -> bool:
        packet = effect.packet
        return packet[9] == 6 and bool(segment(packet).flags & RST) and segment(packet).seq in _LIVE_NUMBERS

    def is_alive(self) -> None:
        """What comes to the queue of both flows, as after a loss of marks, still belongs to them."""
        data = self.server.verdict(self.connection.ack(b"data"), Direction.INGRESS, self.now)
        assert (data.action, data.mark) == (Action.RELEASE, TCP_MARK)
        for endpoint in (self.client, self.server):
            for report in endpoint.take_reports():
                assert report.reason is not Reason.INTERNAL_ERROR, report.detail


_LIVE_NUMBERS = (ISN_I + 1, ISN_R + 1)
"""The next numbers of the live connection: only a RST with one of these is heeded (RFC 5961, section 3)."""
# No SYN-ACK with a frame has those: whoever knows them can send a RST, and the enforcer's answer to a SYN-ACK of a
# connection that it remembers no more is no better.
_SEGMENTS = {
    "syn": (SYN, 0),
    "plain syn": (SYN, 0),
    "syn-ack": (SYN_ACK, 77),
    "plain syn-ack": (SYN_ACK, 77),
    "forged proof": (ACK, ISN_R + 77),
}
_KINDS = ["replay", *_SEGMENTS, "marker", "offer", "answer", "proof", "again"]
STEPS = st.lists(st.tuples(st.sampled_from(_KINDS), st.integers(0, 255), st.booleans()), min_size=1, max_size=24)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.booleans(), st.sampled_from([0.0, 0.1, 3.0]))
def test_nothing_unproven_changes_a_released_flow(
    steps: list[tuple[str, int, bool]], is_allowed: bool, pause_s: float
) -> None:
    attacked = Attacked(is_allowed)
    for kind, n, at_server in steps:
        attacked.now += pause_s
        event(kind)
        attacked.arrive(attacked.packet(kind, n, at_server), at_server)
        for endpoint in (attacked.client, attacked.server):
            attacked.check(Result(Action.DROP, effects=endpoint.expire(attacked.now)), 0)
    if is_allowed:
        attacked.is_alive()
