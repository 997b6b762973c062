# SPDX-License-Identifier: Apache-2.0
"""Print which part of the daemon's lines and of the core's branches unit and property tests run; fail below the limits.

`make check` measures with coverage.py, and then runs `python -m tests.covered`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DAEMON = "enforcer_daemon/daemon/"
MIN_DAEMON_LINES = 40.0
"""Percent of the composition root's lines."""
CORE = tuple(f"enforcer_daemon/{package}/" for package in ("datapath", "handshake", "policy", "packet"))
MIN_CORE_BRANCHES = 97.0
"""Percent of the core's branches. The aim is 100."""


def percent(covered: int, total: int) -> float:
    """Return the covered part; all of nothing is covered."""
    return 100.0 * covered / total if total else 100.0


def lines_of(files: dict[str, Any]) -> float:
    """Return which percentage of the files' lines ran."""
    totals = [file["summary"] for file in files.values()]
    return percent(sum(each["covered_lines"] for each in totals), sum(each["num_statements"] for each in totals))


def branches_of(files: dict[str, Any]) -> float:
    """Return which percentage of the files' branches ran."""
    totals = [file["summary"] for file in files.values()]
    return percent(sum(each["covered_branches"] for each in totals), sum(each["num_branches"] for each in totals))


def missing_branches(files: dict[str, Any]) -> list[str]:
    """Return one line for each file with branches that did not run: from which line to which; a minus is an exit."""
    return [
        f"  {path}: {', '.join(f'{start}->{end}' for start, end in file['missing_branches'])}"
        for path, file in sorted(files.items())
        if file["missing_branches"]
    ]


def report(files: dict[str, Any]) -> tuple[list[str], bool]:
    """Return the lines to print, and whether the limits hold."""
    daemon = {path: file for path, file in files.items() if path.startswith(DAEMON)}
    core = {path: file for path, file in files.items() if path.startswith(CORE)}
    daemon_lines, core_branches = lines_of(daemon), branches_of(core)
    text = [
        *(f"  {path}: {lines_of({path: file}):.0f} %" for path, file in sorted(daemon.items())),
        f"daemon: {daemon_lines:.1f} % of lines (at least {MIN_DAEMON_LINES:.0f})",
        *missing_branches(core),
        f"core: {core_branches:.1f} % of branches (at least {MIN_CORE_BRANCHES:.0f})",
    ]
    return text, daemon_lines >= MIN_DAEMON_LINES and core_branches >= MIN_CORE_BRANCHES


def main() -> None:
    """Read what coverage.py measured last, print the report, and exit with 1 below a limit."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "coverage.json"
        command = [sys.executable, "-m", "coverage", "json", "--quiet", "-o", str(path)]
        subprocess.run(command, check=True)
        files = json.loads(path.read_bytes())["files"]
    text, is_enough = report(files)
    sys.stdout.write("\n".join([*text, ""]))
    sys.exit(0 if is_enough else 1)


if __name__ == "__main__":
    main()
