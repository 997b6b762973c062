# SPDX-License-Identifier: Apache-2.0
"""What stands between two pods, or beside them: small paths, offloads, sidecars, tables that were emptied."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.odd_world import VERSIONS, carries_words, odd_world
from tests.e2e.operation_world import (
    HTTP,
    connection,
    denials,
    outcome,
    read_all,
    transfer,
)
from tests.e2e.sidecar import Sidecar
from triremectl.lab import Lab, Outcome

pytestmark = pytest.mark.kernel

SMALL_PATH_BYTES = 600
"""Less than a SYN with its frame."""
_SIOCETHTOOL = 0x8946  # linux/sockios.h
OFFLOADS = {
    "rx checksum": (0x14, 0x15),
    "tx checksum": (0x16, 0x17),
    "tso": (0x1E, 0x1F),
    "gso": (0x23, 0x24),
    "gro": (0x2B, 0x2C),
}
"""Commands that read and set each (linux/ethtool.h)."""


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    with odd_world(plugin) as lab:
        yield lab


# Sidecars.


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("where", [("x/client",), ("x/server",), ("x/client", "x/server")], ids="+".join)
def test_a_sidecar_that_redirects(lab: Lab, where: tuple[str, ...], version: int) -> None:
    """The sidecars speak with one another; the enforcers judge the ports that were dialled."""
    with ExitStack() as stack:
        for pod in where:
            stack.enter_context(Sidecar(lab, pod, version))
        for _ in range(5):
            with connection(lab, "x/client", "x/server", version) as ends:
                assert carries_words(*ends)
        with connection(lab, "x/client", "x/server", version) as (client, server):
            transfer(client, server, 2)
            transfer(server, client, 2)
            client.shutdown(socket.SHUT_WR)
            assert server.recv(1) == b""
            server.sendall(b"goodbye")
            assert read_all(client, 7) == b"goodbye"
        assert outcome(lab, "host:outside", "x/server", HTTP.number, version, timeout_s=0.3).is_denied
    assert denials(lab, "x/server")[-1] == "unidentified-peer"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_sidecar_that_is_not_there_yet_refuses(lab: Lab, version: int) -> None:
    with Sidecar(lab, "x/server", version, listens=False):
        assert outcome(lab, "x/client", "x/server", HTTP.number, version) is Outcome.REFUSED
