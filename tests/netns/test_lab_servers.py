# SPDX-License-Identifier: Apache-2.0
"""The lab's servers leave no socket open, however soon they are closed."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from ipaddress import ip_address

import pytest

from enforcer_daemon.model import Protocol
from trireme_lab.netns import in_netns
from trireme_lab.servers import Servers

pytestmark = pytest.mark.kernel

LOOPBACK = ip_address("127.0.0.1")
PORTS = range(8_000, 8_003)
ROUNDS = 200
"""Of which about one in twenty closes the servers before the last of them is served."""


@pytest.fixture
def netns() -> Iterator[str]:
    name = f"trireme-servers-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def _listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((str(LOOPBACK), port)) == 0


def test_a_server_that_was_asked_for_just_before_the_end_is_closed_too(netns: str) -> None:
    for _ in range(ROUNDS):
        servers = Servers()
        for port in PORTS:
            servers.listen("x/one", netns, LOOPBACK, port, Protocol.TCP)
        servers.close()
        assert [port for port in PORTS if in_netns(netns, partial(_listening, port))] == []
