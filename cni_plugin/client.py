# SPDX-License-Identifier: Apache-2.0
# pathlib would take longer to import than the call takes:
# ruff: noqa: PTH118
"""The plugin's side of the registration socket: one request, one reply, one deadline for all attempts together."""

from __future__ import annotations

import errno
import os
import socket
import time
from typing import TYPE_CHECKING

from cni_plugin import messages

if TYPE_CHECKING:
    from cni_plugin.messages import Reply, Request

SOCKET_NAME = "registration.sock"
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.25
"""Between attempts; doubled from the first one on. A daemon that restarts is met soon after it listens."""


class UnreachableError(Exception):
    """No daemon took the request before the deadline; the text says what was last seen."""


class ProtocolError(Exception):
    """The daemon's answer cannot be read: another version, or not a daemon."""


def call(run_dir: str, request: Request, timeout_s: float, netns_fd: int | None = None) -> Reply:
    """Send the request until a daemon answers it for good.

    An attempt is repeated where there is no daemon, where it goes away without an answer, and where its answer says so
    ("starting"): requests can be repeated without harm. The first attempt is made even with no time left.
    Raises UnreachableError at the deadline, ProtocolError for an answer that cannot be read, or a request too large.
    """
    path = os.path.join(run_dir, SOCKET_NAME)
    line = messages.encode_request(request)
    if len(line) > messages.MAX_REQUEST_BYTES:
        raise ProtocolError(f"the request has {len(line)} bytes; the daemon takes {messages.MAX_REQUEST_BYTES}")
    deadline = time.monotonic() + timeout_s
    pause = FIRST_PAUSE_S
    told = ""
    while True:
        try:
            reply = _attempt(path, line, deadline, netns_fd)
            if not reply.is_retryable:
                return reply
            seen = told = reply.message
        except TimeoutError:  # the last attempt has little time; what a daemon said before tells more
            seen = told or f"{path}: no answer in time"
        except OSError as err:
            seen = f"{path}: {_explain(err)}"
        left = deadline - time.monotonic()
        if left <= 0:
            raise UnreachableError(seen)
        time.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _attempt(path: str, line: bytes, deadline: float, netns_fd: int | None) -> Reply:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        _allow(connection, deadline)
        connection.connect(path)
        sent = socket.send_fds(connection, [line], [] if netns_fd is None else [netns_fd])
        while sent < len(line):
            _allow(connection, deadline)
            sent += connection.send(line[sent:])
        return _decode(_receive_line(connection, deadline))


def _receive_line(connection: socket.socket, deadline: float) -> bytes:
    received = b""
    while not received.endswith(b"\n"):
        _allow(connection, deadline)
        part = connection.recv(4096)
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, "the daemon went away without an answer")
        received += part
        if len(received) > messages.MAX_REPLY_BYTES:
            raise ProtocolError(f"the daemon's answer has more than {messages.MAX_REPLY_BYTES} bytes")
    return received


def _decode(line: bytes) -> Reply:
    try:
        return messages.decode_reply(line)
    except messages.MessageError as err:
        raise ProtocolError(f"the daemon's answer cannot be read: {err}") from err


def _allow(connection: socket.socket, deadline: float) -> None:
    # A timeout of 0 would make the socket non-blocking, and the error one of EAGAIN.
    connection.settimeout(max(deadline - time.monotonic(), 0.001))


def _explain(err: OSError) -> str:
    if isinstance(err, FileNotFoundError | ConnectionRefusedError):
        return "no daemon listens here"
    return err.strerror or str(err)
