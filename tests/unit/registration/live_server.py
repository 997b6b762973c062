# SPDX-License-Identifier: Apache-2.0
"""A registration or admin server that runs in a thread of the test, and a network namespace to register."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from enforcer_daemon.registration.admin import AdminServer
from enforcer_daemon.registration.server import RegistrationServer


@contextlib.contextmanager
def serving(server: RegistrationServer | AdminServer) -> Iterator[None]:
    """Open the server, serve in a thread, and stop. An exception of the server fails the test."""
    started = threading.Event()
    stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = []
    faults: list[BaseException] = []

    async def serve() -> None:
        task = asyncio.ensure_future(server.serve())
        stop.append((asyncio.get_running_loop(), task))
        started.set()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as err:  # noqa: BLE001 - raised again in the thread of the test
            faults.append(err)

    with server:
        thread = threading.Thread(target=run)
        thread.start()
        started.wait()
        try:
            yield
        finally:
            loop, task = stop[0]
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)
            thread.join()
    if faults:
        raise faults[0]


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name, which pytest's may not."""
    with tempfile.TemporaryDirectory(prefix="tr") as directory:
        yield Path(directory) / "run"


@contextlib.contextmanager
def network_namespace() -> Iterator[str]:
    """Path of a namespace of its own; without root, one of a user namespace."""
    holder = subprocess.Popen(
        ["unshare", "--map-root-user", "--net", "sh", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            pytest.skip("this system gives no network namespaces to this user")
        yield f"/proc/{holder.pid}/ns/net"
        holder.kill()
