# SPDX-License-Identifier: Apache-2.0
"""The operators' socket: one JSON line with a command, one JSON line with its result. For root on this node alone."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import structlog

from enforcer_daemon.errors import EnforcerError
from enforcer_daemon.registration.descriptors import Descriptors
from enforcer_daemon.registration.line_server import Limits, LineServer

VERSION = 1
MAX_REPLY_BYTES = 16 * 1024 * 1024
LIMITS = Limits(request_bytes=64 * 1024, connections=16)

_log = structlog.get_logger(__name__)

Command = Callable[[dict[str, Any]], Awaitable[object]]
"""Takes the request's arguments; returns what JSON can hold; raises EnforcerError with a text for the operator."""


class AdminServer:
    """Answers `commands` by name. Open as a context manager, then `serve()` until cancelled."""

    def __init__(self, path: Path, commands: Mapping[str, Command], limits: Limits = LIMITS) -> None:
        self._commands = dict(commands)
        self._server = LineServer(path, self, limits)

    def __enter__(self) -> AdminServer:
        self._server.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.__exit__(kind, value, traceback)

    async def serve(self) -> None:
        """Answer operators until cancelled."""
        await self._server.serve()

    async def answer(self, line: bytes, descriptors: Descriptors) -> bytes:
        """Carry out one command."""
        try:
            command, arguments = self._decode(line)
            reply = _encode({"ok": True, "result": await command(arguments)})
        except EnforcerError as err:
            return self.refuse(str(err))
        except Exception as err:  # noqa: BLE001 - a command's fault must not end the server; it is logged and told
            _log.exception("admin command failed")
            return self.refuse(f"internal error ({type(err).__name__}); the enforcer's log has the details")
        if len(reply) > MAX_REPLY_BYTES:
            return self.refuse(f"the result has {len(reply)} bytes; at most {MAX_REPLY_BYTES} can be told")
        return reply

    def refuse(self, problem: str) -> bytes:
        """Return what is wrong."""
        return _encode({"ok": False, "error": problem})

    def _decode(self, line: bytes) -> tuple[Command, dict[str, Any]]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise AdminError(f"the request is not JSON: {err}") from err
        if not isinstance(request, dict):
            raise AdminError("the request must be a JSON object")
        version, name = request.pop("version", None), request.pop("command", None)
        if version != VERSION:
            raise AdminError(f"version: must be {VERSION}: the command line and the enforcer are of different releases")
        if not isinstance(name, str) or name not in self._commands:
            raise AdminError(f"command: must be one of {', '.join(sorted(self._commands))}")
        return self._commands[name], request


class AdminError(EnforcerError):
    """A request that is not one; also for commands to raise where an argument does not hold."""


def _encode(reply: dict[str, object]) -> bytes:
    return json.dumps(reply, separators=(",", ":")).encode() + b"\n"
