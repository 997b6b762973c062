# SPDX-License-Identifier: Apache-2.0
"""How the loop serves one pod's queue: whenever packets wait, but a queue of which nearly all is refused has to rest.

A flood that the kernel's rates let through still takes whatever the enforcer would spend on it, since there is always
more. What is refused is no use to anybody, so such a queue waits several times as long as its last turn took, while the
others have the enforcer to themselves. Honest load is not refused, and never rests, however much of it there is.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

MIN_REST_S = 0.001
"""The loop's timers know no shorter time."""
REST_FACTOR = 8
"""How much longer than its turn a refused queue rests: it then has at most a ninth of the enforcer's time."""


class Queue(Protocol):
    """What is served."""

    @property
    def is_mostly_refused(self) -> bool:
        """Whether more waits, and of the last turn most was dropped."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when packets wait."""

    def read_turn(self) -> int:
        """Judge some of the packets that wait."""


class QueueService:
    """The turns of one queue. For the event loop's thread alone."""

    __slots__ = ("_fd", "_loop", "_queue", "_rest", "rests")

    def __init__(self, queue: Queue, loop: asyncio.AbstractEventLoop) -> None:
        """Serve the queue from now on."""
        self._queue = queue
        self._loop = loop
        self._fd = queue.fileno()
        self._rest: asyncio.TimerHandle | None = None
        self.rests = 0
        """How often the queue had to rest."""
        loop.add_reader(self._fd, self._serve)

    def close(self) -> None:
        """Serve it no longer; call it before the queue is closed."""
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        else:
            self._loop.remove_reader(self._fd)

    def _serve(self) -> None:
        started = time.perf_counter()
        self._queue.read_turn()
        if self._queue.is_mostly_refused:
            took_s = time.perf_counter() - started
            self._loop.remove_reader(self._fd)
            self._rest = self._loop.call_later(max(MIN_REST_S, REST_FACTOR * took_s), self._go_on)
            self.rests += 1

    def _go_on(self) -> None:
        self._rest = None
        self._loop.add_reader(self._fd, self._serve)
