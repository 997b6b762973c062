# SPDX-License-Identifier: Apache-2.0
"""Run in the guest, by `make test-vm`: the tests that are marked `stock_kernel`, in two halves at once.

Each half has a core to itself. What it prints also stays in the results folder, should the guest's time run out. Ends
with 0 where both halves passed. With --compile, on the host: let Python and pytest write the bytecode of all that these
tests import, since the guest would take minutes for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HALVES = (("tests/netns", "tests/attacks"), ("tests/e2e",))
"""Folders; the two take about the same time."""
TEST_TIMEOUT_S = 300
_PYTEST = (*(sys.executable, "-m", "pytest"), *("-q", "-p", "no:cacheprovider", "--color", "no", "--durations", "10"))


def compile_all() -> int:
    """Compile the programs, and the tests as pytest rewrites them; give the exit status."""
    programs = ("enforcer_daemon", "cni_plugin", "trireme_lab", "triremectl")
    subprocess.run([sys.executable, "-m", "compileall", "-q", *programs, "tests"], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    collect = (sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-m", "stock_kernel")
    done = subprocess.run(
        (*collect, *(folder for half in HALVES for folder in half)),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
    return done.returncode


def main(extra: Sequence[str]) -> int:
    """Run both halves with further arguments of pytest, print what they said one after the other."""
    folder = Path(os.environ.get("VM_RESULTS", "/tmp"))
    started = time.monotonic()
    running = []
    for half in HALVES:
        log = folder / f"{Path(half[0]).name}.log"
        command = [*_PYTEST, "--timeout", str(TEST_TIMEOUT_S), "-m", "stock_kernel", *half, *extra]
        with log.open("w", encoding="utf-8") as output:
            running.append((" ".join(half), log, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)))
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
    sys.exit(compile_all() if sys.argv[1:] == ["--compile"] else main(sys.argv[1:]))
