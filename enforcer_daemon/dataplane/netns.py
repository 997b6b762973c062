# SPDX-License-Identifier: Apache-2.0
"""Network namespaces: work inside one, tell one from another, read and set what belongs to one.

setns changes a thread, not a process; so all work inside another namespace happens in a thread made for it and thrown
away after it. A socket or a child process that is made there stays there.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from enforcer_daemon.errors import EnforcerError, NetnsError
from enforcer_daemon.nsfs import CLONE_NEWNET

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)

SYSCTL_DIR = Path("/proc/sys/net")
HOST_SYSCTL_DIR = Path("/host/proc/sys/net")
"""Where the chart mounts the node's: a container cannot write its own."""

CONNTRACK_SYSCTLS = {
    # A frame in the SYN and a proof in the ACK are not in the window that conntrack reckons with.
    "nf_conntrack_tcp_be_liberal": "1",
    # At 4,000 connections a second the default of 120 s fills the table within a minute.
    "nf_conntrack_tcp_timeout_time_wait": "5",
    # Half a connection may be silent as long as a whole one (the default of timeout_established). The default of 60 s
    # forgets with it that the connection was evaluated, and what the other half says then is refused.
    "nf_conntrack_tcp_timeout_close_wait": "432000",
}


class _Errand(threading.Thread, Generic[T]):
    """One piece of work in a thread of its own, after `enter` has put the thread into its namespace."""

    def __init__(self, enter: Callable[[], None], work: Callable[[], T]) -> None:
        super().__init__(name="netns", daemon=True)
        self._enter = enter
        self._work = work
        self._results: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._enter()
            self._results.append(self._work())
        except BaseException as err:  # noqa: BLE001 - raised again in the thread that waits
            self._error = err

    def result(self) -> T:
        self.start()
        self.join()
        error, self._error = self._error, None  # no cycle of error, traceback and thread, which would hold descriptors
        if error is not None:
            raise error
        return self._results.pop()


def open_in(netns_fd: int, factory: Callable[[], T]) -> T:
    """Return what `factory` makes inside the namespace; it runs in another thread, while the caller waits.

    Raises NetnsError if the namespace cannot be entered, and whatever the factory raises.
    """

    def enter() -> None:
        if _libc.setns(netns_fd, CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise NetnsError(f"network namespace (descriptor {netns_fd}) cannot be entered: {os.strerror(code)}")

    return _Errand(enter, factory).result()


def new_netns() -> int:
    """Make a network namespace without a name and return its descriptor; it is gone when the caller closes that."""

    def enter() -> None:
        if _libc.unshare(CLONE_NEWNET) != 0:
            raise NetnsError(f"a network namespace cannot be made: {os.strerror(ctypes.get_errno())}")

    return _Errand(enter, current_netns).result()


def current_netns() -> int:
    """Return a descriptor of the calling thread's network namespace; the caller closes it."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def read_sysctl(netns_fd: int, name: str, directory: Path = SYSCTL_DIR) -> str:
    """Read a setting below net, such as `netfilter.nf_conntrack_max`; raise NetnsError that names it."""
    try:
        return open_in(netns_fd, lambda: _sysctl_path(name, directory).read_text(encoding="ascii").strip())
    except OSError as err:
        raise NetnsError(f"net.{name}: cannot be read: {err.strerror}") from err


def write_sysctl(netns_fd: int, name: str, value: str, directory: Path = SYSCTL_DIR) -> None:
    """Set a setting below net; raise NetnsError that names it (a container's own /proc/sys is read-only)."""

    def write() -> None:
        # Unbuffered, so that the kernel's refusal is an error here and not at close; and never O_CREAT.
        fd = os.open(_sysctl_path(name, directory), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode("ascii"))
        finally:
            os.close(fd)

    try:
        open_in(netns_fd, write)
    except OSError as err:
        raise NetnsError(f"net.{name}: cannot be set to {value}: {err.strerror}") from err


def tune_conntrack(netns_fd: int, directory: Path | None = None) -> tuple[str, ...]:
    """Set the pod's conntrack as the handshake wants it; return one message for each setting that was refused.

    A refusal is not an error: enforcement holds without, but a busy pod may fill its conntrack table.
    """
    if directory is None:
        directory = HOST_SYSCTL_DIR if HOST_SYSCTL_DIR.is_dir() else SYSCTL_DIR
    refusals: list[str] = []
    for name, value in CONNTRACK_SYSCTLS.items():
        try:
            if read_sysctl(netns_fd, f"netfilter.{name}", directory) != value:
                write_sysctl(netns_fd, f"netfilter.{name}", value, directory)
        except EnforcerError as err:
            refusals.append(str(err))
    return tuple(refusals)


def _sysctl_path(name: str, directory: Path) -> Path:
    # The kernel resolves /proc/sys/net by the namespace of the thread that opens it, wherever it is mounted.
    return directory.joinpath(*name.split("."))
