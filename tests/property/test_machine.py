# SPDX-License-Identifier: Apache-2.0
"""The table of transitions: each entry as stated, nothing else, and no way to RELEASED around a proof."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer_daemon.handshake.flows import Flow
from enforcer_daemon.handshake.machine import (
    DATAGRAM_TRANSITIONS,
    TRANSITIONS,
    Event,
    IllegalEventError,
    State,
    next_state,
)
from tests.unit.datapath.pair import make_pair

PROOFS = {Event.PROOF_ATTACHED, Event.LONE_PROOF_PASSED, Event.PROOF_VERIFIED, Event.SEGMENT_FOLLOWED}
ENDS = {Event.REFUSED, Event.RESET, Event.EXPIRED}
EXPECTED = {
    (State.OPENING, Event.SYN_ACK_VERIFIED): State.VERIFIED,
    (State.VERIFIED, Event.SYN_ACK_VERIFIED): State.VERIFIED,
    (State.VERIFIED, Event.PROOF_ATTACHED): State.RELEASED,
    (State.VERIFIED, Event.LONE_PROOF_SENT): State.PROVING,
    (State.PROVING, Event.SYN_ACK_VERIFIED): State.PROVING,
    (State.PROVING, Event.LONE_PROOF_SENT): State.PROVING,
    (State.PROVING, Event.LONE_PROOF_PASSED): State.RELEASED,
    (State.OFFERED, Event.SYN_ACK_SENT): State.ANSWERED,
    (State.ANSWERED, Event.SYN_ACK_SENT): State.ANSWERED,
    (State.ANSWERED, Event.PROOF_VERIFIED): State.RELEASED,
    (State.ANSWERED, Event.LONE_PROOF_VERIFIED): State.PROVEN,
    (State.PROVEN, Event.LONE_PROOF_VERIFIED): State.PROVEN,
    (State.PROVEN, Event.PROOF_VERIFIED): State.RELEASED,
    (State.PROVEN, Event.SEGMENT_FOLLOWED): State.RELEASED,
    **{(state, event): State.CLOSED for state in State for event in ENDS if state < State.RELEASED},
    (State.RELEASED, Event.RESET): State.CLOSED,
    (State.RELEASED, Event.EXPIRED): State.CLOSED,
}
CLIENT, _ = make_pair()


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", list(Event))
def test_each_state_and_event(state: State, event: Event) -> None:
    flow = Flow(b"key", CLIENT.context.local, state, 0.0)
    follower = EXPECTED.get((state, event))
    if follower is not None:
        flow.advance(event)
        assert flow.state is follower
        return
    with pytest.raises(IllegalEventError, match=f"{event.name} in state {state.name}"):
        flow.advance(event)
    assert flow.state is state


def test_every_state_has_a_row() -> None:
    assert set(TRANSITIONS) | set(DATAGRAM_TRANSITIONS) == set(State)


@given(st.sampled_from([State.OPENING, State.OFFERED]), st.lists(st.sampled_from(Event), max_size=12))
def test_no_way_leads_to_released_without_the_events_of_both_proofs(start: State, events: list[Event]) -> None:
    state, taken = start, []
    for event in events:
        try:
            state = next_state(state, event)
        except IllegalEventError:
            continue
        taken.append(event)
        if state is State.RELEASED:
            first = Event.SYN_ACK_VERIFIED if start is State.OPENING else Event.SYN_ACK_SENT
            assert first in taken
            assert event in PROOFS
            assert event is not Event.SEGMENT_FOLLOWED or Event.LONE_PROOF_VERIFIED in taken
