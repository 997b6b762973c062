# SPDX-License-Identifier: Apache-2.0
"""Who may cause a signature check while others send all they can."""

from __future__ import annotations

from itertools import count

import pytest

from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.fairtable import Limit, LimitHits, no_hits
from enforcer_daemon.handshake.limits import HandshakeLimits
from enforcer_daemon.handshake.signaturebudget import SignatureBudget
from enforcer_daemon.reasons import Reason

GOOD = bytes((10, 1, 0, 2))


def allowance(hits: LimitHits | None = None, **rates: float) -> SignatureBudget:
    return SignatureBudget(HandshakeLimits(**rates), hits or no_hits())  # type: ignore[arg-type]


def may(allowance: SignatureBudget, address: bytes, now: float, *, known: bool = False, is_pod: bool = True) -> bool:
    try:
        allowance.take(address, is_pod=is_pod, is_credential_known=known, now=now)
    except PeerError as err:
        return err.reason is not Reason.VERIFY_RATE
    return True


def forged() -> bytes:
    return next(_numbers).to_bytes(4, "big")


_numbers = count(1)


def flood(target: SignatureBudget, now: float, *, known: bool = False, packets: int = 2_000) -> int:
    """Send from as many forged addresses; answer how many verifications that caused."""
    return sum(may(target, forged(), now, known=known) for _ in range(packets))


def test_strangers_leave_half_to_those_that_are_known() -> None:
    hits = no_hits()
    target = allowance(hits)
    assert flood(target, 1.0) == 500
    assert hits[Limit.VERIFICATIONS] == 1_500
    assert flood(target, 1.0, known=True) == 250  # As strangers do who have heard a node's credential.
    target.trust(GOOD)
    assert may(target, GOOD, 1.0, known=True)


def test_a_steady_flood_never_keeps_a_known_peer_waiting() -> None:
    target = allowance()
    target.trust(GOOD)
    for tick in range(100):
        flood(target, tick / 10, packets=500)
        flood(target, tick / 10, known=True, packets=500)
        assert may(target, GOOD, tick / 10, known=True)


def test_a_stranger_who_uses_a_good_peers_address_does_not_use_up_its_allowance() -> None:
    target = allowance(max_verifications_per_s=10.0)
    target.trust(GOOD)
    assert sum(may(target, GOOD, 1.0) for _ in range(100)) == 10
    assert may(target, GOOD, 1.0, known=True)


def test_hosts_of_ipv6_share_the_allowance_of_their_network_and_pods_do_not() -> None:
    hits = no_hits()
    target = allowance(hits, max_verifications_per_s=10.0)
    addresses = [bytes.fromhex("20010db8000000000000000000000000")[:14] + n.to_bytes(2, "big") for n in range(100)]
    assert sum(may(target, address, 1.0, is_pod=False) for address in addresses) == 10
    assert hits[Limit.VERIFICATIONS_PER_SOURCE] == 90
    assert sum(may(target, address, 1.0, is_pod=True) for address in addresses) == 100


@pytest.mark.parametrize("rate", [0.1, 1.0, 3.0])
def test_a_low_rate_still_lets_everybody_in_now_and_then(rate: float) -> None:
    target = allowance(max_total_verifications_per_s=rate)
    flood(target, 1.0)
    assert not may(target, forged(), 1.0)
    assert may(target, forged(), 1.0 + 2.0 / rate)


def test_trust_is_bounded_and_the_oldest_is_forgotten() -> None:
    target = allowance(max_cached_peers=2)
    for address in (b"one.", b"two.", b"one.", b"six."):
        target.trust(address)
    assert list(target._trusted) == [b"one.", b"six."]
