# SPDX-License-Identifier: Apache-2.0
"""File descriptors that arrive over a socket: owned from the moment they exist in this process."""

from __future__ import annotations

import os
import socket
from types import TracebackType

from cni_plugin import messages
from enforcer_daemon.errors import NetnsError, RegistrationError
from enforcer_daemon.model import NetnsId
from enforcer_daemon.nsfs import netns_id

MAX_RECEIVED = 4
"""Room for descriptors in one read. One is right; the kernel closes what finds no room, and says so."""

_DESCRIPTOR_BYTES = 4


class Descriptors:
    """The descriptors of one request. Closed together, less those that were taken."""

    def __init__(self) -> None:
        self._owned: list[int] = []

    def __enter__(self) -> Descriptors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._owned:
            os.close(self._owned.pop())

    def __len__(self) -> int:
        return len(self._owned)

    def receive(self, connection: socket.socket, max_bytes: int) -> tuple[bytes, bool]:
        """Read once; return the bytes, and whether descriptors were lost for want of room. Raises OSError."""
        # Descriptors are closed on exec from the start: another thread may be starting a program.
        data, ancillary, flags, _ = connection.recvmsg(
            max_bytes, socket.CMSG_SPACE(MAX_RECEIVED * _DESCRIPTOR_BYTES), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(content) - len(content) % _DESCRIPTOR_BYTES
                self._owned.extend(memoryview(content[:whole]).cast("i"))
        return data, bool(flags & socket.MSG_CTRUNC)

    def only(self) -> int:
        """Return the one descriptor, still owned here; raise RegistrationError if there are none or several."""
        if len(self._owned) != 1:
            message = f"netns: the request must bring one file descriptor, not {len(self._owned)}"
            raise RegistrationError(messages.PROTOCOL_MISMATCH, message)
        return self._owned[0]

    def take(self) -> int:
        """Return the one descriptor and give it up to the caller."""
        self.only()
        return self._owned.pop()


def identify_netns(descriptor: int) -> NetnsId:
    """Return which network namespace this is; raise RegistrationError if it is none, or the daemon's own."""
    try:
        netns = netns_id(descriptor)
    except NetnsError as err:
        raise RegistrationError(messages.UNUSABLE_NETNS, f"netns: {err}") from err
    own = os.stat("/proc/self/ns/net")  # noqa: PTH116 - the counterpart of an fstat
    if netns == NetnsId(own.st_dev, own.st_ino):
        raise RegistrationError(messages.NODE_NETNS, "netns: is the node's own; enforcing there would cut it off")
    return netns
