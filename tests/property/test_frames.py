# SPDX-License-Identifier: Apache-2.0
"""Frames and proofs' options: any bytes are read or refused with a reason, and what is written is read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from enforcer_daemon.errors import FrameError
from enforcer_daemon.handshake.frames import (
    MAGIC,
    PROOF_OPTION_BYTES,
    SynAckFrame,
    SynFrame,
    decode_block,
    decode_syn,
    decode_syn_ack,
    encode_block,
    encode_syn,
    encode_syn_ack,
    find_proof,
    has_room,
    is_frame,
    proof_option,
    without_proof,
)
from enforcer_daemon.handshake.leaseframes import LeaseFlag, LeaseMessage, decode_lease, encode_lease
from enforcer_daemon.packet.tcp import walk_options
from enforcer_daemon.reasons import Reason

nonces = proofs = st.binary(min_size=16, max_size=16)
blocks = st.binary(max_size=300)
packed = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))
ports = st.integers(0, 0xFFFF)
kernel_options = st.sampled_from(
    [b"", b"\x01\x01\x08\x0a" + bytes(8), b"\x01\x01\x05\x0a" + bytes(8), b"\x08\x0a" + bytes(8) + b"\0\0"]
)


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda rest: MAGIC + b"\x01" + rest)))
def test_any_bytes_are_a_frame_or_a_frame_error(payload: bytes) -> None:
    for decode in (decode_syn, decode_syn_ack, decode_block, decode_lease):
        reason = None
        try:
            decode(payload)
        except FrameError as err:
            reason = err.reason
        assert reason in (None, Reason.MALFORMED_FRAME, Reason.FRAME_VERSION)


@given(nonces, nonces, nonces, nonces, st.integers(0, 7), blocks, st.none() | st.binary(min_size=32, max_size=32))
def test_a_lease_message_round_trips(
    nonce: bytes, echo: bytes, sender: bytes, receiver: bytes, flags: int, block: bytes, key: bytes | None
) -> None:
    shown = block or b"block" if flags & LeaseFlag.PRESENTS else b""
    message = LeaseMessage(nonce, echo, sender, receiver, LeaseFlag(flags), block=shown)
    read = decode_lease(encode_lease(message, key))
    assert read._replace(mac=message.mac) == message


@given(nonces, blocks)
def test_a_syn_frame_round_trips(nonce: bytes, block: bytes) -> None:
    frame = SynFrame(nonce, block)
    assert decode_syn(encode_syn(frame)) == frame
    assert is_frame(encode_syn(frame))


@given(
    nonces, packed.filter(lambda a: not (len(a) == 16 and a[:12] == b"\0" * 10 + b"\xff\xff")), ports, proofs, blocks
)
def test_a_syn_ack_frame_round_trips(nonce: bytes, address: bytes, port: int, proof: bytes, block: bytes) -> None:
    frame = SynAckFrame(nonce, address, port, proof, block)
    payload = encode_syn_ack(frame)
    assert decode_syn_ack(payload) == frame
    other = encode_syn_ack(frame._replace(proof=bytes(16)))
    assert without_proof(payload) == without_proof(other)


@given(nonces, blocks, st.data())
def test_a_frame_that_is_cut_or_longer_is_refused(nonce: bytes, block: bytes, data: st.DataObject) -> None:
    payload = encode_syn(SynFrame(nonce, block))
    cut = payload[: data.draw(st.integers(0, len(payload) - 1))]
    for wrong in (cut, payload + b"x"):
        try:
            decode_syn(wrong)
        except FrameError:
            continue
        raise AssertionError("was read")


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_an_identity_block_round_trips(credential: bytes, token: bytes) -> None:
    assert decode_block(encode_block(credential, token)) == (credential, token)


@given(proofs, st.booleans(), kernel_options)
def test_a_proof_is_found_before_and_after_a_kernels_options(proof: bytes, is_standalone: bool, options: bytes) -> None:
    assert has_room(options)
    found = find_proof(proof_option(proof, is_standalone=is_standalone) + options)
    assert found == (proof, is_standalone, options)
    ended = any(options[at:] == b"\0" * len(options[at:]) for at in range(len(options)))
    if not ended:
        assert find_proof(options + proof_option(proof, is_standalone=is_standalone)) == (proof, is_standalone, options)


@given(st.binary(max_size=40))
def test_any_options_hold_a_proof_or_none(options: bytes) -> None:
    found = find_proof(options)
    has_one = any(
        (kind, n, options[at + 2]) == (253, PROOF_OPTION_BYTES, 0x54) and options[at + 3] in b"RS"
        for kind, at, n in walk_options(options)
    )
    assert (found is not None) == has_one
    if found is not None:
        assert len(found.rest) == len(options) - PROOF_OPTION_BYTES
