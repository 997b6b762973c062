# SPDX-License-Identifier: Apache-2.0
"""The states of a session and the one table of what may follow what, for every protocol and both roles.

RELEASED is reached only past both proofs, or by the decision on an address. A session leaves its table by an event of
END alone. docs/protocol.md has the diagram of this table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum

from enforcer_daemon.enums import with_plain_members
from enforcer_daemon.errors import EnforcerError


@with_plain_members
class State(IntEnum):
    """Where a session stands. (IntEnum: these key the table on the hot path, and integers hash fastest.)"""

    OPENING = 1
    """Initiator: the offer has left with no packet of the pod's."""
    SHOWN = 2
    """Initiator: the offer left with a packet of the pod's."""
    REPLIED = 3
    """Initiator: the peer's address, which policy allows, answered without an identity."""
    UNANSWERED = 4
    """Initiator: no enforcer answered in time; what policy allows by address waits no longer."""
    DOUBTED = 5
    """Initiator: allowed by address, and kept from the kernel while the pod's own address is fresh."""
    VERIFIED = 6
    """Initiator: the answer's proof and policy held."""
    PROVING = 7
    """Initiator: the proof travels in a packet of the enforcer's own, and the pod's packets wait for it."""
    ASKED = 8
    """Responder: a packet of an unknown flow waits; its sender was asked to rehandshake."""
    OFFERED = 9
    """Responder: the offer's identity and policy held, and the answer has not left."""
    ANSWERED = 10
    """Responder: the answer left with our proof."""
    CHALLENGED = 11
    """Responder: the answer to a denied offer left; its proof will end an earlier release, and open nothing."""
    PROVEN = 12
    """Responder: the initiator's proof held, on a packet that could not carry the release."""
    RELEASED = 13
    """The flow goes on in the kernel."""
    CLOSED = 14


@with_plain_members
class Event(IntEnum):
    """What happens to a session."""

    OFFER_ATTACHED = 1
    OFFER_SENT = 2
    PATIENCE_ENDED = 3
    PLAIN_REPLY = 4
    TAKEN_AS_ADDRESS = 5
    TAKEN_IN_DOUBT = 6
    DOUBT_ENDED = 7
    ANSWER_VERIFIED = 8
    PROOF_ATTACHED = 9
    PROOF_SENT = 10
    PROOF_PASSED = 11
    OFFER_VERIFIED = 12
    OFFER_RETRANSMITTED = 13
    ANSWER_SENT = 14
    CHALLENGE_SENT = 15
    PROOF_VERIFIED = 16
    STANDALONE_PROOF_VERIFIED = 17
    SEGMENT_FOLLOWED = 18
    REFUSED = 19
    """Policy denies the peer that answered."""
    RESET = 20
    """An end of the connection refused or ended it."""
    EXPIRED = 21
    """The handshake took too long."""
    EVICTED = 22
    """The table was full."""
    REPLACED = 23
    """Another handshake of the same flow took its place."""
    POLICY_CHANGED = 24
    IDENTITY_CHANGED = 25
    """The offer shows an identity that the pod no longer has."""
    FORGOTTEN = 26
    """A released flow is remembered no longer; the kernel has it."""
    TAKEN_BACK = 27
    """The release was taken back."""


class IllegalEventError(EnforcerError):
    """An event that the session's state does not allow; the state is unchanged."""


_END = dict.fromkeys((Event.RESET, Event.EXPIRED, Event.EVICTED, Event.REPLACED, Event.POLICY_CHANGED), State.CLOSED)
_REFUSED = {Event.REFUSED: State.CLOSED, **_END}
_UNVERIFIED = {Event.ANSWER_VERIFIED: State.VERIFIED, Event.IDENTITY_CHANGED: State.CLOSED, **_REFUSED}
_REMEMBERED = dict.fromkeys(
    (Event.REFUSED, Event.RESET, Event.REPLACED, Event.POLICY_CHANGED, Event.FORGOTTEN, Event.TAKEN_BACK), State.CLOSED
)

