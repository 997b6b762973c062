# SPDX-License-Identifier: Apache-2.0
"""The shipped demo as people run it: what it says, and that nothing of it is left afterwards, nor after Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from enforcer_daemon.dataplane.netns import new_netns
from trireme_lab.netns import NETNS_DIR
from trireme_lab.rundir import RUN_DIR

pytestmark = pytest.mark.kernel

TIMEOUT_S = 60


@pytest.fixture
def machine() -> Iterator[int]:
    """Yield an empty network namespace to run in, so that what is left in it is the demo's."""
    netns = new_netns()
    try:
        yield netns
    finally:
        os.close(netns)


@contextmanager
def _demo(machine: int, plugin: Path) -> Iterator[subprocess.Popen[str]]:
    triremectl = [sys.executable, "-m", "triremectl", "lab", "run", "--plugin", str(plugin), "demo"]
    with subprocess.Popen(
        ["nsenter", f"--net=/proc/self/fd/{machine}", *triremectl],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[machine],
    ) as demo:
        try:
            yield demo
        finally:
            if demo.poll() is None:
                demo.kill()


def _inside(machine: int, *argv: str) -> str:
    """Run a command in the network namespace."""
    return subprocess.run(
        ["nsenter", f"--net=/proc/self/fd/{machine}", *argv],
        pass_fds=[machine],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def _traces(pid: int) -> list[str]:
    """What is left of the lab that a process made: namespaces, directories, processes that name it."""
    name = f"tl{pid}-"
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it ended while we looked
    return [
        *(str(path) for path in NETNS_DIR.glob(f"{name}*")),
        *(str(path) for path in RUN_DIR.glob(f"*{name}*")),
        *(command for command in commands if name in command),
    ]


def _assert_untouched(machine: int) -> None:
    links = [line.split(":")[1].strip() for line in _inside(machine, "ip", "-o", "link").splitlines()]
    assert links == ["lo"]
    assert _inside(machine, "nft", "list", "ruleset") == ""
    assert "-A" not in _inside(machine, "iptables-save") + _inside(machine, "iptables-legacy-save")
    assert _inside(machine, "ip", "route") == ""


def test_two_demos_side_by_side_succeed_and_leave_nothing(machine: int, plugin: Path) -> None:
    with _demo(machine, plugin) as one, _demo(machine, plugin) as other:
        results = [demo.communicate(timeout=TIMEOUT_S) for demo in (one, other)]
    for demo, (output, errors) in zip((one, other), results, strict=True):
        last = re.fullmatch(r"(\d+) of (\d+) flows as expected", output.splitlines()[-1])
        assert last is not None, output + errors
        assert last[1] == last[2] != "0", output
        assert demo.returncode == 0
        assert errors == ""
        assert _traces(demo.pid) == []
    _assert_untouched(machine)


@pytest.mark.parametrize("when", ["at the first word", "amid the flows"])
def test_ctrl_c_leaves_nothing(machine: int, plugin: Path, when: str) -> None:
    with _demo(machine, plugin) as demo:
        assert demo.stdout is not None
        wanted = "A shop on two nodes" if when == "at the first word" else "2. "
        for line in demo.stdout:
            if wanted in line:
                break
        assert _traces(demo.pid) != []
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=TIMEOUT_S)
    assert errors.strip().splitlines()[-1] == "interrupted"
    assert demo.returncode == 128 + signal.SIGINT
    assert _traces(demo.pid) == []
    _assert_untouched(machine)
