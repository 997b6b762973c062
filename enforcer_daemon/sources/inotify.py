# SPDX-License-Identifier: Apache-2.0
"""Hears from the kernel that something in a directory changed, and costs nothing until then.

What changed is not looked at: whoever waits reads the directory anew. Source: inotify(7).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from pathlib import Path
from types import TracebackType
from typing import Self

QUIET_S = 0.005
"""After how long without a further change the gathered ones count, seconds."""
GATHER_S = 0.02
"""How long changes are gathered at most, seconds."""

_libc = ctypes.CDLL(None, use_errno=True)
_MODIFY, _ATTRIB, _CLOSE_WRITE, _MOVED_FROM, _MOVED_TO, _CREATE = 0x2, 0x4, 0x8, 0x40, 0x80, 0x100  # linux/inotify.h
_DELETE, _DELETE_SELF, _MOVE_SELF, _ONLYDIR = 0x200, 0x400, 0x800, 0x100_0000
_MASK = (
    _MODIFY
    | _ATTRIB
    | _CLOSE_WRITE
    | _MOVED_FROM
    | _MOVED_TO
    | _CREATE
    | _DELETE
    | _DELETE_SELF
    | _MOVE_SELF
    | _ONLYDIR
)
_READ_BYTES = 65_536


class DirectoryWatch:
    """Watches one directory, not below it, on the running event loop."""

    def __init__(self, directory: Path) -> None:
        """Raise OSError if there is no such directory, or no inotify instance or watch is left."""
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._fd = _require(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), directory)
        try:
            _require(_libc.inotify_add_watch(self._fd, os.fsencode(directory), _MASK), directory)
            self._loop.add_reader(self._fd, self._read)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching; once."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    async def wait(self, timeout_s: float) -> bool:
        """Wait for changes, and until they pause; tell whether there were any in that time."""
        if not await self._is_changed(timeout_s):
            return False
        end = self._loop.time() + GATHER_S
        while self._loop.time() < end:
            self._changed.clear()
            if not await self._is_changed(QUIET_S):
                break
        self._changed.clear()
        return True

    async def _is_changed(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _read(self) -> None:
        try:
            while os.read(self._fd, _READ_BYTES):
                self._changed.set()
        except BlockingIOError:
            return


def _require(result: int, directory: Path) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(directory))
    return result
