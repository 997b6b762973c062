# SPDX-License-Identifier: Apache-2.0
"""The fuzz targets by name: each takes any bytes and raises for nothing but a broken promise.

A target feeds its decoder, lets the documented error pass for an answer, and asserts what must hold of a value: that
encoding gives it back, and that it is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import datagrams, decoders, documents, exchange

FOLDER = Path(__file__).parent
PACKET_PATH_S = 1e-3
"""CPU seconds that one input may cost where a packet brings it."""
CONTROL_PATH_S = 0.25
"""CPU seconds that one input of a file or a socket may cost; inputs are as small as a fuzzer makes them."""


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder under test."""

    run: Callable[[bytes], object]
    """Raises what is a finding."""
    budget_s: float
    max_bytes: int = 4_096


TARGETS = {
    "packet": Target(decoders.packet, PACKET_PATH_S),
    "frame": Target(decoders.frame, PACKET_PATH_S),
    "credential": Target(decoders.credential, PACKET_PATH_S, 8_192),
    "token": Target(decoders.token, PACKET_PATH_S, 8_192),
    "message": Target(decoders.message, CONTROL_PATH_S),
    "netlink": Target(decoders.netlink, CONTROL_PATH_S),
    "policy": Target(documents.policy, CONTROL_PATH_S),
    "settings": Target(documents.settings, CONTROL_PATH_S),
    "exchange": Target(exchange.exchange, CONTROL_PATH_S, 512),
    "datagrams": Target(datagrams.datagrams, CONTROL_PATH_S, 512),
}


def seeds(name: str) -> list[Path]:
    """Give the files that a target is started with, and those that once broke it."""
    return [*regressions(name), *sorted((FOLDER / "corpus" / name).glob("*"))]


def regressions(name: str) -> list[Path]:
    """Give the files that once broke a target."""
    return sorted((FOLDER / "regressions" / name).glob("*"))


def cost_s(target: Target, content: bytes, repeat: int = 5) -> float:
    """Give the least CPU seconds of this thread for one input: what it costs, whatever else the machine does."""
    best = float("inf")
    for _ in range(repeat):
        begin = time.thread_time()
        target.run(content)
        best = min(best, time.thread_time() - begin)
        if best < target.budget_s / 4:
            break
    return best
