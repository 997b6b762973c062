# SPDX-License-Identifier: Apache-2.0
"""The directory of one lab, and what labs that were killed left behind.

A lab's name starts its directory's name and the names of its network namespaces, which are removed before the
directory. The directory is locked as long as its lab lives; the kernel drops the lock however the lab ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from trireme_lab.netns import NETNS_DIR, delete_all

RUN_DIR = Path("/run")
"""A tmpfs, gone after a reboot as network namespaces are; paths in it are short enough for Unix sockets."""
_PREFIX = "trireme-lab-"


class RunDirectory:
    """A new directory for one lab, locked until `remove`."""

    def __init__(self) -> None:
        self.name = f"tl{os.getpid()}-{secrets.token_hex(2)}"
        self.path = RUN_DIR / (_PREFIX + self.name)
        # Under its final name it is never seen unlocked.
        draft = tempfile.mkdtemp(prefix=".trireme-lab-", dir=RUN_DIR)
        self._lock = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Path(draft).rename(self.path)

    def remove(self) -> None:
        """Delete the directory and give up the lock."""
        shutil.rmtree(self.path)
        os.close(self._lock)


def clean_leftovers() -> list[str]:
    """Remove what killed labs left; return their names. Labs that live are not touched."""
    cleaned = []
    for path in sorted(RUN_DIR.glob(_PREFIX + "tl*")):
        with contextlib.suppress(FileNotFoundError, BlockingIOError):  # it ended by itself just now; it lives
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                name = path.name.removeprefix(_PREFIX)
                delete_all(netns_names(name))
                shutil.rmtree(path)
                cleaned.append(name)
            finally:
                os.close(lock)
    return cleaned


def netns_names(lab: str) -> list[str]:
    """Return the network namespaces of the lab of that name, whoever made them."""
    return sorted(path.name for path in NETNS_DIR.glob(f"{lab}-*"))
