# SPDX-License-Identifier: Apache-2.0
"""Log lines to a reader that may stop reading: a line that finds no room is dropped and counted, never waited for.

A container runtime or journald that does not read, as on a full disk, must not stop the packet loop. Lines are the
first thing that an overloaded enforcer sheds. Sources: pipe(7), O_NONBLOCK and PIPE_BUF; send(2), MSG_DONTWAIT.
"""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Callable

Write = Callable[[bytes], int]
"""Writes what there is room for and returns its length; raises BlockingIOError if there is none."""


class LineFile:
    """What structlog takes for a file. Not thread-safe: structlog has a lock for each file."""

    __slots__ = ("__weakref__", "_lost", "_rest", "_write", "close")

    def __init__(self, write: Write, close: Callable[[], None]) -> None:
        self._write = write
        self.close = close
        self._rest = b""
        """The end of what was written in part."""
        self._lost = 0

    def write(self, text: str) -> None:
        """Write one line with its newline, or count it as lost."""
        line = text.encode()
        try:
            if self._rest:
                self._send(self._rest)
            if self._rest:
                raise BlockingIOError
            # In one piece with the line: a note alone would fill the room that the line lacks.
            self._send(self._note() + line if self._lost else line)
            self._lost = 0
        except BlockingIOError:
            self._lost += 1
        except OSError:
            self._rest = b""  # The reader is gone for good; the daemon goes on.

    def _note(self) -> bytes:
        event = "log lines lost: standard error was not read"
        return json.dumps({"event": event, "level": "warning", "lost": self._lost}).encode() + b"\n"

    def _send(self, data: bytes) -> None:
        self._rest = data[self._write(data) :]

    def flush(self) -> None:
        """Do nothing: what could be written is written."""


def open_lines(fd: int) -> LineFile | None:
    """Return a file that never waits for the reader of a pipe or socket; None for a terminal or regular file."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(fd))
        return LineFile(lambda data: sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL), sock.close)
    if stat.S_ISFIFO(mode):
        try:
            # An open file description of its own: O_NONBLOCK on the given one would be set for its other users too.
            own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        return LineFile(lambda data: os.write(own, data), lambda: os.close(own))
    return None
