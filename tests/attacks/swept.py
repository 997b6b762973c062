# SPDX-License-Identifier: Apache-2.0
"""Sweeps: random packets from one place, and that none of them arrives but what is accepted."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence

from tests.attacks import sweep
from tests.attacks import world as places
from tests.attacks.conftest import SWEPT
from tests.attacks.expectations import NotClaimed, unexplained
from tests.attacks.origins import Origin, Target
from tests.attacks.sweep import Attempt, Outcome, Sweep, Transmit
from tests.attacks.witness import Witness
from tests.attacks.world import AttackWorld, Variant

FRESH_SEED = int(os.environ.get("TRIREME_SWEEP_SEED", "0")) or random.SystemRandom().getrandbits(32)
FIXED_SEED = 20_260
EVERYWHERE = (
    *(places.NEAR, places.FAR, places.ISOLATED, places.FAR_ISOLATED),
    *(places.NEIGHBOR, places.OUTSIDE, places.EXTERNAL, "node:a", "node:b", places.FABRIC),
)
SHUT = (places.ISOLATED, places.FAR_ISOLATED)
SHOWN = 40
Record = Callable[[str, object], None]


def swept(
    world: AttackWorld,
    origin: Origin,
    targets: Sequence[Target],
    at: Sequence[str],
    seeds: dict[int, int],
    *,
    spoofing: float = 0.25,
    link_share: float = 0.06,
    is_raw_ip: bool = False,
) -> Outcome:
    """Send random attempts, so many for each seed; return what arrived at the places."""
    tag, total = sweep.fresh_tag(), Outcome()
    channel = sweep.by_raw_socket if is_raw_ip else sweep.by_packet_socket
    with places.witnesses(world, tag, *at) as witnesses, channel(world, origin) as transmit:
        number = 0
        known: dict[int, Attempt] = {}
        for seed, count in seeds.items():
            maker = Sweep(world, origin, targets, tag, seed, first=number)
            attempts = (maker.random_attempt(spoofing, link_share) for _ in range(count))
            outcome, sent = sweep.run(transmit, attempts, witnesses)
            total.packets += outcome.packets
            total.refused_by_link += outcome.refused_by_link
            known |= sent
            number += count
        sweep.settle(world, witnesses, tag)
        _follow(maker, transmit, witnesses, known)
        sweep.settle(world, witnesses, tag)
        return sweep.gather(total, known, witnesses)


def _follow(maker: Sweep, transmit: Transmit, witnesses: Mapping[str, Witness], known: dict[int, Attempt]) -> None:
    """Send data in the flows that a handshake's first packet may have opened in some conntrack on the way."""
    opened = [attempt for attempt in known.values() if attempt.form in sweep.OPENING][:2_000]
    followers = [maker.follower(attempt, "tcp-data" if attempt.form.startswith("tcp") else "udp") for attempt in opened]
    _, sent = sweep.run(transmit, followers, witnesses)
    known |= sent


def assert_nothing(outcome: Outcome, variant: Variant, accepted: Sequence[NotClaimed], record: Record) -> None:
    """Fail if anything arrived that the lines do not accept; record what was sent for the summary."""
    left = unexplained(outcome.arrivals, variant, accepted)
    record(SWEPT, f"{outcome.packets} packets, {len(left)} arrived; random seed {FRESH_SEED}")
    shown = "\n".join(map(str, left[:SHOWN]))
    assert not left, f"{len(left)} arrivals (random seed {FRESH_SEED}):\n{shown}"
