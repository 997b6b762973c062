# SPDX-License-Identifier: Apache-2.0
"""At every moment, every certificate that can be in use is of an authority that every node believes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from trireme_signer.rotation import Authorities, Schedule, advance

START = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
SCHEDULE = Schedule(lifetime=20 * 24 * HOUR, delay=24 * HOUR, certificate_lifetime=24 * HOUR)


def step(before: Authorities | None, now: datetime, replace_before: datetime | None = None) -> Authorities:
    return advance(before.kept if before else (), "cluster.local", SCHEDULE, now, replace_before)


def test_the_first_authority_signs_at_once() -> None:
    first = step(None, START)
    assert [first.signer.certificate] == list(first.bundle)


def test_nothing_changes_before_half_of_its_life() -> None:
    first = step(None, START)
    assert step(first, START + 9 * 24 * HOUR) == first


def test_a_new_authority_is_believed_a_day_before_it_signs_and_the_old_one_until_its_last_certificate_ends() -> None:
    first = step(None, START)
    made = START + 10 * 24 * HOUR
    second = step(first, made)
    assert second.signer == first.signer
    assert len(second.bundle) == 2
    assert step(second, made + 23 * HOUR) == second
    switched = step(second, made + 24 * HOUR)
    assert switched.signer.certificate == second.bundle[1]
    assert switched.bundle == second.bundle
    assert switched.kept[0].key is None, "who signs no more needs no key"
    assert step(switched, made + 48 * HOUR).bundle == second.bundle
    assert step(switched, made + 49 * HOUR).bundle == second.bundle[1:]


def test_a_stolen_key_is_replaced_by_command() -> None:
    first = step(None, START)
    asked = START + HOUR
    second = step(first, asked + HOUR, replace_before=asked)
    assert len(second.bundle) == 2
    assert len(step(second, asked + 2 * HOUR, replace_before=asked).bundle) == 2, "one command makes one authority"


def test_a_command_for_later_waits() -> None:
    first = step(None, START)
    assert step(first, START + HOUR, replace_before=START + 2 * HOUR) == first


def test_an_authority_whose_key_is_gone_is_replaced() -> None:
    first = step(None, START)
    lost = advance([k.__class__(k.certificate, None) for k in first.kept], "cluster.local", SCHEDULE, START + HOUR)
    assert lost.signer.certificate not in first.bundle
    assert first.bundle[0] in lost.bundle


def test_keys_show_in_no_representation() -> None:
    text = repr(step(None, START))
    assert "redacted" in text
    assert "EllipticCurve" not in text


@given(waits=st.lists(st.integers(1, 400), min_size=1, max_size=30), forced=st.none() | st.integers(0, 1_000))
def test_whoever_signed_what_is_in_use_is_believed(waits: list[int], forced: int | None) -> None:
    """However rarely the signer looks, as long as it looks before it signs."""
    now, state = START, step(None, START)
    issued: list[tuple[x509.Certificate, datetime]] = []
    replace_before = None if forced is None else START + forced * HOUR
    for hours in waits:
        now += timedelta(hours=hours)
        known_before = {keeper.certificate: keeper.made_at for keeper in state.kept}
        state = step(state, now, replace_before)
        bundle = set(state.bundle)
        assert state.signer.certificate in bundle
        issued = [(signer, end) for signer, end in issued if end > now]
        assert all(signer in bundle for signer, _ in issued)
        if len(bundle) > 1 and state.signer.certificate not in known_before:
            pytest.fail("an authority signs before anybody could know it")
        issued.append((state.signer.certificate, min(now + 24 * HOUR, state.signer.certificate.not_valid_after_utc)))
