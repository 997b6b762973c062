# SPDX-License-Identifier: Apache-2.0
"""Metrics over HTTP for a Prometheus: GET /metrics, and nothing else. Whoever reaches the port can read them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from enforcer_daemon.errors import SettingsError

_MAX_CONNECTIONS = 16
"""Scrapes that wait for their turn in the kernel; each connection is closed after its answer."""
_MAX_AT_ONCE = 2
"""Scrapes that are rendered at a time; to read the guard's counters runs nft."""


async def serve_metrics(address: tuple[str, int], render: Callable[[], Awaitable[str]]) -> None:
    """Answer until cancelled; raise SettingsError where the address cannot be listened on."""
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
        site = web.TCPSite(runner, *address, backlog=_MAX_CONNECTIONS)
        try:
            await site.start()
        except OSError as err:
            raise SettingsError(f"metrics.listen: {address[0]} port {address[1]}: {err.strerror or err}") from err
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
