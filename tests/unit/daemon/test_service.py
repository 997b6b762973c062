# SPDX-License-Identifier: Apache-2.0
"""How a queue is served: at once, unless nearly all of a backlog is refused."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from enforcer_daemon.daemon.service import QueueService


@dataclass
class PipeQueue:
    """A queue in a pipe: a byte is a packet, one is read in a turn."""

    is_mostly_refused: bool
    turns: int = 0
    turn_over: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    ends: tuple[int, int] = field(default_factory=os.pipe)

    def fileno(self) -> int:
        return self.ends[0]

    def read_turn(self) -> int:
        self.turns += 1
        self.turn_over.release()
        return len(os.read(self.ends[0], 1))

    def send(self, count: int) -> None:
        os.write(self.ends[1], b"x" * count)


@pytest.fixture(params=(True, False), ids=("refused", "allowed"))
def queue(request: pytest.FixtureRequest) -> Iterator[PipeQueue]:
    queue = PipeQueue(is_mostly_refused=bool(request.param))
    yield queue
    for end in queue.ends:
        os.close(end)


async def until(queue: PipeQueue, turns: int) -> None:
    async with asyncio.timeout(20):
        for _ in range(turns):
            await queue.turn_over.acquire()


def test_every_packet_is_read_and_only_what_is_refused_rests_after_each_turn(queue: PipeQueue) -> None:
    async def serve() -> int:
        service = QueueService(queue, asyncio.get_running_loop())
        queue.send(5)
        await until(queue, 5)
        service.close()
        return service.rests

    assert asyncio.run(serve()) == (5 if queue.is_mostly_refused else 0)


def test_a_closed_service_reads_no_more_also_when_it_rested(queue: PipeQueue) -> None:
    async def serve() -> None:
        service = QueueService(queue, asyncio.get_running_loop())
        queue.send(1)
        await until(queue, 1)
        service.close()
        queue.send(1)
        await asyncio.sleep(0.02)

    asyncio.run(serve())
    assert queue.turns == 1
