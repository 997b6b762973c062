# SPDX-License-Identifier: Apache-2.0
"""The forms of segments that carry a handshake: a frame as payload, a proof among the options."""

from __future__ import annotations

from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.frames import proof_option
from enforcer_daemon.handshake.machine import State
from enforcer_daemon.handshake.session import Session
from enforcer_daemon.packet.ip import DONT_FRAGMENT
from enforcer_daemon.packet.tcp import (
    ACK,
    SYN_ACK,
    Segment,
    build,
    decode_tcp,
    with_options_and_payload,
    with_payload,
    without_fast_open,
)
from enforcer_daemon.reasons import Reason
from enforcer_daemon.verdict import ACCEPT, Action, Inject, Verdict

_NUMBERS = 0xFFFF_FFFF


def successor(number: int) -> int:
    """Return the number after one that a SYN takes."""
    return number + 1 & _NUMBERS


def framed(segment: Segment, session: Session, nonce: bytes, mtu: int) -> bytes:
    """Put our frame on a segment; routers may cut the packet, though its kernel forbids that for one so small.

    Pieces belong together by the identification, so it must differ between connections. A retransmission has the
    same one, and is the same beyond its first piece.
    """
    options = without_fast_open(segment.options)
    packet = with_options_and_payload(segment, options, session.frame, nonce[:2] + b"\0\0", session.frame_sum)
    if len(packet) > mtu:
        raise PeerError(Reason.IDENTITY_TOO_LARGE, f"{len(packet)} bytes, MTU {mtu}")
    return packet


def answers(segment: Segment, session: Session) -> bool:
    """Tell whether a SYN-ACK belongs to a handshake, by its numbers."""
    is_proven = session.state in (State.PROVEN, State.RELEASED)
    return segment.ack == successor(session.isn_i) and (not is_proven or segment.seq == session.isn_r)


def bare(segment: Segment) -> bytes:
    """Take off what was added, so that the pod's kernel sees its peer's segment."""
    return with_options_and_payload(segment, without_fast_open(segment.options), b"", DONT_FRAGMENT)


def standalone_proof(session: Session, window: int) -> Inject:
    """Make an ACK of our own with nothing but the proof."""
    key = session.key
    numbers = successor(session.isn_i), successor(session.isn_r)
    options = proof_option(session.proof, is_standalone=True)
    return Inject(build(key.own, key.remote, (key.own_port, key.remote_port), numbers, ACK, window, options))


def answer_of(session: Session, mtu: int) -> bytes | None:
    """Make the SYN-ACK of a handshake once more, as the pod's kernel made it; None if its proof has come."""
    answer, key = session.answer, session.key
    if answer is None:
        return None
    options = without_fast_open(answer.options)
    ports, numbers = (key.own_port, key.remote_port), (session.isn_r, successor(session.isn_i))
    again = build(key.own, key.remote, ports, numbers, SYN_ACK, answer.window, options)
    return framed(decode_tcp(again), session, session.nonce_r, mtu)


def is_after_frame(segment: Segment, session: Session) -> bool:
    """Tell whether a segment acknowledges our frame as data of the SYN, as a kernel without an enforcer may."""
    return segment.ack == successor(session.isn_i) + len(session.frame) & _NUMBERS


def refusal(segment: Segment, session: Session) -> Verdict:
    """Let in the RST that refuses the pod's SYN; raise PeerError if it refuses another.

    A kernel without an enforcer acknowledges the frame as well (RFC 9293, section 3.10.7.1), of which the pod's kernel
    knows nothing: it gets the RST that refuses its own SYN.
    """
    expected = successor(session.isn_i)
    if segment.ack == expected:
        return bare_reset(segment)
    if not is_after_frame(segment, session):
        raise PeerError(Reason.UNKNOWN_FLOW, "RST that refuses another SYN")
    ports = segment.sport, segment.dport
    return Verdict(Action.ACCEPT, build(segment.src, segment.dst, ports, (segment.seq, expected), segment.flags, 0))


def bare_reset(segment: Segment) -> Verdict:
    """Let a RST pass, without the data that it may carry: there is no proof yet."""
    return ACCEPT if segment.data == segment.end else Verdict(Action.ACCEPT, with_payload(segment, b""))
