# SPDX-License-Identifier: Apache-2.0
"""Run in the guest, by `make test-vm`: the tests that are marked `stock_kernel`, two files at a time.

Each of two workers has a core to itself, and takes the next file when it is done with one. What pytest prints stays
in the results folder, should the guest's time run out. Ends with 0 where all files passed. With --prepare, on the host:
list the files, and let Python and pytest write the bytecode of all that these tests import, since the guest would take
minutes for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))

from tests.vm.boot import RESULTS  # noqa: E402 - found by the path of this program alone

FOLDERS = ("tests/netns", "tests/attacks", "tests/e2e")
LONGEST = ("tests/e2e/test_netem.py", "tests/attacks/test_ipvs.py", "tests/netns/test_rules.py")
"""Files that begin first, so that none is left alone at the end."""
WORKERS = 2
TEST_TIMEOUT_S = 600
"""For a test that stands still; no test takes so long for being slow."""
_LIST = "files"
_PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color", "no", "-m", "stock_kernel")
_IN_GUEST = ("-p", "tests.vm.no_skips", "--durations", "5", "--timeout", str(TEST_TIMEOUT_S))


@dataclass(frozen=True)
class Done:
    """What came of one file."""

    file: str
    status: int
    log: Path

    @property
    def line(self) -> str:
        """Return the file, what came of it, and pytest's own last line."""
        words = self.log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        return f"{'passed' if self.status == 0 else f'failed ({self.status})'}: {self.file}: {words}"


def prepare() -> int:
    """Compile the programs, and the tests as pytest rewrites them; list the files; return the exit status."""
    programs = ("enforcer_daemon", "cni_plugin", "trireme_lab", "triremectl")
    subprocess.run([sys.executable, "-m", "compileall", "-q", *programs, "tests"], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    collect = (*_PYTEST, "--collect-only", *FOLDERS)
    done = subprocess.run(collect, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        return done.returncode
    found = dict.fromkeys(line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line)
    RESULTS.mkdir(parents=True, exist_ok=True)
    ordered = [*(file for file in LONGEST if file in found), *(file for file in found if file not in LONGEST)]
    (RESULTS / _LIST).write_text("".join(f"{file}\n" for file in ordered))
    return 0


def main(extra: Sequence[str]) -> int:
    """Run all files with further arguments of pytest; print what failed, and a line for each file."""
    folder = Path(os.environ.get("VM_RESULTS", RESULTS))
    started = time.monotonic()
    files = (folder / _LIST).read_text().split()
    with ThreadPoolExecutor(WORKERS) as executor:
        results = list(executor.map(lambda file: _run(file, folder, extra), files))
    for result in results:
        if result.status:
            sys.stdout.write(f"== {result.file}\n{result.log.read_text(encoding='utf-8', errors='replace')}\n")
    sys.stdout.write("".join(f"{result.line}\n" for result in results))
    failed = [result.file for result in results if result.status]
    took = f"after {time.monotonic() - started:.0f} s on kernel {os.uname().release}"
    sys.stdout.write(f"== {len(failed)} of {len(results)} files failed, {took}\n")
    return 1 if failed else 0


def _run(file: str, folder: Path, extra: Sequence[str]) -> Done:
    log = folder / f"{Path(file).parent.name}-{Path(file).stem}.log"
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [*_PYTEST, *_IN_GUEST, file, *extra], stdout=output, stderr=subprocess.STDOUT, check=False
        )
    result = Done(file, done.returncode, log)
    sys.stdout.write(f"{result.line}\n")
    sys.stdout.flush()
    return result


if __name__ == "__main__":
    sys.exit(prepare() if sys.argv[1:] == ["--prepare"] else main(sys.argv[1:]))
