# SPDX-License-Identifier: Apache-2.0
"""SCTP, and protocols without ports: evaluated by address alone, and never let through by a rule that they cannot meet.

Raw sockets at both ends, so that the kernel needs no SCTP of its own; and its own sockets, where it has them.
"""

from __future__ import annotations

import errno
import secrets
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from scapy.layers.sctp import SCTP, SCTPChunkInit

from tests.e2e.operation_world import FAMILIES, NODES, app, block, denials, pod, policy
from trireme_lab import Lab, LabSpec, Tools
from trireme_lab.netns import open_socket

pytestmark = pytest.mark.kernel

SCTP_NUMBER = socket.IPPROTO_SCTP
EXPERIMENT = 253
"""A protocol number for experiments (RFC 3692)."""
PORT = 9_999
VERSIONS = [4, 6]
ANY_ADDRESS = block("0.0.0.0/0", "::/0")
SCTP_PORT = [{"port": PORT, "protocol": "SCTP"}]
RULES: dict[str, dict[str, object]] = {
    "anyone": {},
    "addresses": {"from": ANY_ADDRESS},
    "labels": {"from": [app("client")]},
    "tcp": {"ports": [{"port": PORT}]},
    "sctp-anyone": {"ports": SCTP_PORT},
    "sctp-addresses": {"from": ANY_ADDRESS, "ports": SCTP_PORT},
    "sctp-labels": {"from": [app("client")], "ports": SCTP_PORT},
    "sctp-other-port": {"from": ANY_ADDRESS, "ports": [{"port": PORT + 1, "protocol": "SCTP"}]},
}
"""The one rule of each pod's one policy."""
ALLOWED = {
    SCTP_NUMBER: {"open", "anyone", "addresses", "sctp-anyone", "sctp-addresses"},
    EXPERIMENT: {"open", "anyone", "addresses"},
}
"""Names of the pods that a protocol reaches, and of those that may send it."""
NAMES = ("open", "closed", *RULES)
PATIENCE_S = 20.0
LATE_S = 0.05
REPEATED_AFTER_S = 3.5
"""The kernel repeats the first packet of an association after three seconds (RFC 9260, RTO.Initial)."""
Way = tuple[str, str]


def _out(rule: dict[str, object]) -> dict[str, object]:
    return {"to" if key == "from" else key: value for key, value in rule.items()}


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    world = LabSpec(
        NODES,
        {"x": {}},
        pods=(
            pod("client", "a"),
            pod("target", "b", app="client"),
            *(pod(f"{way}-{name}", "b" if way == "in" else "a") for way in ("in", "out") for name in NAMES),
        ),
        manifests=(
            policy("in-closed", "in-closed", ingress=[]),
            policy("out-closed", "out-closed", egress=[]),
            *(policy(f"in-{name}", f"in-{name}", ingress=[rule]) for name, rule in RULES.items()),
            *(policy(f"out-{name}", f"out-{name}", egress=[_out(rule)]) for name, rule in RULES.items()),
        ),
    )
    with Lab(world, Tools(plugin=plugin)) as lab:
        yield lab


def _packet(protocol: int, marker: bytes) -> bytes:
    """Return what follows the IP header: an association's first packet, so that conntrack finds it valid, or bytes."""
    if protocol != SCTP_NUMBER:
        return marker
    tag, window = struct.unpack("!2I", marker)
    init = SCTPChunkInit(init_tag=tag, a_rwnd=window, n_out_streams=1, n_in_streams=1)
    return bytes(SCTP(sport=PORT, dport=PORT) / init)


def _arrivals(lab: Lab, ways: list[tuple[str, str]], protocol: int, version: int) -> set[tuple[str, str]]:
    """Send one packet each way, all at once; return the ways whose packet arrived."""
    markers = {way: secrets.token_bytes(8) for way in ways}
    arrived: set[tuple[str, str]] = set()
    with ExitStack() as stack:
        receivers = {
            target: stack.enter_context(
                open_socket(lab.place(target).netns, FAMILIES[version], socket.SOCK_RAW, protocol)
            )
            for _, target in ways
        }
        for source, target in ways:
            with open_socket(lab.place(source).netns, FAMILIES[version], socket.SOCK_RAW, protocol) as sender:
                sender.sendto(_packet(protocol, markers[source, target]), (str(lab.address_of(target, version)), 0))
        deadline = time.monotonic() + PATIENCE_S
        expected = {way for way in ways if _is_allowed(way, protocol)}
        while time.monotonic() < deadline and not expected <= arrived:
            time.sleep(LATE_S)
            arrived |= _received(receivers, markers)
        time.sleep(LATE_S)  # for what must not arrive
        return arrived | _received(receivers, markers)


