# SPDX-License-Identifier: Apache-2.0
"""Files with keys: read only where no stranger on the node could have read or changed them."""

from __future__ import annotations

import stat
from pathlib import Path

from enforcer_daemon.errors import SettingsError


def read_private(path: Path) -> bytes:
    """Read a file with a key; raise SettingsError if others may use it, and OSError where it cannot be read.

    Its group may read it: so are the Secrets that kubelet mounts for a container.
    """
    with path.open("rb") as file:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & (stat.S_IRWXO | stat.S_IWGRP):
            raise SettingsError(f"{path}: others than its owner may use this key (mode {mode:04o}): chmod 0600 {path}")
        return file.read()
