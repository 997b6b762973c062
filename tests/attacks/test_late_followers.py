# SPDX-License-Identifier: Apache-2.0
"""Data past a pod's own enforcer, in a flow that another enforcer answered, once the handshake is forgotten."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from enforcer_daemon.handshake.carriers import UDP
from tests.attacks import origins, sweep
from tests.attacks import world as places
from tests.attacks.sweep import Outcome, Sweep
from tests.attacks.swept import EVERYWHERE
from tests.attacks.world import AttackWorld, Variant
from trireme_lab import Lab, Tools

pytestmark = pytest.mark.kernel

EACH = 10
_FORMS = ("udp-standalone-offer-own", "udp-offer-own")


@pytest.fixture(scope="module")
def world(plugin: Path) -> Iterator[AttackWorld]:
    with Lab(places.world_spec(), Tools(plugin=plugin)) as lab:
        running = places.prepare(lab)
        with places.applied(running, Variant("iptables", True)):
            yield running


@pytest.mark.parametrize("form", _FORMS)
def test_nothing_follows_an_offer_that_is_never_proven(world: AttackWorld, form: str) -> None:
    """The pod's rules name other pods; the receiver admits anybody, and its enforcer answers the pod's own identity."""
    tag, origin = sweep.fresh_tag(), origins.pod_origin(world, places.LABELLED)
    targets = [target for target in origins.targets(world) if target.kind == "far-pod"]
    with places.witnesses(world, tag, *EVERYWHERE) as witnesses, sweep.by_packet_socket(world, origin) as transmit:
        maker = Sweep(world, origin, targets, tag, 1)
        offers = [maker.attempt(form, target, v) for target in targets for v in (4, 6) for _ in range(EACH)]
        _, sent = sweep.run(transmit, offers, witnesses)
        assert UDP.unfinished_s is not None
        time.sleep(UDP.unfinished_s + 1.0)
        _, followers = sweep.run(transmit, [maker.follower(offer, "udp") for offer in sent.values()], witnesses)
        sweep.settle(world, witnesses, tag)
        assert sweep.gather(Outcome(), {**sent, **followers}, witnesses).arrivals == []
