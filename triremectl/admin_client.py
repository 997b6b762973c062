# SPDX-License-Identifier: Apache-2.0
"""Ask a running enforcer over its operators' socket (RUN_DIR/admin.sock): one JSON line there, one back."""

from __future__ import annotations

import json
import socket
from pathlib import Path

VERSION = 1
"""Of the exchange; see docs/registration.md."""
SOCKET_NAME = "admin.sock"
TIMEOUT_S = 10.0
"""For each step: connecting, sending, and each part of the answer."""
MAX_REPLY_BYTES = 16 * 1024 * 1024


class AdminError(Exception):
    """The question was not answered; the text says why, and what an operator can do."""


def call(run_dir: Path, command: str, **arguments: object) -> object:
    """Return the enforcer's answer to the command; raise AdminError."""
    path = Path(run_dir) / SOCKET_NAME
    line = json.dumps({**arguments, "version": VERSION, "command": command}).encode() + b"\n"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(path))
            connection.sendall(line)
            received = _receive_line(connection)
    except OSError as err:
        raise AdminError(_explain(err, path)) from err
    return _decode(received, path)


def _receive_line(connection: socket.socket) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n"):
        part = connection.recv(64 * 1024)
        if not part:
            raise ConnectionResetError("the connection ended without an answer")
        received += part
        if len(received) > MAX_REPLY_BYTES:
            raise AdminError(f"the enforcer's answer has more than {MAX_REPLY_BYTES} bytes")
    return bytes(received)


def _decode(line: bytes, path: Path) -> object:
    try:
        reply = json.loads(line)
    except ValueError as err:
        raise AdminError(f"{path}: the answer is not JSON: is this an enforcer's socket?") from err
    match reply:
        case {"ok": True, "result": result}:
            return result
        case {"ok": False, "error": str(error)}:
            raise AdminError(error)
        case _:
            raise AdminError(f"{path}: the answer has neither a result nor an error: is this an enforcer's socket?")


def _explain(err: OSError, path: Path) -> str:
    match err:
        case FileNotFoundError():
            return f"{path}: no such socket. Is the enforcer running, and is this its run directory?"
        case ConnectionRefusedError():
            return f"{path}: nobody listens here. The enforcer is not running."
        case PermissionError():
            return f"{path}: permission denied. Only root may ask the enforcer."
        case TimeoutError():
            return f"{path}: no answer within {TIMEOUT_S:g} s. The enforcer is stuck or overloaded."
        case _:
            return f"{path}: {err.strerror or err}"