# fmt: off
TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    State.OPENING: {
        Event.OFFER_ATTACHED: State.SHOWN, Event.OFFER_SENT: State.OPENING, Event.PLAIN_REPLY: State.REPLIED,
        Event.PATIENCE_ENDED: State.UNANSWERED, **_UNVERIFIED,
    },
    State.SHOWN: {
        Event.OFFER_ATTACHED: State.SHOWN, Event.PLAIN_REPLY: State.REPLIED, Event.PATIENCE_ENDED: State.UNANSWERED,
        **_UNVERIFIED,
    },
    State.REPLIED: {
        Event.OFFER_ATTACHED: State.REPLIED, Event.PLAIN_REPLY: State.REPLIED, Event.TAKEN_AS_ADDRESS: State.RELEASED,
        Event.TAKEN_IN_DOUBT: State.DOUBTED, **_UNVERIFIED,
    },
    State.UNANSWERED: {
        Event.OFFER_ATTACHED: State.UNANSWERED, Event.OFFER_SENT: State.UNANSWERED, Event.PLAIN_REPLY: State.REPLIED,
        **_UNVERIFIED,
    },
    State.DOUBTED: {
        Event.OFFER_ATTACHED: State.DOUBTED, Event.OFFER_SENT: State.DOUBTED, Event.DOUBT_ENDED: State.RELEASED,
        Event.ANSWER_VERIFIED: State.VERIFIED, **_REMEMBERED,
    },
    State.VERIFIED: {
        Event.ANSWER_VERIFIED: State.VERIFIED, Event.PROOF_ATTACHED: State.RELEASED, Event.PROOF_SENT: State.PROVING,
        **_REFUSED,
    },
    State.PROVING: {
        Event.ANSWER_VERIFIED: State.PROVING, Event.PROOF_SENT: State.PROVING, Event.PROOF_PASSED: State.RELEASED,
        **_REFUSED,
    },
    State.ASKED: {Event.OFFER_VERIFIED: State.OFFERED, **_END},
    State.OFFERED: {
        Event.OFFER_RETRANSMITTED: State.OFFERED, Event.ANSWER_SENT: State.ANSWERED,
        Event.CHALLENGE_SENT: State.CHALLENGED, Event.TAKEN_AS_ADDRESS: State.RELEASED, **_END,
    },
    State.ANSWERED: {
        Event.OFFER_RETRANSMITTED: State.ANSWERED, Event.ANSWER_SENT: State.ANSWERED,
        Event.PROOF_VERIFIED: State.RELEASED, Event.STANDALONE_PROOF_VERIFIED: State.PROVEN, **_END,
    },
    State.CHALLENGED: {
        Event.OFFER_RETRANSMITTED: State.CHALLENGED, Event.CHALLENGE_SENT: State.CHALLENGED,
        Event.PROOF_VERIFIED: State.CLOSED, **_END,
    },
    State.PROVEN: {
        Event.ANSWER_SENT: State.PROVEN, Event.STANDALONE_PROOF_VERIFIED: State.PROVEN,
        Event.PROOF_VERIFIED: State.RELEASED, Event.SEGMENT_FOLLOWED: State.RELEASED, **_END,
    },
    State.RELEASED: {Event.ANSWER_VERIFIED: State.RELEASED, Event.PROOF_SENT: State.RELEASED, **_REMEMBERED},
    State.CLOSED: {},
}
# fmt: on

UNVERIFIED = frozenset({State.OPENING, State.SHOWN, State.REPLIED, State.UNANSWERED})
"""Of an initiator: no identity has answered, and no decision has fallen."""
REMEMBERED = frozenset({State.RELEASED, State.DOUBTED})
"""The handshake is over, and the flow is remembered for recovery."""


def next_state(state: State, event: Event) -> State:
    """Look the event up; raise IllegalEventError if the table has no entry."""
    follower = TRANSITIONS[state].get(event)
    if follower is None:
        raise IllegalEventError(f"{event.name} in state {state.name}")
    return follower


def render_diagram(transitions: Mapping[State, Mapping[Event, State]] = TRANSITIONS) -> str:
    """Render the table as a mermaid diagram: one arrow for each pair of states, with its events."""
    arrows = ["stateDiagram-v2", *(f"    [*] --> {state.name}" for state in _first_states(transitions))]
    for state, followers in transitions.items():
        by_target: dict[State, list[str]] = {}
        for event, target in followers.items():
            by_target.setdefault(target, []).append(event.name.lower())
        arrows += [f"    {state.name} --> {target.name}: {', '.join(events)}" for target, events in by_target.items()]
    return "\n".join([*arrows, "    CLOSED --> [*]"])


def _first_states(transitions: Mapping[State, Mapping[Event, State]]) -> Iterable[State]:
    """Return the states that no other leads to, and OFFERED, in which the offer of an unknown flow begins."""
    reached = {target for state, targets in transitions.items() for target in targets.values() if target is not state}
    return [state for state in transitions if state not in reached or state is State.OFFERED]
