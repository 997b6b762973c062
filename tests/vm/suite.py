# SPDX-License-Identifier: Apache-2.0
"""Run in the guest, by `make test-vm`: the tests that are marked `stock_kernel`, of tests/netns and tests/e2e at once.

Each half has a core to itself. What it prints also stays in the results folder, should the guest's time run out. Ends
with 0 where both halves passed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HALVES = ("tests/netns", "tests/e2e")
TEST_TIMEOUT_S = 300
_PYTEST = (*(sys.executable, "-m", "pytest"), *("-q", "-p", "no:cacheprovider", "--color", "no", "--durations", "10"))


def main(extra: Sequence[str]) -> int:
    """Run both halves with further arguments of pytest, print what they said one after the other."""
    folder = Path(os.environ.get("VM_RESULTS", "/tmp"))
    started = time.monotonic()
    running = []
    for half in HALVES:
        log = folder / f"{Path(half).name}.log"
        command = [*_PYTEST, "--timeout", str(TEST_TIMEOUT_S), "-m", "stock_kernel", half, *extra]
        with log.open("w", encoding="utf-8") as output:
            running.append((half, log, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)))
    statuses = {}
    for half, log, process in running:
        statuses[half] = process.wait()
        sys.stdout.write(f"== {half}\n{log.read_text(encoding='utf-8', errors='replace')}\n")
    summary = ", ".join(
        f"{half} {'passed' if status == 0 else f'failed ({status})'}" for half, status in statuses.items()
    )
    sys.stdout.write(f"== {summary}, after {time.monotonic() - started:.0f} s on kernel {os.uname().release}\n")
    return max(statuses.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
