# SPDX-License-Identifier: Apache-2.0
"""Run nft and iptables inside a network namespace."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.errors import DataplaneError

_TIMEOUT_S = 20.0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run_in(netns_fd: int, command: Sequence[str], text: str = "") -> str:
    """Run a tool inside the namespace with `text` as its input and return its output.

    A child belongs to the namespace of the thread that starts it. Raises DataplaneError with what the tool said.
    """
    return open_in(netns_fd, lambda: run(command, text))


def run(command: Sequence[str], text: str = "") -> str:
    """Run a tool in the current namespace; the same errors."""
    environment = {"PATH": os.environ.get("PATH", _PATH), "LC_ALL": "C"}
    try:
        result = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise DataplaneError(f"{command[0]}: {err}") from err
    if result.returncode != 0:
        complaint = " ".join(result.stderr.split()) or "no message"
        raise DataplaneError(f"{command[0]} failed with status {result.returncode}: {complaint}")
    return result.stdout