def _received(receivers: dict[str, socket.socket], markers: dict[tuple[str, str], bytes]) -> set[tuple[str, str]]:
    packets: dict[str, list[bytes]] = {}
    for target, receiver in receivers.items():
        receiver.setblocking(False)
        packets[target] = list(iter(lambda receiver=receiver: _next(receiver), b""))  # type: ignore[misc]
    return {way for way, marker in markers.items() if any(marker in packet for packet in packets[way[1]])}


def _next(receiver: socket.socket) -> bytes:
    try:
        return receiver.recv(2_048)
    except BlockingIOError:
        return b""


def _is_allowed(way: tuple[str, str], protocol: int) -> bool:
    names = {end.removeprefix("x/in-").removeprefix("x/out-") for end in way} - {"x/client", "x/target"}
    return names <= ALLOWED[protocol]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("protocol", ALLOWED)
def test_only_rules_by_address_reach_what_has_no_identity(lab: Lab, protocol: int, version: int) -> None:
    ways = [("x/client", f"x/in-{name}") for name in NAMES] + [(f"x/out-{name}", "x/target") for name in NAMES]
    assert _arrivals(lab, ways, protocol, version) == {way for way in ways if _is_allowed(way, protocol)}
    for name in ("closed", "labels"):
        for place in (f"x/in-{name}", f"x/out-{name}"):
            assert denials(lab, place)[-1] == "protocol-not-authenticated"


@pytest.fixture
def association_lab(lab: Lab) -> Lab:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, SCTP_NUMBER).close()
    except OSError as err:
        if err.errno != errno.EPROTONOSUPPORT:
            raise
        pytest.skip("this kernel has no SCTP (CONFIG_IP_SCTP)")
    return lab


@pytest.mark.stock_kernel
@pytest.mark.parametrize("version", VERSIONS)
def test_the_kernels_own_associations_come_about_where_rules_by_address_allow_them(
    association_lab: Lab, version: int
) -> None:
    lab = association_lab
    ways = [("x/client", f"x/in-{name}") for name in NAMES] + [(f"x/out-{name}", "x/target") for name in NAMES]
    expected = {way for way in ways if _is_allowed(way, SCTP_NUMBER)}
    with ExitStack() as stack:

        def bound(place: str, port: int) -> socket.socket:
            there = lab.place(place)
            sock = stack.enter_context(open_socket(there.netns, FAMILIES[version], socket.SOCK_STREAM, SCTP_NUMBER))
            sock.settimeout(PATIENCE_S)
            sock.bind((str(there.address(version)), port))
            return sock

        listeners = {target: bound(target, PORT) for target in {target for _, target in ways}}
        for listener in listeners.values():
            listener.listen(len(ways))
        clients = {way: bound(way[0], 0) for way in ways}
        for (_, target), client in clients.items():
            client.setblocking(False)
            with suppress(BlockingIOError):
                client.connect((str(lab.address_of(target, version)), PORT))
        assert _associated(clients, expected) == expected
        _hear_words_both_ways(clients, listeners, expected)
    for name in ("closed", "labels"):
        for place in (f"x/in-{name}", f"x/out-{name}"):
            assert denials(lab, place)[-1] == "protocol-not-authenticated"


def _associated(clients: dict[Way, socket.socket], expected: set[Way]) -> set[Way]:
    """Return the ways that came about, when all have that should, and the others had time to."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        writable = select.select([], clients.values(), [], 0)[1]
        associated = {way for way, client in clients.items() if client in writable}
        if expected <= associated or time.monotonic() > deadline:
            break
        time.sleep(LATE_S)
    time.sleep(REPEATED_AFTER_S)
    writable = select.select([], clients.values(), [], 0)[1]
    return {way for way, client in clients.items() if client in writable}


def _hear_words_both_ways(
    clients: dict[Way, socket.socket], listeners: dict[str, socket.socket], associated: set[Way]
) -> None:
    for way in associated:
        clients[way].settimeout(PATIENCE_S)
        clients[way].sendall(repr(way).encode())
    for _, target in associated:
        accepted, _ = listeners[target].accept()
        with accepted:
            accepted.settimeout(PATIENCE_S)
            accepted.sendall(accepted.recv(1_000))
    for way in associated:
        assert clients[way].recv(1_000) == repr(way).encode()
