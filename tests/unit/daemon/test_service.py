# SPDX-License-Identifier: Apache-2.0
"""How a queue is served: at once, unless nothing comes from it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from enforcer_daemon.daemon.service import (
    MAX_LAG_S,
    MAX_THROTTLE_S,
    MIN_THROTTLE_S,
    THROTTLE_FACTOR,
    QueueService,
    Work,
)

_TURN_S = 5 * MIN_THROTTLE_S / THROTTLE_FACTOR
"""Long enough that a rest is due after each turn, also of a queue that rests least."""


@dataclass
class PipeQueue:
    """A queue in a pipe: a byte is a packet, one is read in a turn."""

    is_mostly_refused: bool = False
    is_unproductive: bool = False
    has_more: bool = False
    turn_s: float = _TURN_S
    turns: int = 0
    turn_over: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    ends: tuple[int, int] = field(default_factory=os.pipe)

    def fileno(self) -> int:
        return self.ends[0]

    def read_batch(self) -> int:
        self.turns += 1
        self.turn_over.release()
        time.sleep(self.turn_s)
        return len(os.read(self.ends[0], 1))

    def send(self, count: int) -> None:
        os.write(self.ends[1], b"x" * count)


class EndlessWork(Work):
    """Other queues that have the enforcer to themselves, whenever one looks."""

    def part(self, now: float) -> float:
        return 1.0


@pytest.fixture
def queue() -> Iterator[PipeQueue]:
    queue = PipeQueue()
    yield queue
    for end in queue.ends:
        os.close(end)


async def until(queue: PipeQueue, turns: int) -> None:
    async with asyncio.timeout(20):
        for _ in range(turns):
            await queue.turn_over.acquire()


def rests_in_five_turns(queue: PipeQueue, work: Work) -> int:
    async def serve() -> int:
        service = QueueService(queue, asyncio.get_running_loop(), work)
        queue.send(5)
        await until(queue, 5)
        await asyncio.sleep(0)
        service.close()
        return service.rests

    return asyncio.run(serve())


def test_what_is_refused_rests_also_where_nobody_else_has_work(queue: PipeQueue) -> None:
    queue.is_mostly_refused = queue.is_unproductive = True
    assert rests_in_five_turns(queue, Work()) == 5


@pytest.mark.parametrize(("work", "rests"), [(Work(), 0), (EndlessWork(), 5)], ids=["idle", "busy"])
def test_what_is_in_vain_rests_while_others_have_work(queue: PipeQueue, work: Work, rests: int) -> None:
    queue.is_unproductive = True
    assert rests_in_five_turns(queue, work) == rests


def test_connections_never_rest(queue: PipeQueue) -> None:
    assert rests_in_five_turns(queue, EndlessWork()) == 0


def test_short_turns_are_added_up_until_a_rest_is_due(queue: PipeQueue) -> None:
    queue.is_mostly_refused, queue.turn_s = True, 0.0
    service_rests = rests_in_five_turns(queue, Work())
    assert service_rests < 5


def test_a_turn_that_had_to_wait_for_the_cpu_is_not_paid_for_with_seconds(queue: PipeQueue) -> None:
    queue.is_mostly_refused, queue.turn_s = True, 0.2

    async def serve() -> float:
        service = QueueService(queue, asyncio.get_running_loop(), EndlessWork())
        queue.send(2)
        await until(queue, 1)
        rested_from = time.perf_counter()
        await until(queue, 1)
        service.close()
        return time.perf_counter() - rested_from

    assert MAX_THROTTLE_S <= asyncio.run(serve()) < queue.turn_s * THROTTLE_FACTOR / 2


def test_a_closed_service_reads_no_more_also_when_it_rested(queue: PipeQueue) -> None:
    queue.is_mostly_refused = True

    async def serve() -> None:
        service = QueueService(queue, asyncio.get_running_loop(), Work())
        queue.send(1)
        await until(queue, 1)
        service.close()
        queue.send(1)
        await asyncio.sleep(0.02)

    asyncio.run(serve())
    assert queue.turns == 1


def test_the_work_of_others_is_a_part_of_the_time_and_soon_forgotten() -> None:
    work, now = Work(), 100.0
    assert work.part(now) == 0.0
    for _ in range(1_000):
        now += 0.001
        work.note(0.000_5, now)
    assert work.part(now) == pytest.approx(0.5, rel=0.1)
    assert work.part(now + 0.01) == pytest.approx(work.part(now) / 2)
    assert work.part(now + 1.0) == 0.0


def test_no_timer_ends_for_what_waits_in_a_queue_that_is_behind(queue: PipeQueue) -> None:
    async def serve() -> None:
        started = time.monotonic()
        service = QueueService(queue, asyncio.get_running_loop(), Work())
        assert service.timers_now(started + 1) == started + 1
        queue.has_more = True
        queue.send(2)
        await until(queue, 2)
        await asyncio.sleep(0)
        read_until = service.timers_now(started + 1)
        assert started <= read_until < started + 1
        assert service.timers_now(started + 1.5) == read_until
        assert service.timers_now(started + 60) == started + 60 - MAX_LAG_S
        queue.has_more = False
        queue.send(1)
        await until(queue, 1)
        await asyncio.sleep(0)
        assert service.timers_now(started + 60) == started + 60
        service.close()

    asyncio.run(serve())
