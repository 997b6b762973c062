# SPDX-License-Identifier: Apache-2.0
"""Tools run with a limit of memory and of time, and say what went wrong."""

from __future__ import annotations

import sys

import pytest

from enforcer_daemon.dataplane import tools
from enforcer_daemon.dataplane.tools import run
from enforcer_daemon.errors import DataplaneError

_TAKE = "import sys; size = int(sys.stdin.read()); taken = bytearray(size); print(len(taken))"


def test_a_tool_gets_its_input_and_gives_its_output() -> None:
    assert run((sys.executable, "-c", _TAKE), "1000") == "1000\n"


def test_a_tool_that_takes_too_much_memory_fails() -> None:
    with pytest.raises(DataplaneError, match="MemoryError"):
        run((sys.executable, "-c", _TAKE), str(tools.MAX_CHILD_BYTES))


def test_a_tool_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_TIMEOUT_S", 0.1)
    with pytest.raises(DataplaneError, match="timed out"):
        run((sys.executable, "-c", "import time; time.sleep(60)"))


def test_what_a_tool_says_is_cut() -> None:
    with pytest.raises(DataplaneError) as failed:
        run((sys.executable, "-c", "import sys; sys.exit('x' * 100_000)"))
    assert len(str(failed.value)) < 3_000


def test_a_tool_that_is_missing_is_an_error() -> None:
    with pytest.raises(DataplaneError, match="no-such-tool"):
        run(("no-such-tool",))
