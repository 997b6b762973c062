# SPDX-License-Identifier: Apache-2.0
"""Work of namespaces: a burst at once, then a part of the processor, and nobody waits for another."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from enforcer_daemon.sources import turns as module
from enforcer_daemon.sources.turns import RATE, Turns


def spin(cpu_s: float) -> int:
    started = time.thread_time()
    while time.thread_time() - started < cpu_s:
        pass
    return threading.get_ident()


def test_what_a_namespace_takes_beyond_its_burst_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BURST_S", 0.05)
    now = 0.0
    turns = Turns(lambda: now)

    async def work() -> None:
        nonlocal now
        assert await turns.run("greedy", lambda: spin(0.02)) != threading.get_ident()
        assert turns.wait_s("greedy") == 0
        await turns.run("greedy", lambda: spin(0.1))
        owed_s = turns.wait_s("greedy") * RATE
        assert 0.06 < owed_s < 0.5
        assert turns.wait_s("other") == 0
        now += owed_s / RATE
        assert turns.wait_s("greedy") == 0

    asyncio.run(work())
    turns.close()


def test_urgent_work_is_charged_but_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BURST_S", 0.0)

    async def work() -> None:
        turns = Turns(lambda: 0.0)
        for _ in range(2):
            await turns.run("x", lambda: spin(0.01), is_urgent=True)
        assert turns.wait_s("x") * RATE > 0.015
        with pytest.raises(ZeroDivisionError):
            await turns.run("x", lambda: 1 // 0, is_urgent=True)
        turns.close()

    asyncio.run(work())


def test_buckets_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BUCKETS", 2)
    monkeypatch.setattr(module, "BURST_S", 0.0)

    async def work() -> None:
        turns = Turns(lambda: 0.0)
        await turns.run("greedy", lambda: spin(0.02), is_urgent=True)
        for number in range(4):
            await turns.run(f"n{number}", lambda: spin(0.001), is_urgent=True)
        assert len(turns._buckets) == 2
        assert turns.wait_s("greedy") > 0  # Who owes most is not forgotten.
        turns.close()

    asyncio.run(work())
