# SPDX-License-Identifier: Apache-2.0
"""Work that objects of a namespace cause: in threads, each namespace by itself, and no more than its budget.

The loop that serves the pods' queues never decodes or compiles. The interpreter lets one thread run at a time, so even
work in a thread slows the loop while it lasts; a namespace that changes rarely is served at once, and one whose objects
change all the time gets a small part of the processor. Token bucket: a burst of processor time, refilled at a rate.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from enforcer_daemon.ratelimiter import RateLimiter

T = TypeVar("T")
BURST_S = 2.0
"""Processor time that a namespace may take at once: enough for the largest that is compiled at all."""
RATE = 0.02
"""Part of one processor that a namespace gets for good."""
MAX_BUCKETS = 4_096
"""Namespaces whose budgets are remembered; the fullest bucket makes room."""
_THREADS = 4
_LARGE_S = 0.02
"""Work that makes so many objects that no search for cyclic garbage should walk them, processor seconds."""
SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep the interpreter while another waits for it, seconds; Python's default is ten times this,
and a packet would wait that long."""


class Turns:
    """Runs work for namespaces. For the event loop's thread alone; the work itself runs in threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, RateLimiter] = {}
        self._running = 0
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="objects")

    def wait_s(self, namespace: str) -> float:
        """Return how long a namespace has to wait for its next work, seconds."""
        bucket = self._buckets.get(namespace)
        return 0.0 if bucket is None else bucket.wait_s(self._clock())

    async def run(self, namespace: str, work: Callable[[], T], *, is_urgent: bool = False) -> T:
        """Run the work when the budget allows, or at once if urgent; either is charged."""
        if not is_urgent and (wait_s := self.wait_s(namespace)):
            await asyncio.sleep(wait_s)

        spent: list[float] = []

        def timed() -> T:
            started = time.thread_time()
            try:
                return work()
            finally:
                spent.append(time.thread_time() - started)

        self._running += 1
        gc.disable()  # A search through what is just being made would hold up every thread, again and again.
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, timed)
        finally:
            self._running -= 1
            if not self._running:
                if sum(spent) > _LARGE_S:
                    # Objects and what is compiled of them are trees: what goes out of use is freed without a search.
                    gc.freeze()
                gc.enable()
            self._charge(namespace, sum(spent))

    def _charge(self, namespace: str, taken_s: float) -> None:
        now = self._clock()
        bucket = self._buckets.get(namespace)
        if bucket is None:
            if len(self._buckets) >= MAX_BUCKETS:
                del self._buckets[max(self._buckets, key=lambda name: self._buckets[name].refill(now))]
            bucket = self._buckets[namespace] = RateLimiter(RATE, BURST_S, now)
        bucket.spend(now, taken_s)

    def close(self) -> None:
        """Start no more work; what runs ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)
