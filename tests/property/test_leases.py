# SPDX-License-Identifier: Apache-2.0
"""Leases under an attacker who replays, changes and forges messages, on a wire that he cannot cut.

Whatever he sends: a live peer's flows never lapse and its identity stays, and a dead peer's flows lapse in their time.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import cycle

from hypothesis import given, settings
from hypothesis import strategies as st

from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.lapse import TCP_LAPSE_S
from enforcer_daemon.handshake.leaseframes import NO_ID, LeaseFlag, LeaseMessage, encode_lease, token_id
from enforcer_daemon.handshake.leasepairs import Lapse
from enforcer_daemon.model import Protocol
from tests.unit.datapath.pair import make_pair
from tests.unit.handshake.test_leases import Side, World

STEP_S = 5.0
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["replay", "change", "hello", "request", "unknown"]), st.integers(0, 5_000), st.booleans()
    ),
    max_size=40,
)


def leased_world() -> World:
    client, server = make_pair()
    world = World(Side.of(client), Side.of(server))
    for side in (world.a, world.b):
        side.leases.tick(side.local, world.now)
    world.note(Protocol.TCP)
    world.pass_time(2.0)
    return world


def attack(world: World, kind: str, n: int, at_a: bool) -> None:
    """Send one message of the attacker's under the other side's address."""
    to, far = (world.a, world.b) if at_a else (world.b, world.a)
    seen = [message.content for side, message in world.seen if side is far]
    content = seen[n % len(seen)]
    own, theirs = token_id(to.local.token_hash), token_id(far.local.token_hash)
    nonce = n.to_bytes(2, "big") * 8
    if kind == "change":
        at = 24 + n % (len(content) - 24)
        content = content[:at] + bytes((content[at] ^ 1 + n % 255,)) + content[at + 1 :]
    elif kind == "hello":
        flags = LeaseFlag.PROBE | LeaseFlag.PRESENTS
        message = LeaseMessage(nonce, bytes(16), theirs, NO_ID if n % 2 else own, flags, block=far.local.block)
        content = encode_lease(message, None)
    elif kind == "request":
        content = encode_lease(LeaseMessage(nonce, content[8:24], theirs, own, LeaseFlag.REQUEST), None)
    elif kind == "unknown":
        content = encode_lease(LeaseMessage(nonce, content[8:24], nonce, own, LeaseFlag(n % 2)), None)
    with suppress(PeerError):
        world.carry(to, to.leases.receive(content, (far.address, to.address), to.verify, world.now))


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_no_message_without_a_proof_ends_or_changes_anything(steps: list[tuple[str, int, bool]]) -> None:
    world = leased_world()
    for kind, n, at_a in steps:
        for _ in range(20):
            attack(world, kind, n, at_a)
        world.pass_time(STEP_S, step=1.0)
    world.pass_time(130.0, step=1.0)
    assert world.a.leases.take_events() == world.b.leases.take_events() == []


@settings(max_examples=30, deadline=None)
@given(STEPS)
def test_no_message_of_an_attacker_keeps_a_dead_peer_alive(steps: list[tuple[str, int, bool]]) -> None:
    world = leased_world()
    world.pass_time(60.0, step=1.0)
    world.is_lost = lambda _: True
    lapses_by = world.now + TCP_LAPSE_S + 2 * STEP_S
    tries = cycle([*steps, ("replay", 0, True)])
    while world.now < lapses_by:
        kind, n, _ = next(tries)
        attack(world, kind, n, at_a=True)
        world.pass_time(STEP_S, only=world.a, step=STEP_S)
    assert [event for event in world.a.leases.take_events() if isinstance(event, Lapse)] != []
