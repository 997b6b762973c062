# SPDX-License-Identifier: Apache-2.0
"""What `make check` says of coverage: which part, what is missing, and when it fails."""

from __future__ import annotations

from typing import Any

from tests.covered import MIN_CORE_BRANCHES, report


def file(lines: tuple[int, int], branches: tuple[int, int], missing: tuple[tuple[int, int], ...] = ()) -> Any:
    summary = {
        "covered_lines": lines[0],
        "num_statements": lines[1],
        "covered_branches": branches[0],
        "num_branches": branches[1],
    }
    return {"summary": summary, "missing_branches": [list(branch) for branch in missing]}


def test_the_missing_branches_of_the_core_are_named() -> None:
    files = {
        "enforcer_daemon/packet/ip.py": file((1, 9), (99, 100), ((7, 9), (8, -1))),
        "enforcer_daemon/daemon/run.py": file((9, 10), (0, 4)),
        "enforcer_daemon/kube/client.py": file((0, 10), (0, 10)),
    }
    text, is_enough = report(files)
    assert "  enforcer_daemon/packet/ip.py: 7->9, 8->-1" in text
    assert any(line.startswith("daemon: 90.0 % of lines") for line in text)
    assert any(line.startswith("core: 99.0 % of branches") for line in text)
    assert is_enough


def test_too_little_of_either_fails() -> None:
    core = {"enforcer_daemon/packet/ip.py": file((1, 1), (int(MIN_CORE_BRANCHES) - 1, 100))}
    assert not report(core)[1]
    assert not report({"enforcer_daemon/daemon/run.py": file((1, 10), (0, 0))})[1]
