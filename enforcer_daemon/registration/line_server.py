# SPDX-License-Identifier: Apache-2.0
"""A Unix socket for root alone: one line in, one line out, everything bounded. Under both of the daemon's sockets.

The socket is 0600 in a directory that is 0700, and each caller's uid is looked at besides (SO_PEERCRED): a directory
that is mounted into a container keeps its mode but not always its meaning. A lock beside the socket tells a daemon that
lives from the socket file of one that died.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import structlog

from cni_plugin import messages
from enforcer_daemon.errors import RegistrationError
from enforcer_daemon.registration.descriptors import Descriptors

_log = structlog.get_logger(__name__)

_UCRED = struct.Struct("3i")
_ACCEPT_PAUSE_S = 0.1
_READ_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What one socket allows its callers."""

    request_bytes: int
    connections: int = 64
    """Served at a time; further callers wait in the kernel's backlog."""
    request_timeout_s: float = 5.0
    """From the connection to the end of the request's line."""
    reply_timeout_s: float = 5.0
    """For the caller to take the reply."""


class Service(Protocol):
    """What a socket is for. Answers are whole lines."""

    async def answer(self, line: bytes, descriptors: Descriptors) -> bytes:
        """Carry out a request. Does not raise: an exception would end the server."""
        ...

    def refuse(self, problem: str) -> bytes:
        """Say that what came is not a request."""
        ...


class LineServer:
    """Listens while it is open (a context manager), answers while `serve` runs."""

    def __init__(self, path: Path, service: Service, limits: Limits) -> None:
        self._path = path
        self._service = service
        self._limits = limits
        self._open = contextlib.ExitStack()
        self._listener: socket.socket | None = None

    def __enter__(self) -> LineServer:
        with contextlib.ExitStack() as opening:
            _secure(self._path.parent)
            opening.enter_context(_locked(self._path))
            self._listener = opening.enter_context(_listening(self._path))
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listener = None
        self._open.close()

    async def serve(self) -> None:
        """Answer callers until cancelled; those that are being served are cancelled too."""
        if self._listener is None:
            raise RuntimeError("serve() before the server is open")
        slots = asyncio.Semaphore(self._limits.connections)
        async with asyncio.TaskGroup() as conversations:
            while True:
                await slots.acquire()
                connection = await self._accept(self._listener)
                conversations.create_task(self._serve_one(connection, slots))

    async def _accept(self, listener: socket.socket) -> socket.socket:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as err:  # no descriptors or memory left: those being served give theirs back
                _log.warning("accept failed", socket=str(self._path), error=err.strerror)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
            else:
                return connection

    async def _serve_one(self, connection: socket.socket, slots: asyncio.Semaphore) -> None:
        try:
            with connection, Descriptors() as descriptors:
                await self._converse(connection, descriptors)
        except (OSError, TimeoutError) as err:
            _log.info("caller went away", socket=str(self._path), error=str(err))
        finally:
            slots.release()

    async def _converse(self, connection: socket.socket, descriptors: Descriptors) -> None:
        pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid != os.geteuid():
            # The pid is 0 for a caller of another pid namespace: it says who it was, not who it may be.
            _log.warning("caller refused", socket=str(self._path), uid=uid, pid=pid)
            return
        try:
            async with asyncio.timeout(self._limits.request_timeout_s):
                line = await self._receive_line(connection, descriptors)
        except (_UnfitError, TimeoutError) as err:
            problem = str(err) or f"no whole line within {self._limits.request_timeout_s:g} s"
            _log.warning("request refused", socket=str(self._path), pid=pid, problem=problem)
            reply = self._service.refuse(problem)
        else:
            reply = await self._service.answer(line, descriptors)
        async with asyncio.timeout(self._limits.reply_timeout_s):
            await asyncio.get_running_loop().sock_sendall(connection, reply)

    async def _receive_line(self, connection: socket.socket, descriptors: Descriptors) -> bytes:
        received = bytearray()
        while b"\n" not in received:
            await _readable(connection)
            data, are_lost = descriptors.receive(connection, _READ_BYTES)
            if not data:
                raise _UnfitError("the line has no end")
            received += data
            if are_lost:
                raise _UnfitError("too many file descriptors")
            if len(received) > self._limits.request_bytes:
                raise _UnfitError(f"more than {self._limits.request_bytes} bytes")
        if not received.endswith(b"\n") or received.count(b"\n") > 1:
            raise _UnfitError("more than one line")
        return bytes(received)


class _UnfitError(Exception):
    """What came is not one line."""


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection, wake)
    try:
        await ready
    finally:
        loop.remove_reader(connection)


def _secure(directory: Path) -> None:
    """Make the directory root's alone; kubelet's DirectoryOrCreate makes it 0755."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError as err:
        raise RegistrationError(messages.FAILED, f"{directory}: cannot be used: {err.strerror}") from err
    if found.st_uid != os.geteuid():
        raise RegistrationError(messages.FAILED, f"{directory}: belongs to uid {found.st_uid}, not to this daemon")
    if stat.S_IMODE(found.st_mode) != 0o700:
        directory.chmod(0o700)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock that says that a daemon lives on this socket. Its file stays: removing it would race."""
    lock = path.with_name(path.name + ".lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise RegistrationError(messages.TRY_AGAIN, f"{path}: another daemon listens here") from err
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    if path.is_symlink() or path.exists():
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise RegistrationError(messages.FAILED, f"{path}: is not a socket; not replaced")
        path.unlink()  # of a daemon that died: nobody holds the lock
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
        listener.bind(str(path))
        try:
            path.chmod(0o600)
            listener.listen(128)
            yield listener
        finally:
            path.unlink(missing_ok=True)
