# SPDX-License-Identifier: Apache-2.0
"""Metrics over HTTP for a Prometheus: GET /metrics, and nothing else. Whoever reaches the port can read them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from enforcer_daemon.errors import SettingsError

_MAX_CONNECTIONS = 16
"""Connections that are open at a time, and as many that wait in the kernel; each is closed after its answer, and the
oldest makes room: who only holds connections open must not use up the daemon's descriptors."""
_MAX_AT_ONCE = 2
"""Scrapes that are rendered at a time; to read the guard's counters runs nft."""


async def serve_metrics(address: tuple[str, int], render: Callable[[], Awaitable[str]]) -> None:
    """Answer until cancelled; raise SettingsError if the address cannot be listened on."""
    turns = asyncio.Semaphore(_MAX_AT_ONCE)

    async def answer(_: web.Request) -> web.Response:
        if turns.locked():
            return web.Response(status=503, text="too many scrapes at a time\n")
        async with turns:
            body = (await render()).encode()
        response = web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})
        response.force_close()
        return response

    application = web.Application(client_max_size=1)
    application.router.add_get("/metrics", answer)
    runner = web.AppRunner(application, access_log=None, keepalive_timeout=0.0)
    await runner.setup()
    try:
        try:
            listener = await asyncio.get_running_loop().create_server(
                lambda: _connection(runner), *address, backlog=_MAX_CONNECTIONS
            )
        except OSError as err:
            raise SettingsError(f"metrics.listen: {address[0]} port {address[1]}: {err.strerror or err}") from err
        async with listener:
            await listener.serve_forever()
    finally:
        await runner.cleanup()


def _connection(runner: web.AppRunner) -> asyncio.Protocol:
    """Begin to serve a connection; the oldest ones make room."""
    server = runner.server
    if server is None:
        raise RuntimeError("the listener serves before it was set up")
    known = server.connections
    for oldest in known[: len(known) + 1 - _MAX_CONNECTIONS]:
        oldest.force_close()
    return server()
