# SPDX-License-Identifier: Apache-2.0
"""Ten thousand connections of one pod that say nothing: they stay, over a change of policy, and cost little."""

from __future__ import annotations

import errno
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.e2e.odd_world import odd_world, wait_until
from tests.e2e.operation_world import app, policy, read_all
from trireme_lab import Lab
from trireme_lab.netns import open_socket

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

IDLE = 10_000
AT_ONCE = 250
"""Less than the listener's backlog."""
PORT = 9000
MAX_BYTES = 3_000
"""What a connection may cost an enforcer, of resident memory; measured is less than 1,000."""
FILES = IDLE + 1_000
ECHO = f"""
import asyncio, resource
async def echo(reader, writer):
    writer.write(b'!')
    while word := await reader.read(100):
        writer.write(word)
async def main():
    server = await asyncio.start_server(echo, port={PORT}, backlog=1024)
    await server.serve_forever()
resource.setrlimit(resource.RLIMIT_NOFILE, ({FILES}, {FILES}))
asyncio.run(main())
"""


@contextmanager
def many_files() -> Iterator[None]:
    """Allow this process as many open files as the test needs; the other ends are in a process of their own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < FILES:
        pytest.skip(f"needs {FILES} open files, this process may have {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, FILES), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resident_bytes(lab: Lab, node: str) -> int:
    """Return the memory of a node's enforcer."""
    status = Path(f"/proc/{lab.node(node).daemon.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def connect_some(lab: Lab, stack: ExitStack) -> list[socket.socket]:
    """Open some connections at once; each is greeted."""
    clients = []
    for _ in range(AT_ONCE):
        client = stack.enter_context(open_socket(lab.place("x/client").netns, socket.AF_INET, socket.SOCK_STREAM))
        client.setblocking(False)
        assert client.connect_ex((str(lab.address_of("x/server")), PORT)) == errno.EINPROGRESS
        clients.append(client)
    for client in clients:
        client.settimeout(20)
        assert read_all(client, 1) == b"!"
    return clients


def is_listening(lab: Lab) -> bool:
    return f":{PORT} " in lab.run("x/server", "ss", "-Htln")


@pytest.mark.timeout(300)
def test_ten_thousand_idle_connections(plugin: Path) -> None:
    with many_files(), odd_world(plugin) as lab, ExitStack() as stack:
        lab.spawn("x/server", sys.executable, "-c", ECHO)
        wait_until(lambda: is_listening(lab), "the server listens")
        idle = connect_some(lab, stack)
        before = {node: resident_bytes(lab, node) for node in "ab"}
        while len(idle) < IDLE:
            idle += connect_some(lab, stack)
        cost = {node: (resident_bytes(lab, node) - before[node]) // (IDLE - AT_ONCE) for node in "ab"}
        assert max(cost.values()) < MAX_BYTES, cost
        assert lab.apply(policy("server", "server", ingress=[{"from": [app("client"), app("another")]}]))
        for client in idle:
            client.sendall(b"word")
        assert all(read_all(client, 4) == b"word" for client in idle)
