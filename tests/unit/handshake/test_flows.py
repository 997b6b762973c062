# SPDX-License-Identifier: Apache-2.0
"""The table of flows and what flows compute: bounds, deadlines, keys, and proofs."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from enforcer_daemon.errors import FrameError, ProofError
from enforcer_daemon.handshake import local
from enforcer_daemon.handshake.bounds import Bound, no_hits
from enforcer_daemon.handshake.flows import Flow, FlowTable
from enforcer_daemon.handshake.frames import MAGIC, decode_block, decode_syn, decode_syn_ack, find_proof, is_frame
from enforcer_daemon.handshake.limits import HandshakeLimits
from enforcer_daemon.handshake.machine import State
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.handshake.proofs import pair_key, require_equal
from enforcer_daemon.identity.credential import decode_credential
from enforcer_daemon.identity.tokens import Claims
from enforcer_daemon.reasons import Reason
from tests.unit.datapath.pair import WALL, make_pair

CLIENT, SERVER = make_pair()
HITS = no_hits()


def table_of(total: int, per_source: int, settled: int = 100) -> FlowTable[Flow]:
    """Make a table with these bounds."""
    bounds = HandshakeLimits(
        max_half_open_flows=total, max_half_open_flows_per_source=per_source, max_settled_flows=settled
    )
    return FlowTable(bounds, HITS)


def flow(key: bytes = b"key", deadline: float = 1.0) -> Flow:
    return Flow(key, CLIENT.context.local, State.OPENING, deadline)


def test_unfinished_flows_are_bounded_and_the_oldest_makes_room() -> None:
    table = table_of(2, 2)
    table.add(oldest := flow(b"a"))
    table.add(flow(b"b"))
    newer = flow(b"b")
    assert table.add(newer) is None  # Takes the place of the older one of its ports.
    assert table.get(b"b") is newer
    assert table.add(flow(b"c")) == (oldest, True)
    assert oldest.state is State.CLOSED
    assert len(table) == 2
    assert table.get(b"a") is None


def test_one_peer_cannot_have_the_flows_of_others_given_up() -> None:
    table = table_of(10, 3)
    table.add(honest := flow(bytes((10, 0, 0, 1)) + bytes(8)))
    evicted = [table.add(flow(bytes((10, 0, 0, 2)) + bytes(4) + n.to_bytes(4, "big"))) for n in range(20)]
    assert [gone is not None for gone in evicted] == [False] * 3 + [True] * 17
    assert all(gone is None or gone.is_own for gone in evicted)
    assert table.get(honest.key) is honest
    assert len(table) == 4


def test_settled_flows_make_room_and_are_found() -> None:
    table, before = table_of(10, 10, 2), HITS[Bound.SETTLED_FLOWS]
    for key in (b"a", b"b", b"c"):
        table.add(one := flow(key))
        table.settle(one)
        table.settle(one)
    assert len(table) == 0
    assert table.get(b"a") is None
    assert [known.key for known in table.known()] == [b"b", b"c"]
    assert HITS[Bound.SETTLED_FLOWS] == before + 1
    again = flow(b"b")
    table.add(again)
    assert table.known() == [again, table.get(b"c")]


def test_a_flow_that_was_replaced_discards_nothing() -> None:
    table = table_of(10, 10)
    table.add(old := flow())
    table.add(new := flow())
    table.discard(old)
    assert table.get(b"key") is new
    table.settle(new)
    table.discard(old)
    assert table.get(b"key") is new
    table.discard(new)
    assert table.get(b"key") is None


def test_flows_expire_in_the_order_of_their_deadlines() -> None:
    table = table_of(10, 10)
    for n in range(3):
        table.add(flow(b"%d" % n, float(n)))
    assert [old.key for old in table.expire(1.0)] == [b"0", b"1"]
    assert len(table) == 1
    assert [old.key for old in table.expire(9.0)] == [b"2"]


def test_the_latest_flows_of_a_remote_end_are_found_until_they_are_forgotten() -> None:
    table = table_of(10, 10, 1)
    one, other = flow(b"remote80", 1.0), flow(b"remote81", 1.0)
    table.add(one)
    table.add(other)
    assert table.by_remote(b"remote99") == (one, other)
    table.discard(one)
    assert table.by_remote(b"remote99") == (other,)
    again = flow(b"remote81", 1.0)
    table.add(again)
    assert table.by_remote(b"remote99") == (again,)
    assert list(table.expire(2.0)) == [again]
    assert table.by_remote(b"remote99") == ()
    for key in (b"first-80", b"later-80", b"third-80"):
        settled = flow(key, 9.0)
        table.add(settled)
        table.settle(settled)
    assert len(table._by_remote) == 1
    table.add(flow(b"third-80", 9.0))
    assert len(table._by_remote) == 1


def test_few_flows_of_one_remote_end_are_found_without_a_port() -> None:
    table = table_of(100, 100)
    all_flows = [flow(b"remote%02d" % port, 1.0) for port in range(20)]
    for added in all_flows:
        table.add(added)
    assert table.by_remote(b"remote99") == tuple(all_flows[-8:])
    assert list(table.expire(2.0)) == all_flows
    assert not table._by_remote


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
