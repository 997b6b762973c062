# SPDX-License-Identifier: Apache-2.0
"""Named network namespaces, as ip-netns(8) keeps them, and running things inside them."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pyroute2 import netns

from enforcer_daemon.dataplane.netns import new_netns, open_in
from trireme_lab.errors import LabError
from trireme_lab.links import Step, carry_out

NETNS_DIR = Path("/run/netns")
_BRIDGE_FILTER = Path("/proc/sys/net/bridge")
_COMMAND_TIMEOUT_S = 180.0

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)


def netns_path(name: str) -> Path:
    """Return where the namespace is mounted."""
    return NETNS_DIR / name


def exec_prefix(name: str) -> list[str]:
    """Return the words that, before a command, run it inside the namespace (and as the same process)."""
    return ["ip", "netns", "exec", name]


def in_netns(name: str, factory: Callable[[], T]) -> T:
    """Call `factory` inside the namespace and return its result; what it opens there stays there.

    Raises LabError if there is no such namespace, and whatever the factory raises.
    """
    try:
        descriptor = os.open(netns_path(name), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        raise LabError(f"network namespace {name}: {err.strerror}") from err
    try:
        return open_in(descriptor, factory)
    finally:
        os.close(descriptor)


def open_socket(name: str, family: int, kind: int, protocol: int = 0) -> socket.socket:
    """Return a new socket that lives in the namespace. The caller owns it."""
    return in_netns(name, lambda: socket.socket(family, kind, protocol))


def write_sysctls(name: str, values: Mapping[str, str]) -> None:
    """Set kernel parameters (paths below /proc/sys) in the namespace."""

    def write() -> None:
        for path, value in values.items():
            (Path("/proc/sys") / path).write_text(value, encoding="ascii")

    in_netns(name, write)


def load_bridge_filter() -> None:
    """Have bridged packets pass the node's rules, as Kubernetes demands of a node; LabError where the kernel cannot.

    Without it the answer of a pod that a Service led to, on the client's own bridge, comes under the pod's own address.
    """
    if not _BRIDGE_FILTER.is_dir():
        run(("modprobe", "br_netfilter"))


def run(argv: Sequence[str], stdin: str = "") -> str:
    """Run a command and return its output; raise LabError with what it wrote to standard error."""
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, text=True, check=False, timeout=_COMMAND_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise LabError(f"{' '.join(argv)}: {err}") from err
    if done.returncode != 0:
        raise LabError(f"{' '.join(argv)}: exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def add_netns(name: str) -> None:
    """Make a namespace with that name."""
    descriptor = new_netns()
    try:
        # pyroute2's `create` would fork, which a process with threads must not.
        open_in(descriptor, lambda: netns.attach(str(netns_path(name)), "thread-self", _libc))
    except OSError as err:
        raise LabError(f"network namespace {name}: {os.strerror(err.errno or 0)}") from err
    finally:
        os.close(descriptor)


def set_up(name: str, steps: Iterable[Step]) -> None:
    """Make links, addresses and routes in the namespace."""
    in_netns(name, lambda: carry_out(steps))


def delete_all(names: Iterable[str]) -> None:
    """Remove the namespaces that exist among `names`, with every link inside them."""
    for name in names:
        if netns_path(name).exists():
            netns.remove(str(netns_path(name)), _libc)
