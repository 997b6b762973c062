# SPDX-License-Identifier: Apache-2.0
"""Runs one fuzz target: `python -m tests.fuzz TARGET --seconds 60`; with `--cost` it only measures known inputs.

Needs atheris (`pip install atheris`), which is no dependency of the project. What is new goes to build/fuzz, what
breaks a target to tests/fuzz/regressions, where the unit tests find it. An input that is too slow is a finding too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

WORK = Path("build/fuzz")
_SLOWER = 40
"""How much slower than its budget an input may be here: instrumented, and beside other work."""
_HANGS_S = 120
"""Wall-clock seconds after which an input hangs; what is slow shows in its CPU time, however busy the machine is."""


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--cost", action="store_true", help="measure known inputs, do not look for new ones")
    arguments = parser.parse_args()
    return cost(arguments.target) if arguments.cost else fuzz(arguments.target, arguments.seconds)


def cost(name: str) -> int:
    """Print the dearest of all known inputs, without instrumentation; 1 if one is beyond the target's budget."""
    from tests.fuzz.targets import TARGETS, cost_s, seeds

    target = TARGETS[name]
    files = [*seeds(name), *(WORK / name).glob("*")]
    dearest = sorted(((cost_s(target, path.read_bytes()), path) for path in files), reverse=True)[:5]
    for seconds, path in dearest:
        sys.stdout.write(f"{seconds * 1e3:9.3f} ms  {path}\n")
    return int(bool(dearest) and dearest[0][0] > target.budget_s)


def fuzz(name: str, seconds: int) -> int:
    """Look for inputs that break the target, for so many seconds; does not return."""
    import atheris

    with atheris.instrument_imports(include=["cni_plugin", "enforcer_daemon"]):
        from tests.fuzz import targets

    target = targets.TARGETS[name]
    found, broken = WORK / name, targets.FOLDER / "regressions" / name
    for folder in (found, broken):
        folder.mkdir(parents=True, exist_ok=True)
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={seconds}",
            f"-max_len={target.max_bytes}",
            f"-artifact_prefix={broken}/",
            f"-dict={targets.FOLDER / 'words.dict'}",
            f"-timeout={_HANGS_S}",
            "-rss_limit_mb=1024",
            "-print_final_stats=1",
            str(found),
            str(targets.FOLDER / "corpus" / name),
            str(broken),
        ],
        _bounded(lambda content: targets.cost_s(target, content, 1), target.budget_s * _SLOWER),
    )
    atheris.Fuzz()
    return 0


def _bounded(measure: Callable[[bytes], float], limit_s: float) -> Callable[[bytes], None]:
    """Run and measure; what is slow is measured again, so that a pause of the collector is no finding."""

    def one(content: bytes) -> None:
        if measure(content) > limit_s and min(measure(content) for _ in range(3)) > limit_s:
            raise AssertionError(f"takes more than {limit_s:.3f} s")

    return one


if __name__ == "__main__":
    raise SystemExit(main())
