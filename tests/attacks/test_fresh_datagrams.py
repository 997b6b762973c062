# SPDX-License-Identifier: Apache-2.0
"""Datagrams of a fresh pod that have no room for a message, to who has no enforcer: they arrive.

The guard holds a pod for fresh also where its own enforcer does not, as after a peer that changed its own labels ended
a flow with it; what the guard does then is in tests/netns/test_fresh.py.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.operation_world import NODES, pod
from trireme_lab import HostSpec, Lab, LabSpec, Tools

pytestmark = pytest.mark.kernel
LARGE = 1_200
"""Bytes of the first flight of QUIC."""


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    pods = (pod("server", "a"),)
    hosts = (HostSpec("near", node="a"), HostSpec("far", node="b"))
    with Lab(LabSpec(NODES, {"x": {}}, pods, hosts), Tools(plugin=plugin)) as lab:
        yield lab


@pytest.mark.parametrize("size", [100, LARGE])
def test_requests_to_a_machine_without_an_enforcer_are_answered(lab: Lab, size: int) -> None:
    for place in ("host:near", "host:far"):
        with (
            lab.open_socket(place, socket.AF_INET, socket.SOCK_DGRAM) as server,
            lab.open_socket("x/server", socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            server.bind((str(lab.place(place).address(4)), 0))
            server.settimeout(5)
            client.settimeout(5)
            client.connect(server.getsockname())
            client.send(b"q" * size)
            data, address = server.recvfrom(2_000)
            if not data:  # The enforcer asks by an empty one first where the offer has no room.
                data, address = server.recvfrom(2_000)
            assert data == b"q" * size
            server.sendto(b"a" * size, address)
            assert client.recv(2_000) == b"a" * size


def test_broadcasts_arrive(lab: Lab) -> None:
    network = lab.place("x/server").address(4)
    with (
        lab.open_socket("host:near", socket.AF_INET, socket.SOCK_DGRAM) as near,
        lab.open_socket("x/server", socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        near.bind(("", 0))
        near.settimeout(5)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        to = (str(network).rpartition(".")[0] + ".255", near.getsockname()[1])
        for size in (100, LARGE):
            sock.sendto(b"x" * size, to)
            assert near.recv(2_000) == b"x" * size
