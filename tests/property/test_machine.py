# SPDX-License-Identifier: Apache-2.0
"""The table of transitions: each end from each state as stated, and no way to RELEASED around a proof or a decision."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer_daemon.handshake import carriers
from enforcer_daemon.handshake.flowkey import FlowKey, Role
from enforcer_daemon.handshake.machine import (
    REMEMBERED,
    TRANSITIONS,
    UNVERIFIED,
    Event,
    IllegalEventError,
    State,
    next_state,
)
from enforcer_daemon.handshake.session import Session
from enforcer_daemon.model import Protocol
from tests.unit.datapath.pair import make_pair

KEY = FlowKey(b"peer", b"pod!", 1, 2, Protocol.TCP, Role.INITIATOR)
OPEN = set(State) - {State.CLOSED}
UNFINISHED = OPEN - REMEMBERED
ENDS = {
    Event.RESET: OPEN,
    Event.REPLACED: OPEN,
    Event.POLICY_CHANGED: OPEN,
    Event.EXPIRED: UNFINISHED,
    Event.EVICTED: UNFINISHED,
    Event.FORGOTTEN: REMEMBERED,
    Event.TAKEN_BACK: REMEMBERED,
    Event.IDENTITY_CHANGED: UNVERIFIED,
    Event.REFUSED: UNVERIFIED | REMEMBERED | {State.VERIFIED, State.PROVING},
}
"""From which states each end is possible."""
RELEASES = {
    (State.REPLIED, Event.TAKEN_AS_ADDRESS),
    (State.DOUBTED, Event.DOUBT_ENDED),
    (State.VERIFIED, Event.PROOF_ATTACHED),
    (State.PROVING, Event.PROOF_PASSED),
    (State.OFFERED, Event.TAKEN_AS_ADDRESS),
    (State.ANSWERED, Event.PROOF_VERIFIED),
    (State.PROVEN, Event.PROOF_VERIFIED),
    (State.PROVEN, Event.SEGMENT_FOLLOWED),
}
BY_ADDRESS = {Event.TAKEN_AS_ADDRESS, Event.DOUBT_ENDED}
INITIATOR = {*UNVERIFIED, State.DOUBTED, State.VERIFIED, State.PROVING, State.RELEASED, State.CLOSED}
CLIENT, _ = make_pair()


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", list(Event))
def test_each_state_and_event(state: State, event: Event) -> None:
    session = Session(KEY, carriers.TCP, CLIENT.context.local, state, 0.0)
    follower = TRANSITIONS[state].get(event)
    if follower is not None:
        session.advance(event)
        assert session.state is follower
        return
    with pytest.raises(IllegalEventError, match=f"{event.name} in state {state.name}"):
        session.advance(event)
    assert session.state is state


def test_every_state_has_a_row_and_every_event_a_place() -> None:
    assert set(TRANSITIONS) == set(State)
    assert {event for row in TRANSITIONS.values() for event in row} == set(Event)


def test_sessions_end_by_these_events_alone() -> None:
    ends = {(state, event) for state, row in TRANSITIONS.items() for event, to in row.items() if to is State.CLOSED}
    expected = {(state, event) for event, states in ENDS.items() for state in states}
    assert ends == expected | {(State.CHALLENGED, Event.PROOF_VERIFIED)}  # It ends an earlier release, and itself.


def test_flows_are_released_by_these_events_alone() -> None:
    releases = {
        (state, event)
        for state, row in TRANSITIONS.items()
        for event, to in row.items()
        if to is State.RELEASED and state is not State.RELEASED
    }
    assert releases == RELEASES


def test_the_roles_have_no_state_in_common_but_the_last_ones() -> None:
    for state in INITIATOR - {State.RELEASED, State.CLOSED}:
        assert set(TRANSITIONS[state].values()) <= INITIATOR
    for state in set(State) - INITIATOR:
        assert set(TRANSITIONS[state].values()) <= set(State) - INITIATOR | {State.RELEASED, State.CLOSED}


@given(st.sampled_from([State.OPENING, State.ASKED, State.OFFERED]), st.lists(st.sampled_from(Event), max_size=12))
def test_no_way_leads_to_released_without_the_events_of_both_proofs(start: State, events: list[Event]) -> None:
    state, taken = start, []
    for event in events:
        before = state
        try:
            state = next_state(state, event)
        except IllegalEventError:
            continue
        taken.append(event)
        if state is State.RELEASED and before is not State.RELEASED and event not in BY_ADDRESS:
            first = Event.ANSWER_VERIFIED if start is State.OPENING else Event.ANSWER_SENT
            assert first in taken
            assert (before, event) in RELEASES
            assert event is not Event.SEGMENT_FOLLOWED or Event.STANDALONE_PROOF_VERIFIED in taken
