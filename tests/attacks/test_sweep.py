# SPDX-License-Identifier: Apache-2.0
"""Random packets of every form to every kind of address: nothing arrives that policy does not allow.

The seeds are the same in every run, but for one, which is new each time and is printed. TRIREME_SWEEP_SEED repeats it;
TRIREME_SWEEP_PACKETS is the number of attempts of the caged pod with CAP_NET_RAW, in all variants together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks import origins, sweep
from tests.attacks import world as places
from tests.attacks.expectations import (
    FROM_CAGED,
    FROM_LABELLED,
    FROM_PARTLY,
    IMPOSSIBLE,
    TO_SHUT,
)
from tests.attacks.links import LINK_FORMS
from tests.attacks.sweep import Sweep
from tests.attacks.swept import EVERYWHERE, FIXED_SEED, FRESH_SEED, SHOWN, SHUT, Record, assert_nothing, swept
from tests.attacks.world import AttackWorld, Variant
from trireme_lab import Lab, Tools

pytestmark = pytest.mark.kernel

ATTEMPTS = int(os.environ.get("TRIREME_SWEEP_PACKETS", "100000"))
SHARE_OF_FRESH = 0.25
VARIANTS = [Variant(proxy, is_filtered) for proxy in ("iptables", "nft") for is_filtered in (True, False)]
_FEWEST_ALLOWED_FORMS = 4
_ROUNDS, _TRIES = 12, 4


@pytest.fixture(scope="module")
def running(plugin: Path) -> Iterator[AttackWorld]:
    with Lab(places.world_spec(), Tools(plugin=plugin)) as lab:
        yield places.prepare(lab)


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    assert isinstance(request.param, Variant)
    return request.param


@pytest.fixture(scope="module")
def world(running: AttackWorld, variant: Variant) -> Iterator[AttackWorld]:
    with places.applied(running, variant):
        yield running


def _seeds(count: int) -> dict[int, int]:
    fresh = int(count * SHARE_OF_FRESH)
    return {FIXED_SEED: count - fresh, FRESH_SEED: fresh}


def test_no_packet_of_a_caged_pod_arrives(world: AttackWorld, variant: Variant, record_property: Record) -> None:
    count = ATTEMPTS // len(VARIANTS)
    origin = origins.pod_origin(world, places.CAGED)
    outcome = swept(world, origin, origins.targets(world), EVERYWHERE, _seeds(count))
    assert_nothing(outcome, variant, FROM_CAGED, record_property)
    assert outcome.packets > count * 0.9


def test_a_pod_with_one_address_rule_reaches_what_it_allows_alone(
    world: AttackWorld, variant: Variant, record_property: Record
) -> None:
    """Whatever a packet's headers look like, the port that policy compares is the one that the receiver reads."""
    count = 5_000
    origin = origins.pod_origin(world, places.PARTLY)
    outcome = swept(world, origin, origins.targets(world), EVERYWHERE, _seeds(count))
    assert_nothing(outcome, variant, FROM_PARTLY, record_property)
    allowed = {arrival.attempt.form for arrival in outcome.arrivals if arrival.place == places.OUTSIDE}
    assert len(allowed) > _FEWEST_ALLOWED_FORMS


def test_a_pod_whose_rules_name_pods_reaches_no_other_kind_of_address(
    world: AttackWorld, variant: Variant, record_property: Record
) -> None:
    """Its frames go to pods, whose enforcers decide; they lead nowhere else."""
    origin = origins.pod_origin(world, places.LABELLED)
    outcome = swept(world, origin, origins.targets(world), EVERYWHERE, _seeds(5_000))
    assert_nothing(outcome, variant, FROM_LABELLED, record_property)


def test_no_packet_of_a_caged_pod_arrives_by_its_own_kernel(
    world: AttackWorld, variant: Variant, record_property: Record
) -> None:
    """By a raw socket of IP, past TCP and UDP of the pod's kernel, but through its rules and its enforcer."""
    count = 4_000
    origin = origins.pod_origin(world, places.CAGED)
    outcome = swept(world, origin, origins.targets(world), EVERYWHERE, _seeds(count), link_share=0.0, is_raw_ip=True)
    assert_nothing(outcome, variant, (), record_property)
    assert outcome.packets > count // 3


def test_nothing_of_a_neighbor_reaches_an_isolated_pod(
    world: AttackWorld, variant: Variant, record_property: Record
) -> None:
    count = 12_000
    origin = origins.pod_origin(world, places.NEIGHBOR)
    targets = origins.shut_targets(world, is_outside=False)
    outcome = swept(world, origin, targets, SHUT, _seeds(count), spoofing=0.8, link_share=0.0)
    assert_nothing(outcome, variant, TO_SHUT, record_property)
    assert outcome.packets > count * 0.9


def test_nothing_from_outside_reaches_an_isolated_pod(
    world: AttackWorld, variant: Variant, record_property: Record
) -> None:
    count = 12_000
    origin = origins.outside_origin(world)
    targets = origins.shut_targets(world, is_outside=True)
    outcome = swept(world, origin, targets, SHUT, _seeds(count), spoofing=0.9, link_share=0.0)
    assert_nothing(outcome, variant, TO_SHUT, record_property)
    assert outcome.packets > count * 0.9


# The control: what an unrestricted pod sends arrives, form by form.


def test_every_form_of_an_unrestricted_pod_arrives(world: AttackWorld) -> None:
    tag = sweep.fresh_tag()
    origin = origins.pod_origin(world, places.FREE)
    targets = origins.targets(world)
    pairs = {(form, target.kind, version): target for target in targets for form, version in sweep.forms_for(target)}
    missing = {key: target for key, target in pairs.items() if not any(line.covers(*key) for line in IMPOSSIBLE)}
    assert len(missing) > len(pairs) // 2
    with places.witnesses(world, tag, *EVERYWHERE) as witnesses, sweep.by_packet_socket(world, origin) as transmit:
        maker = Sweep(world, origin, targets, tag, FRESH_SEED)
        for _ in range(_ROUNDS):
            attempts = (
                maker.attempt(form, target, version)
                for (form, _, version), target in list(missing.items())
                for _ in range(_TRIES)
            )
            outcome, sent = sweep.run(transmit, attempts, witnesses)
            sweep.settle(world, witnesses, tag, 0.2)
            for arrival in sweep.gather(outcome, sent, witnesses).arrivals:
                found = arrival.attempt
                missing.pop((found.form, found.target, found.version), None)
            if not missing:
                return
    assert not missing, f"{len(missing)} of {len(pairs)} never arrived (seed {FRESH_SEED}): {list(missing)[:SHOWN]}"


def test_every_form_on_the_link_of_an_unenforced_neighbor_arrives(world: AttackWorld) -> None:
    tag = sweep.fresh_tag()
    origin = origins.pod_origin(world, places.NEIGHBOR)
    with places.witnesses(world, tag, places.NEAR) as witnesses, sweep.by_packet_socket(world, origin) as transmit:
        maker = Sweep(world, origin, origins.targets(world), tag, FRESH_SEED)
        outcome, sent = sweep.run(transmit, [maker.link_attempt(form) for form in LINK_FORMS] * 3, witnesses)
        sweep.settle(world, witnesses, tag)
        found = {arrival.attempt.form for arrival in sweep.gather(outcome, sent, witnesses).arrivals}
    places.forget_neighbors(world)  # what it claimed is believed: nobody guards it
    # br_netfilter drops what its type does not fit.
    assert set(LINK_FORMS) - found - {"link-wrong-version"} == set()
