# SPDX-License-Identifier: Apache-2.0
"""The waits between attempts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from enforcer_daemon.kube.backoff import backoff_s


def test_waits_double_up_to_the_most() -> None:
    assert [backoff_s(failures, 1.0, 3.0) for failures in range(1, 7)] == [0.25, 0.5, 1.0, 2.0, 3.0, 3.0]
    assert [backoff_s(failures, 0.0, 3.0) for failures in range(1, 7)] == [0.125, 0.25, 0.5, 1.0, 1.5, 1.5]


@given(st.integers(1, 10**9), st.floats(0, 1), st.floats(0.01, 1e6))
def test_a_wait_is_never_more_than_the_most_nor_next_to_nothing(failures: int, roll: float, most_s: float) -> None:
    assert min(0.125, most_s / 2) <= backoff_s(failures, roll, most_s) <= most_s
