# SPDX-License-Identifier: Apache-2.0
# pathlib would take longer to import than the call takes:
# ruff: noqa: PTH102, PTH104, PTH108, PTH118, PTH123, PTH208
"""Deletions that wait on disk for the daemon: a DEL must succeed while it is down, and must not be lost.

One file an attachment in RUN_DIR/deletions, its content the `delete` request. The daemon carries them out, and removes
the files, before it serves.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cni_plugin import messages

if TYPE_CHECKING:
    from cni_plugin.messages import Attachment

DIRECTORY = "deletions"
MAX_QUEUED = 4096
"""Beyond it deletions are not kept; the daemon still finds endpoints whose namespace is gone."""


class QueueFullError(Exception):
    """Too many deletions wait already."""


def enqueue(run_dir: str, attachment: Attachment) -> str:
    """Leave the deletion for the daemon; return the file's path. Raises OSError, QueueFullError.

    Written under another name and renamed, so that the daemon never reads half of it. An absent RUN_DIR is not made:
    without it no daemon has run since the node started, so nothing is registered.
    """
    directory = os.path.join(run_dir, DIRECTORY)
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        if len(os.listdir(directory)) >= MAX_QUEUED:
            raise QueueFullError(f"{directory}: has {MAX_QUEUED} files already") from None
    path = os.path.join(directory, attachment.file_name)
    temporary = f"{directory}/.{os.getpid()}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(messages.encode_request(messages.Delete(attachment)))
        os.rename(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    return path


def remove(path: str) -> None:
    """Take the deletion back, where the daemon has not done so."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
