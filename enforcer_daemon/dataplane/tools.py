# SPDX-License-Identifier: Apache-2.0
"""Run nft and iptables inside a network namespace, with a limit of memory and of time."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Sequence

from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.errors import DataplaneError

_TIMEOUT_S = 20.0
MAX_CHILD_BYTES = 256 * 1024 * 1024
"""Address space of a tool. nft takes some 6 KB for a rule and 700 bytes for an element of a set; the chart's limit
holds for the daemon and its tools together."""
_MAX_COMPLAINT = 2_048
"""Characters of what a tool says; nft repeats the rule that it refuses."""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run_in(netns_fd: int, command: Sequence[str], text: str = "") -> str:
    """Run a tool inside the namespace with `text` as its input and return its output.

    A child belongs to the namespace of the thread that starts it. Raises DataplaneError with what the tool said.
    """
    return open_in(netns_fd, lambda: run(command, text))


def run(command: Sequence[str], text: str = "") -> str:
    """Run a tool in the current namespace; the same errors."""
    environment = {"PATH": os.environ.get("PATH", _PATH), "LC_ALL": "C"}
    pipe = subprocess.PIPE
    try:
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as child:
            try:
                # Before it gets its input, which is what it may take memory for.
                resource.prlimit(child.pid, resource.RLIMIT_AS, (MAX_CHILD_BYTES, MAX_CHILD_BYTES))
                output, errors = child.communicate(text, timeout=_TIMEOUT_S)
            except BaseException:
                child.kill()
                raise
    except (OSError, subprocess.TimeoutExpired) as err:
        raise DataplaneError(f"{command[0]}: {err}") from err
    if child.returncode != 0:
        complaint = " ".join(errors.split())[:_MAX_COMPLAINT] or "no message"
        raise DataplaneError(f"{command[0]} failed with status {child.returncode}: {complaint}")
    return output
