# SPDX-License-Identifier: Apache-2.0
"""The port for metrics: what it answers, and that nobody can use it up."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from enforcer_daemon.errors import SettingsError
from enforcer_daemon.telemetry import listener

HOST = "127.0.0.1"


async def render() -> str:
    return "answer 42\n"


@asynccontextmanager
async def served() -> AsyncIterator[int]:
    """Yield the port of a listener."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(listener.serve_metrics((HOST, port), render))
        try:
            await _until_open(port)
            yield port
        finally:
            serving.cancel()


async def _until_open(port: int) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection(HOST, port)
        except ConnectionRefusedError:
            await asyncio.sleep(0.01)
        else:
            writer.close()
            return


async def ask(port: int, path: str = "/metrics", method: str = "GET") -> bytes:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    answer = await reader.read()  # To the end: the connection is closed after its answer.
    writer.close()
    return answer


def test_metrics_are_answered_and_nothing_else_is() -> None:
    async def talk() -> None:
        async with served() as port:
            answer = await ask(port)
            assert answer.startswith(b"HTTP/1.1 200")
            assert answer.endswith(b"answer 42\n")
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 405")
            writer.close()

    asyncio.run(talk())


@pytest.mark.parametrize("beginning", [b"", b"GET /metrics HTT", b"GET /metrics HTTP/1.1\r\nX: "])
def test_connections_that_ask_for_nothing_use_up_no_descriptors(beginning: bytes) -> None:
    async def hold() -> None:
        async with served() as port:
            held = []
            for _ in range(4 * listener._MAX_CONNECTIONS):
                held.append(await asyncio.open_connection(HOST, port))
                held[-1][1].write(beginning)
                await asyncio.sleep(0)
            assert (await ask(port)).startswith(b"HTTP/1.1 200")
            for reader, _ in held[: len(held) - listener._MAX_CONNECTIONS]:
                with suppress(ConnectionResetError):
                    await asyncio.wait_for(reader.read(), 10)  # Ends where the connection was closed.
            for _, writer in held:
                writer.close()

    asyncio.run(hold())


def test_an_address_that_is_in_use_is_named() -> None:
    async def collide() -> None:
        async with served() as port:
            with pytest.raises(SettingsError, match=f"metrics.listen: {HOST} port {port}"):
                await listener.serve_metrics((HOST, port), render)

    asyncio.run(collide())
