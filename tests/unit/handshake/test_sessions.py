# SPDX-License-Identifier: Apache-2.0
"""The tables of sessions and their timers: limits, deadlines, keys, and proofs."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from enforcer_daemon.errors import FrameError, ProofError
from enforcer_daemon.handshake import carriers, local
from enforcer_daemon.handshake.fairtable import Limit, no_hits
from enforcer_daemon.handshake.flowkey import FlowKey, Role
from enforcer_daemon.handshake.frames import MAGIC, decode_block, decode_syn, decode_syn_ack, find_proof, is_frame
from enforcer_daemon.handshake.machine import IllegalEventError, State
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.handshake.proofs import pair_key, require_equal
from enforcer_daemon.handshake.session import NEVER, Session
from enforcer_daemon.handshake.sessions import SessionTable, Timers
from enforcer_daemon.identity.credential import decode_credential
from enforcer_daemon.identity.tokens import Claims
from enforcer_daemon.model import Direction, Protocol
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import DROP
from tests.unit.datapath.pair import WALL, make_pair

CLIENT, SERVER = make_pair()
HITS = no_hits()


def table_of(total: int, per_source: int, settled: int = 100) -> SessionTable:
    """Make a table with these limits."""
    return SessionTable((total, per_source), settled, HITS)


def session(port: int = 1, deadline: float = 1.0, remote: bytes = b"peer", role: Role = Role.RESPONDER) -> Session:
    key = FlowKey(remote, b"pod!", port, 80, Protocol.TCP, role)
    return Session(key, carriers.TCP, CLIENT.context.local, State.OFFERED, deadline)


def test_unfinished_sessions_are_limited_and_the_oldest_is_named_for_eviction() -> None:
    table = table_of(2, 2)
    assert not table.by_key
    table.add(oldest := session(1))
    table.add(newer := session(2))
    assert table.add(session(3)) == (oldest, True)
    table.remove(oldest)
    assert len(table) == 2
    assert table.get(oldest.key) is None
    assert table.get(newer.key) is newer


def test_one_peer_cannot_have_the_sessions_of_others_evicted() -> None:
    table = table_of(10, 3)
    table.add(honest := session(1))
    evicted = [table.add(session(port, remote=b"evil")) for port in range(20)]
    assert [gone is not None for gone in evicted] == [False] * 3 + [True] * 17
    assert all(gone is None or gone.is_own for gone in evicted)
    assert table.get(honest.key) is honest
    assert len(table) == 4


def test_released_sessions_make_room_and_are_found() -> None:
    table, before = table_of(10, 10, 2), HITS[Limit.SETTLED_FLOWS]
    first, *others = sessions = [session(port) for port in range(3)]
    for each in sessions:
        table.add(each)
        assert table.settle(each) in (None, first)
        assert table.settle(each) is None
    table.remove(first)
    assert len(table) == 0
    assert table.get(first.key) is None
    assert table.known() == others
    assert HITS[Limit.SETTLED_FLOWS] == before + 1


def test_what_another_session_has_taken_over_stays_when_the_earlier_one_goes() -> None:
    table = table_of(10, 10)
    old, new = session(), session()
    for each in (old, new):
        table.add(each)
    table.remove(old)
    assert table.get(new.key) is new
    assert table.names == {new.name: new}
    alias = new.key._replace(own_port=15_006)
    table.add_alias(alias, new)
    table.add_alias(alias, other := session(2))
    assert table.get(alias) is None  # What comes in for that port is no part of the session.
    assert table.aliases[alias] is new
    assert other.alias is None
    table.remove(new)
    assert table.aliases == {}
    assert table.names == {}


def test_sessions_expire_in_the_order_of_their_deadlines() -> None:
    table = table_of(10, 10)
    for port in range(3):
        table.add(session(port, float(port)))
    for now, ports in ((1.0, [0, 1]), (9.0, [2])):
        gone = []
        for each in table.expired(now):
            table.remove(each)
            gone.append(each.key.remote_port)
        assert gone == ports
    assert not table.by_key


def test_a_session_has_one_timer_and_cancelled_ones_cost_nothing() -> None:
    timers, one, two = Timers(), session(1), session(2)
    assert timers.next_at is None
    timers.set(one, 5.0)
    timers.set(two, 4.0)
    timers.set(one, 3.0)
    assert timers.next_at == 3.0
    timers.set(two, NEVER)
    assert list(timers.take(4.5)) == [one]
    assert timers.next_at is None
    for n in range(10_000):
        timers.set(one, 6.0 + n)
        timers.set(two, 5.0)
    assert len(timers._due) <= 64
    assert list(timers.take(5.0)) == [two]
    assert timers.next_at == 6.0 + n


def test_a_flow_is_named_from_the_pods_side() -> None:
    opened, answered = session(role=Role.INITIATOR).key, session().key
    assert opened.in_role(Role.RESPONDER) == answered
    assert opened.ends == answered.ends == (b"peer", b"pod!", 1, 80)
    assert (opened.direction, opened.port) == (Direction.EGRESS, 1)
    assert (answered.direction, answered.port) == (Direction.INGRESS, 80)


def test_an_answer_without_an_offer_is_not_made() -> None:
    with pytest.raises(IllegalEventError):
        session().make_answer(1, bytes(16))
    assert session().establish(1.0) == DROP


def test_a_pair_key_is_derived_once_and_differs_by_role(monkeypatch: pytest.MonkeyPatch) -> None:
    der, token = decode_block(SERVER.context.local.block)
    credential = decode_credential(der)
    claims = Claims(SERVER.identity, X25519PrivateKey.generate().public_key().public_bytes_raw(), WALL, WALL)
    peer = Peer(claims, token, credential)
    own = CLIENT.context.local
    key = own.pair_key(peer, is_initiator=True)
    assert own.pair_key(peer, is_initiator=True) is key
    assert own.pair_key(peer, is_initiator=False) != key
    monkeypatch.setattr(local, "_MAX_PAIR_KEYS", 2)
    other = Peer(claims, token, credential)
    assert own.pair_key(other, is_initiator=True) == key
    assert len(own._pair_keys) == 1


def test_an_ephemeral_key_of_low_order_gives_no_pair_key() -> None:
    with pytest.raises(ProofError) as caught:
        pair_key(X25519PrivateKey.generate(), bytes(32), bytes(32), bytes(32))
    assert caught.value.reason is Reason.TOKEN_MALFORMED


def test_proofs_of_another_length_or_content_differ() -> None:
    require_equal(b"x" * 16, b"x" * 16)
    for wrong in (b"x" * 15, b"x" * 15 + b"y", b""):
        with pytest.raises(ProofError):
            require_equal(b"x" * 16, wrong)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", Reason.MALFORMED_FRAME),
        (MAGIC, Reason.MALFORMED_FRAME),
        (b"GET " + bytes(30), Reason.MALFORMED_FRAME),
        (MAGIC + b"\x02\x01" + bytes(30), Reason.FRAME_VERSION),
        (MAGIC + b"\x01\x07" + bytes(30), Reason.MALFORMED_FRAME),
        (MAGIC + b"\x01\x01\x00\x18" + bytes(17), Reason.MALFORMED_FRAME),
        (MAGIC + b"\x01\x01" + (9_001).to_bytes(2, "big") + bytes(8_993), Reason.MALFORMED_FRAME),
    ],
    ids=["empty", "magic-alone", "other-data", "version", "type", "length", "too-long"],
)
def test_what_is_no_frame(payload: bytes, reason: Reason) -> None:
    with pytest.raises(FrameError) as caught:
        decode_syn(payload)
    assert caught.value.reason is reason


def test_a_syn_ack_without_its_answer_is_cut() -> None:
    with pytest.raises(FrameError, match="truncated"):
        decode_syn_ack(MAGIC + b"\x01\x02\x00\x18" + bytes(16))


def test_an_identity_block_without_lengths_is_cut() -> None:
    with pytest.raises(FrameError, match="truncated"):
        decode_block(b"\0\0\0")


def test_other_experiments_are_no_proof() -> None:
    assert find_proof(b"\xfd\x14XX" + bytes(16)) is None
    assert find_proof(b"\xfd\x04TR") is None
    assert find_proof(b"\x01\x01\x08\x0a" + bytes(8)) is None
    assert not is_frame(b"\xd3TR")
