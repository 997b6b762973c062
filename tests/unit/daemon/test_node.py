# SPDX-License-Identifier: Apache-2.0
"""What the endpoints of a node share: random bytes that are never given twice."""

from __future__ import annotations

import os

import pytest

from enforcer_daemon.daemon import node
from enforcer_daemon.daemon.node import RandomPool


def test_no_byte_of_the_pool_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def urandom(count: int) -> bytes:
        asked.append(count)
        return bytes((len(asked),)) * (count // 2) + bytes((100 + len(asked),)) * (count - count // 2)

    monkeypatch.setattr(os, "urandom", urandom)
    pool = RandomPool()
    size = node._RANDOM_POOL_BYTES
    taken = b"".join(pool.take(16) for _ in range(size // 16))
    assert taken == bytes((1,)) * (size // 2) + bytes((101,)) * (size // 2)
    assert pool.take(16) == bytes((2,)) * 16
    assert asked == [size, size]


def test_a_rest_that_is_too_short_is_thrown_away() -> None:
    pool = RandomPool()
    pool.take(node._RANDOM_POOL_BYTES - 5)
    assert len(pool.take(16)) == 16
    assert len(pool.take(node._RANDOM_POOL_BYTES)) == node._RANDOM_POOL_BYTES
