# SPDX-License-Identifier: Apache-2.0
"""How the loop serves one pod's queue: whenever packets wait, but a queue from which nothing comes has to rest.

A flood that the kernel's rates let through still takes what the enforcer spends on it. So a queue from which hardly any
connection comes, as under handshakes that nobody ends, waits several times as long as its turns took, by the measure in
which others have work: with the enforcer to itself it is served at once, for the sake of the honest among its clients.
A queue of which most is refused never has the enforcer to itself, since that would cost the node's other programs.
Queues from which connections come never rest, however many.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

MIN_THROTTLE_S = 0.001
"""The loop's timers know no shorter time: what a queue owes is added up until it is so much."""
THROTTLE_FACTOR = 8
"""How much longer than its turns a queue rests: it then has at most a ninth of the enforcer's time."""
MAX_THROTTLE_S = 0.1
"""A turn takes long where the enforcer had to wait for the CPU: the honest among a queue's clients do not pay for that
with seconds."""
MAX_LAG_S = 2.0
"""How far the timers of a pod may be behind, seconds: a flood does not hold them back any longer."""
_LEAST_REFUSED_PART = 0.25
"""What is refused rests as if others had so much to do: it then has a third of the enforcer's time, which is enough for
what the kernel's rate leaves of one source."""
_MEMORY_S = 0.02
"""How long the work for others is remembered."""


class Queue(Protocol):
    """What is served."""

    @property
    def is_mostly_refused(self) -> bool:
        """Whether most of the last packets were dropped."""

    @property
    def is_unproductive(self) -> bool:
        """Whether hardly any of the last packets released a flow."""

    @property
    def has_more(self) -> bool:
        """Whether the last turn ended at its limit, so that more packets may wait."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when packets wait."""

    def read_batch(self) -> int:
        """Evaluate some of the packets that wait."""


class Work:
    """Which part of the enforcer's time goes to queues from which connections come, lately: 0 to about 1."""

    __slots__ = ("_noted_at", "_part")

    def __init__(self) -> None:
        self._part = 0.0
        self._noted_at = 0.0

    def note(self, took_s: float, now: float) -> None:
        """Add a turn that ended now."""
        self._part = self.part(now) + took_s / _MEMORY_S
        self._noted_at = now

    def part(self, now: float) -> float:
        """Return the part."""
        return min(1.0, self._part * max(0.0, 1.0 - (now - self._noted_at) / _MEMORY_S))


class QueueService:
    """The turns of one queue. For the event loop's thread alone."""

    __slots__ = ("_behind_since", "_fd", "_loop", "_owed_s", "_queue", "_rest", "_work", "rests")

    def __init__(self, queue: Queue, loop: asyncio.AbstractEventLoop, work: Work) -> None:
        """Serve the queue from now on; `work` is that of all queues of the loop."""
        self._queue = queue
        self._loop = loop
        self._work = work
        self._fd = queue.fileno()
        self._owed_s = 0.0
        self._behind_since: float | None = None
        self._rest: asyncio.TimerHandle | None = None
        self.rests = 0
        """How often the queue had to rest."""
        loop.add_reader(self._fd, self._serve)

    def timers_now(self, now: float) -> float:
        """Return the time, monotonic seconds, by which timers of the pod's flows end.

        What a flow waits for may have arrived, and wait in the queue. So no time passes for timers while the queue is
        behind, as on a machine that is too slow for its load, up to a limit.
        """
        return now if self._behind_since is None else max(min(self._behind_since, now), now - MAX_LAG_S)

    def close(self) -> None:
        """Serve it no longer; call it before the queue is closed."""
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        else:
            self._loop.remove_reader(self._fd)

    def _serve(self) -> None:
        started = time.perf_counter()
        self._queue.read_batch()
        now = time.perf_counter()
        if not self._queue.has_more:
            self._behind_since = None
        elif self._behind_since is None:
            self._behind_since = time.monotonic()
        if self._queue.is_mostly_refused:
            self._owe((now - started) * max(_LEAST_REFUSED_PART, self._work.part(now)))
        elif self._queue.is_unproductive:
            self._owe((now - started) * self._work.part(now))
        else:
            self._work.note(now - started, now)

    def _owe(self, used_s: float) -> None:
        self._owed_s += THROTTLE_FACTOR * used_s
        if self._owed_s < MIN_THROTTLE_S:
            return
        self._loop.remove_reader(self._fd)
        self._rest = self._loop.call_later(min(self._owed_s, MAX_THROTTLE_S), self._go_on)
        self._owed_s = 0.0
        self.rests += 1

    def _go_on(self) -> None:
        self._rest = None
        self._loop.add_reader(self._fd, self._serve)
