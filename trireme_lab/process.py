# SPDX-License-Identifier: Apache-2.0
"""Processes of a lab: they die with it, write to a file, and are no part of the terminal's process group."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from trireme_lab.errors import LabError
from trireme_lab.netns import exec_prefix

_STOP_TIMEOUT_S = 5.0
_POLL_S = 0.01
# The kernel kills the process when the thread that started it ends, also when the lab itself was killed. It does so
# only from the moment it is asked to: a program whose lab ended before that finds another parent, and does not start.
_DIE_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"']
_TAIL_LINES = 30


class NetnsProcess:
    """One running program inside a network namespace. Start it from a thread that outlives it."""

    def __init__(self, netns: str, argv: Sequence[str], output: Path) -> None:
        """Start the program; standard output and error go to the end of `output`."""
        self._output = output
        with output.open("ab") as sink:
            try:
                self._process = subprocess.Popen(
                    [*_DIE_WITH_PARENT, str(os.getpid()), *exec_prefix(netns), *argv],
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches the lab alone, which then stops its processes in order
                )
            except OSError as err:
                raise LabError(f"{argv[0]}: {err}") from err

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the program alone; nothing happens if it has ended."""
        if not self._has_ended():
            os.kill(self._process.pid, number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the program with all it started, by force after five seconds; return its exit status."""
        self.send(number)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while not self._has_ended() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if self._process.returncode is None:
            # Not reaped yet, so the number still names this group alone: the program and whatever it left behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def _has_ended(self) -> bool:
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, timeout_s: float) -> int:
        """Wait for the end; raise LabError if it takes longer."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as err:
            raise LabError(f"process {self.pid}: still runs after {timeout_s} s") from err

    def tail(self, lines: int = _TAIL_LINES) -> str:
        """Return the last lines that it wrote."""
        return "\n".join(self._output.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
