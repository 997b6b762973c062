# SPDX-License-Identifier: Apache-2.0
"""Deletions that the plugin left on disk while the daemon was down; carried out before the daemon serves."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from cni_plugin import messages
from enforcer_daemon.errors import EnforcerError
from enforcer_daemon.model import AttachmentId
from enforcer_daemon.registration.request import decode_attachment

MAX_FILE_BYTES = 4096
"""A `delete` takes under 400."""
ABANDONED_AFTER_S = 60.0
"""A plugin writes its file in milliseconds; one that is unfinished after this was killed."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Drained:
    """What became of the queue."""

    deleted: int = 0
    failed: int = 0
    """Left in the queue: the registrar refused."""
    unreadable: int = 0
    """Removed: no deletion can be read from them."""


async def drain(directory: Path, delete: Callable[[AttachmentId], Awaitable[None]]) -> Drained:
    """Carry out every queued deletion and remove its file. Can be repeated at any time; an absent queue is empty."""
    deleted = failed = unreadable = 0
    for path in _queued(directory):
        if path.name.startswith("."):
            _remove_abandoned(path)
            continue
        try:
            attachment = _read(path)
        except FileNotFoundError:  # its plugin reached us after all, and took it back
            continue
        except (OSError, messages.MessageError) as err:
            _log.warning("queued deletion unreadable", path=str(path), problem=str(err))
            unreadable += 1
        else:
            try:
                await delete(attachment)
            except EnforcerError as err:
                _log.warning("queued deletion failed", attachment=str(attachment), problem=str(err))
                failed += 1
                continue
            deleted += 1
        _remove(path)
    return Drained(deleted, failed, unreadable)


def _queued(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _read(path: Path) -> AttachmentId:
    if path.exists() and not path.is_file():
        raise messages.MessageError("queued deletion: is not a file")
    with path.open("rb") as file:
        request = messages.decode_request(file.read(MAX_FILE_BYTES))
    if not isinstance(request, messages.Delete):
        raise messages.MessageError("operation: must be delete")
    return decode_attachment(request.attachment)


def _remove_abandoned(path: Path) -> None:
    try:
        age_s = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return
    if age_s > ABANDONED_AFTER_S:
        _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as err:  # a directory, say; to delete an attachment again does no harm
        _log.warning("queued deletion stays", path=str(path), problem=err.strerror)
