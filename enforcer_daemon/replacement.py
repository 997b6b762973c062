# SPDX-License-Identifier: Apache-2.0
"""A file that is replaced whole or not at all, and is private (0600) from its first byte.

Readers see the old content or the new; after a crash of the machine, too, unless the file need not outlive it. The
draft beside it ends in `.new`.

Source: rename(2), fsync(2): the content must be on disk before the name leads to it, and the name's directory after.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

DRAFT_SUFFIX = ".new"


class Replacement:
    """The new content of a file. A context manager: what is not committed when it ends is gone."""

    def __init__(self, path: Path, *, is_durable: bool = True) -> None:
        """Begin a draft in the file's directory; raise OSError.

        Not durable: for the run directory, which does not outlive the machine's running; the disk is not waited for.
        """
        self._path = path
        self._is_durable = is_durable
        self._draft = path.with_name(path.name + DRAFT_SUFFIX)
        self._draft.unlink(missing_ok=True)  # Of a process that died; with O_EXCL no link there is followed.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file = os.fdopen(os.open(self._draft, flags, 0o600), "wb")
        self._is_committed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        finally:
            if not self._is_committed:
                self._draft.unlink(missing_ok=True)

    def write(self, content: bytes) -> None:
        """Add to the draft; raise OSError."""
        self._file.write(content)

    def commit(self) -> None:
        """Put the draft in the file's place; raise OSError."""
        self._file.flush()
        if self._is_durable:
            os.fsync(self._file.fileno())
        self._draft.replace(self._path)
        self._is_committed = True
        if not self._is_durable:
            return
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def replace_file(path: Path, content: bytes, *, is_durable: bool = True) -> None:
    """Write a file's whole content; raise OSError, and leave the file as it was."""
    with Replacement(path, is_durable=is_durable) as file:
        file.write(content)
        file.commit()
