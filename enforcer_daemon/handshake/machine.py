# SPDX-License-Identifier: Apache-2.0
"""The states of a flow and the one table of what may follow what. RELEASED is reached only past both proofs.

An initiator's flow goes OPENING, VERIFIED, (PROVING,) RELEASED; a responder's OFFERED, ANSWERED, (PROVEN,) RELEASED.
Flows of datagrams have a table of their own: OPENING, RELEASED; (ASKED,) ANSWERED, RELEASED.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from enforcer_daemon.errors import EnforcerError


class State(IntEnum):
    """Where a handshake stands. (IntEnum: these key the table on the hot path, and integers hash fastest.)"""

    OPENING = 1
    """Initiator: the SYN left with our frame."""
    VERIFIED = 2
    """Initiator: the SYN-ACK's proof and policy held, and it was delivered."""
    PROVING = 3
    """Initiator: our proof travels in an ACK of our own, the pod's packets wait for it."""
    OFFERED = 4
    """Responder: the SYN's identity and policy held, and it was delivered."""
    ANSWERED = 5
    """Responder: the SYN-ACK left with our frame and proof."""
    PROVEN = 6
    """Responder: the initiator's proof held, on a packet that could not carry the release."""
    RELEASED = 7
    """The flow goes on in the kernel."""
    CLOSED = 8
    ASKED = 9
    """Responder of datagrams: one came of a flow that nobody knows; its sender was asked to shake hands again."""


class Event(IntEnum):
    """What happens to a flow."""

    SYN_ACK_VERIFIED = 1
    PROOF_ATTACHED = 2
    LONE_PROOF_SENT = 3
    LONE_PROOF_PASSED = 4
    SYN_ACK_SENT = 5
    PROOF_VERIFIED = 6
    LONE_PROOF_VERIFIED = 7
    SEGMENT_FOLLOWED = 8
    REFUSED = 9
    RESET = 10
    EXPIRED = 11
    ANSWER_VERIFIED = 12
    OFFER_VERIFIED = 13
    TAKEN_AS_ADDRESS = 14


class IllegalEventError(EnforcerError):
    """An event that the flow's state does not allow; the state is unchanged."""


_END: Mapping[Event, State] = {
    Event.REFUSED: State.CLOSED,
    Event.RESET: State.CLOSED,
    Event.EXPIRED: State.CLOSED,
}

TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    State.OPENING: {Event.SYN_ACK_VERIFIED: State.VERIFIED, **_END},
    State.VERIFIED: {
        Event.SYN_ACK_VERIFIED: State.VERIFIED,
        Event.PROOF_ATTACHED: State.RELEASED,
        Event.LONE_PROOF_SENT: State.PROVING,
        **_END,
    },
    State.PROVING: {
        Event.SYN_ACK_VERIFIED: State.PROVING,
        Event.LONE_PROOF_SENT: State.PROVING,
        Event.LONE_PROOF_PASSED: State.RELEASED,
        **_END,
    },
    State.OFFERED: {Event.SYN_ACK_SENT: State.ANSWERED, **_END},
    State.ANSWERED: {
        Event.SYN_ACK_SENT: State.ANSWERED,
        Event.PROOF_VERIFIED: State.RELEASED,
        Event.LONE_PROOF_VERIFIED: State.PROVEN,
        **_END,
    },
    State.PROVEN: {
        Event.LONE_PROOF_VERIFIED: State.PROVEN,
        Event.PROOF_VERIFIED: State.RELEASED,
        Event.SEGMENT_FOLLOWED: State.RELEASED,
        **_END,
    },
    State.RELEASED: {Event.RESET: State.CLOSED, Event.EXPIRED: State.CLOSED},
    State.CLOSED: {},
}

DATAGRAM_TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    State.OPENING: {Event.ANSWER_VERIFIED: State.RELEASED, Event.TAKEN_AS_ADDRESS: State.RELEASED, **_END},
    State.ASKED: {Event.OFFER_VERIFIED: State.ANSWERED, **_END},
    State.ANSWERED: {Event.PROOF_VERIFIED: State.RELEASED, **_END},
    State.RELEASED: {Event.EXPIRED: State.CLOSED},
    State.CLOSED: {},
}


def next_state(state: State, event: Event, transitions: Mapping[State, Mapping[Event, State]] = TRANSITIONS) -> State:
    """Look the event up; raise IllegalEventError where the table has no entry."""
    follower = transitions.get(state, {}).get(event)
    if follower is None:
        raise IllegalEventError(f"{event.name} in state {state.name}")
    return follower
