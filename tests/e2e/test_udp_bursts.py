# SPDX-License-Identifier: Apache-2.0
"""UDP as QUIC uses it: large first datagrams, many before the first answer, whole bursts handed to the kernel at once.

What is sent before the handshake is over waits for it, and arrives once and whole. It is handed back to the kernel in
order (tests/unit/datapath/test_udp.py); behind that, each processor has its own way, as on any network path.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.operation_world import FAMILIES, NODES, app, denials, pod, policy
from trireme_lab import Lab, LabSpec, Tools
from trireme_lab.netns import open_socket

pytestmark = pytest.mark.kernel

UDP_SEGMENT = 103
"""linux/udp.h: size of the datagrams that one send is cut into."""
INITIAL_BYTES = 1_200
"""What QUIC pads its first datagrams to (RFC 9000, section 14.1)."""
BURST = 20
PATIENCE_S = 10.0
QUIET_S = 1.0
MOMENTS_S = tuple(n / 4_000 for n in range(12))
"""How long after the first datagram others follow: handshakes take a millisecond or two."""
SERVERS = ("x/near", "x/far")
CLIENTS = ("x/client", "x/free")
"""One whose datagrams wait for the answer, and one whose first leave at once with the offer beside them."""
VERSIONS = [4, 6]


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    world = LabSpec(
        NODES,
        {"x": {}},
        pods=(
            pod("client", "a"),
            pod("free", "a"),
            pod("stranger", "a"),
            pod("near", "a", app="server"),
            pod("far", "b", app="server"),
        ),
        manifests=(
            policy("deny-all", ingress=[], egress=[]),
            policy("server", "server", ingress=[{"from": [app("client"), app("free")]}]),
            policy("free", "free", egress=[{}]),
            policy("client", "client", egress=[{"to": [app("server")]}]),
            policy("stranger", "stranger", egress=[{"to": [app("server")]}]),
        ),
    )
    with Lab(world, Tools(plugin=plugin)) as lab:
        yield lab


@contextmanager
def _ends(lab: Lab, source: str, target: str, version: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield a client's connected socket, and a server's on a port of its own."""
    with (
        open_socket(lab.place(target).netns, FAMILIES[version], socket.SOCK_DGRAM) as server,
        open_socket(lab.place(source).netns, FAMILIES[version], socket.SOCK_DGRAM) as client,
    ):
        for end in (server, client):
            end.settimeout(PATIENCE_S)
        server.bind((str(lab.address_of(target, version)), 0))
        client.connect(server.getsockname()[:2])
        yield client, server


def _numbered(count: int, size: int) -> list[bytes]:
    return [number.to_bytes(4, "big") * (size // 4) for number in range(count)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", SERVERS)
@pytest.mark.parametrize("source", CLIENTS)
@pytest.mark.parametrize("size", [40, INITIAL_BYTES])
def test_a_burst_before_the_first_answer_arrives_whole(
    lab: Lab, source: str, target: str, version: int, size: int
) -> None:
    burst = _numbered(BURST, size)
    with _ends(lab, source, target, version) as (client, server):
        for datagram in burst:
            client.send(datagram)
        received = [server.recvfrom(65_535) for _ in burst]
        assert sorted(data for data, _ in received) == burst
        for datagram in burst:  # and the answers to all of them
            server.sendto(datagram, received[0][1])
        assert sorted(client.recv(65_535) for _ in burst) == burst


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", SERVERS)
def test_segments_of_one_send_arrive_as_datagrams(lab: Lab, target: str, version: int) -> None:
    burst = _numbered(BURST, INITIAL_BYTES)
    segment_size = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("=H", INITIAL_BYTES))]
    with _ends(lab, "x/client", target, version) as (client, server):
        for _ in range(3):  # the first while the handshake runs, the others when it is over
            client.sendmsg([b"".join(burst)], segment_size)
            received = [server.recvfrom(65_535) for _ in burst]
            assert sorted(data for data, _ in received) == burst
            server.sendto(b"answer", received[0][1])
            assert client.recv(100) == b"answer"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", SERVERS)
@pytest.mark.parametrize("source", CLIENTS)
def test_three_such_sends_at_once_open_a_flow_and_lose_nothing(
    lab: Lab, source: str, target: str, version: int
) -> None:
    segment_size = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("=H", INITIAL_BYTES))]
    burst = _numbered(3 * BURST, INITIAL_BYTES)
    for _ in range(3):
        with _ends(lab, source, target, version) as (client, server):
            for start in range(0, len(burst), BURST):
                client.sendmsg([b"".join(burst[start : start + BURST])], segment_size)
            assert sorted(server.recv(65_535) for _ in burst) == burst


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", SERVERS)
@pytest.mark.parametrize("source", CLIENTS)
def test_such_sends_at_the_moment_of_the_release_lose_nothing(lab: Lab, source: str, target: str, version: int) -> None:
    """They come while the flow is released at one end, or at none, or at both."""
    segment_size = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("=H", INITIAL_BYTES))]
    burst = _numbered(1 + 2 * BURST, INITIAL_BYTES)
    for moment_s in MOMENTS_S:
        with _ends(lab, source, target, version) as (client, server):
            client.send(burst[0])
            time.sleep(moment_s)
            for start in (1, 1 + BURST):
                client.sendmsg([b"".join(burst[start : start + BURST])], segment_size)
            assert sorted(server.recv(65_535) for _ in burst) == burst


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", SERVERS)
def test_nothing_of_a_burst_arrives_that_policy_denies(lab: Lab, target: str, version: int) -> None:
    segment_size = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("=H", INITIAL_BYTES))]
    with _ends(lab, "x/stranger", target, version) as (client, server):
        client.send(b"alone")
        client.sendmsg([b"".join(_numbered(BURST, INITIAL_BYTES))], segment_size)
        server.settimeout(QUIET_S)
        with pytest.raises(TimeoutError):
            server.recv(65_535)
    assert denials(lab, target)[-1] == "ingress-denied"
