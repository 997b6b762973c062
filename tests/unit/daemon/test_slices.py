# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio

import pytest

from enforcer_daemon.daemon import slices
from enforcer_daemon.daemon.slices import BATCH, batches, in_slices


def test_batches_keep_order_and_are_bounded() -> None:
    found = list(batches(range(2 * BATCH + 1)))
    assert [len(batch) for batch in found] == [BATCH, BATCH, 1]
    assert [n for batch in found for n in batch] == list(range(2 * BATCH + 1))


def test_others_have_a_turn_after_each_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_S", 0.0)
    done: list[str] = []

    async def other() -> None:
        for _ in range(3):
            done.append("other")
            await asyncio.sleep(0)

    async def run() -> None:
        task = asyncio.ensure_future(other())
        await in_slices(map(done.append, ["step"] * 3))
        await task

    asyncio.run(run())
    assert done == ["step", "other"] * 3
