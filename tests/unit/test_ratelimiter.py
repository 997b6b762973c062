# SPDX-License-Identifier: Apache-2.0
"""Token buckets: a burst, a steady rate, a reserve, and debts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from enforcer_daemon.ratelimiter import RateLimiter


def taken(limiter: RateLimiter, now: float, reserve: float = 0.0) -> int:
    count = 0
    while limiter.take(now, reserve):
        count += 1
    return count


def test_a_burst_and_then_the_rate() -> None:
    limiter = RateLimiter(10.0, now=100.0)
    assert [taken(limiter, now) for now in (100.0, 100.05, 100.5, 200.0)] == [10, 0, 5, 10]


def test_a_rate_below_one_still_grants_one() -> None:
    limiter = RateLimiter(0.5)
    assert [taken(limiter, now) for now in (0.0, 1.0, 2.0)] == [1, 0, 1]


def test_time_that_goes_back_adds_nothing() -> None:
    limiter = RateLimiter(1.0, 2.0, now=10.0)
    assert [taken(limiter, now) for now in (10.0, 5.0, 6.0)] == [2, 0, 1]


def test_a_reserve_is_left_to_others() -> None:
    limiter = RateLimiter(8.0)
    assert (taken(limiter, 0.0, reserve=4.0), taken(limiter, 0.0, reserve=2.0), taken(limiter, 0.0)) == (4, 2, 2)


def test_what_is_given_back_can_be_taken_again() -> None:
    limiter = RateLimiter(1.0)
    limiter.give_back()
    assert limiter.level == 1.0
    assert limiter.take(0.0)
    limiter.give_back()
    assert taken(limiter, 0.0) == 1


def test_a_debt_has_to_be_waited_for() -> None:
    limiter = RateLimiter(0.5, 2.0)
    assert limiter.wait_s(0.0) == 0.0
    limiter.spend(0.0, 3.0)
    assert [limiter.wait_s(now) for now in (0.0, 1.0, 2.0, 3.0)] == [2.0, 1.0, 0.0, 0.0]


@given(st.floats(0.01, 1e4), st.lists(st.floats(0.0, 2.0), max_size=50))
def test_no_more_is_granted_than_burst_and_rate(rate: float, pauses: list[float]) -> None:
    limiter, now, granted = RateLimiter(rate), 0.0, 0
    for pause in pauses:
        now += pause
        granted += limiter.take(now)
    assert granted <= limiter.burst + now * rate + 1e-6
