# SPDX-License-Identifier: Apache-2.0
"""A short sweep for a distribution's kernel, whatever form kube-proxy has there: nft, or IPVS.

The backend of the pods' rules is the one that the kernel has: nft where it has the queue expression.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks import origins
from tests.attacks import world as places
from tests.attacks.expectations import FROM_CAGED, TO_SHUT
from tests.attacks.ipvs_nodes import require_ipvs
from tests.attacks.swept import EVERYWHERE, FIXED_SEED, SHUT, Record, assert_nothing, swept
from tests.attacks.world import AttackWorld, Variant
from trireme_lab import Lab, Tools

pytestmark = [pytest.mark.kernel, pytest.mark.slow, pytest.mark.stock_kernel]

COUNT = 3_000


@pytest.fixture(scope="module")
def running(plugin: Path) -> Iterator[AttackWorld]:
    with Lab(places.world_spec(), Tools(plugin=plugin)) as lab:
        yield places.prepare(lab)


@pytest.fixture(scope="module", params=["nft", "ipvs"])
def variant(request: pytest.FixtureRequest, running: AttackWorld) -> Iterator[Variant]:
    variant = Variant(request.param)
    if variant.proxy == "ipvs":
        require_ipvs()
    with places.applied(running, variant):
        yield variant


def test_few_packets_of_a_caged_pod(running: AttackWorld, variant: Variant, record_property: Record) -> None:
    origin = origins.pod_origin(running, places.CAGED)
    # IPVS makes an external address of a Service one of each node, so nothing leads to the host that has it, too.
    at = [place for place in EVERYWHERE if (variant.proxy, place) != ("ipvs", places.EXTERNAL)]
    outcome = swept(running, origin, origins.targets(running), at, {FIXED_SEED: COUNT})
    assert_nothing(outcome, variant, FROM_CAGED, record_property)


def test_few_packets_from_outside_to_isolated_pods(
    running: AttackWorld, variant: Variant, record_property: Record
) -> None:
    """Most of them under addresses of the node and of pods."""
    origin, targets = origins.outside_origin(running), origins.shut_targets(running, is_outside=True)
    outcome = swept(running, origin, targets, SHUT, {FIXED_SEED: COUNT}, spoofing=0.9, link_share=0.0)
    assert_nothing(outcome, variant, TO_SHUT, record_property)
