# SPDX-License-Identifier: Apache-2.0
"""Work of the event loop on many things, in steps: packets are evaluated between them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

SLICE_S = 0.002
"""How long the loop works before packets have their turn, seconds."""
BATCH = 32
"""What is done between two looks at the clock: some hundred microseconds."""


async def in_slices(steps: Iterable[object]) -> None:
    """Carry out the steps of an iterator, of BATCH things each, with turns for the rest of the loop between them."""
    until = time.monotonic() + SLICE_S
    for _ in steps:
        if time.monotonic() >= until:
            await asyncio.sleep(0)
            until = time.monotonic() + SLICE_S


def batches(things: Iterable[T]) -> Iterator[Sequence[T]]:
    """Return things in groups of BATCH."""
    rest = iter(things)
    while batch := tuple(islice(rest, BATCH)):
        yield batch
