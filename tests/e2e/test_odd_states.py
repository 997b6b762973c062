# SPDX-License-Identifier: Apache-2.0
"""What kernels remember of connections, and for how long: ports used again, halves, tables that were emptied."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.attackers import grow_old
from tests.e2e.odd_world import (
    RESET_ON_CLOSE,
    VERSIONS,
    bound,
    carries_words,
    denied,
    odd_world,
    sysctls,
    wait_until,
)
from tests.e2e.operation_world import FAMILIES, connection, denials, listening, read_all, transfer
from trireme_lab import Lab

pytestmark = pytest.mark.kernel

EVERYWHERE = ("x/client", "node:a", "node:b", "x/server")
"""Where a connection has an entry in conntrack."""
DAY_S = 86_400


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    with odd_world(plugin) as lab:
        yield lab


def entries(lab: Lab, place: str, port: int, version: int = 4) -> list[tuple[str, int]]:
    """Return state and seconds left of a place's connections with a port at either end."""
    family = "ipv4" if version == 4 else "ipv6"
    listed = lab.run(place, "conntrack", "-L", "-f", family, "-p", "tcp")
    pattern = rf"^tcp +6 (\d+) (\w+) .*?[sd]port={port} .*$"
    return [(state, int(left)) for left, state in re.findall(pattern, listed, re.MULTILINE)]


# The same ports again.


def _dial_from(lab: Lab, version: int, port: int, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    client = bound(lab, "x/client", version, port)
    try:
        client.connect(listener.getsockname()[:2])
        server, _ = listener.accept()
    except BaseException:
        client.close()
        raise
    server.settimeout(20)
    return client, server


def _require_good(lab: Lab, version: int, port: int, ends: tuple[socket.socket, socket.socket]) -> None:
    """The connection carries words and bytes, and all kernels on its way know it as established."""
    client, server = ends
    with client, server:
        assert carries_words(client, server)
        transfer(client, server, 1)
        transfer(server, client, 1)
        for place in EVERYWHERE:
            assert [state for state, _ in entries(lab, place, port, version)] == ["ESTABLISHED"], place


@pytest.mark.parametrize("version", VERSIONS)
def test_the_same_ports_after_the_servers_reset(lab: Lab, version: int) -> None:
    port = 33_000 + version
    with listening(lab, "x/server", version) as listener:
        client, server = _dial_from(lab, version, port, listener)
        with client:
            server.setsockopt(*RESET_ON_CLOSE)
            server.close()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        _require_good(lab, version, port, _dial_from(lab, version, port, listener))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_same_ports_after_a_refusal(lab: Lab, version: int) -> None:
    port = 33_010 + version
    with listening(lab, "x/server", version) as placeholder:
        address = placeholder.getsockname()[:2]
    with bound(lab, "x/client", version, port) as client, pytest.raises(ConnectionRefusedError):
        client.connect(address)
    with bound(lab, "x/server", version, address[1]) as listener:
        listener.listen()
        _require_good(lab, version, port, _dial_from(lab, version, port, listener))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_same_ports_after_the_clients_reset(lab: Lab, version: int) -> None:
    port = 33_020 + version
    with listening(lab, "x/server", version) as listener:
        client, server = _dial_from(lab, version, port, listener)
        with server:
            client.setsockopt(*RESET_ON_CLOSE)
            client.close()
            with pytest.raises(ConnectionResetError):
                server.recv(1)
        _require_good(lab, version, port, _dial_from(lab, version, port, listener))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("first", ["client", "server"])
def test_the_same_ports_in_time_wait(lab: Lab, first: str, version: int) -> None:
    """Whoever closed first has the connection in TIME_WAIT; a new SYN ends that, as without an enforcer."""
    port = 33_030 + version + 4 * (first == "client")
    reuse = {"net/ipv4/tcp_tw_reuse": "1"}
    with sysctls(lab, "x/client", reuse), listening(lab, "x/server", version) as listener:
        client, server = _dial_from(lab, version, port, listener)
        with client, server:
            one, other = (client, server) if first == "client" else (server, client)
            one.shutdown(socket.SHUT_WR)
            assert other.recv(1) == b""
            other.shutdown(socket.SHUT_WR)
            assert one.recv(1) == b""
        place = f"x/{first}"
        wait_until(lambda: _in_time_wait(lab, place, port) == 1, "the connection is in TIME_WAIT")
        ends: list[tuple[socket.socket, socket.socket]] = []

        def dial_again() -> bool:
            try:
                ends.append(_dial_from(lab, version, port, listener))
            except OSError:  # EADDRNOTAVAIL: the client's kernel lets a second pass first.
                return False
            return True

        wait_until(dial_again, "the ports are used again")
        _require_good(lab, version, port, ends[0])


def _in_time_wait(lab: Lab, place: str, port: int) -> int:
    return len(
        lab.run(place, "ss", "-Htan", "state", "time-wait", f"( sport = {port} or dport = {port} )").splitlines()
    )


# Half a connection.


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("first", ["client", "server"])
def test_half_a_connection_may_be_silent_for_days(lab: Lab, first: str, version: int) -> None:
    """Conntrack forgets it after 60 s by default, and with it that it was evaluated: the late FIN would be denied."""
    before = denied(lab, "a") + denied(lab, "b")
    with connection(lab, "x/client", "x/server", version) as (client, server):
        port = client.getsockname()[1]
        closing, other = (client, server) if first == "client" else (server, client)
        closing.shutdown(socket.SHUT_WR)
        assert other.recv(1) == b""
        for place in ("x/client", "x/server"):
            wait_until(lambda place=place: _left(lab, place, port, version) > DAY_S, place)  # type: ignore[misc]
        transfer(other, closing, 1)
        other.shutdown(socket.SHUT_WR)
        assert closing.recv(1) == b""
    assert denied(lab, "a") + denied(lab, "b") == before


def _left(lab: Lab, place: str, port: int, version: int) -> int:
    found = entries(lab, place, port, version)
    return found[0][1] if found and found[0][0] == "CLOSE_WAIT" else 0


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("also", ["", "and the enforcer"])
def test_what_happens_where_conntrack_forgets_half_a_connection(lab: Lab, also: str, version: int) -> None:
    """The enforcer remembers recent connections itself and lets them go on; after a restart it knows them no more."""
    short = {"net/netfilter/nf_conntrack_tcp_timeout_close_wait": "1"}
    with sysctls(lab, "x/server", short), connection(lab, "x/client", "x/server", version) as (client, server):
        port = client.getsockname()[1]
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        wait_until(lambda: entries(lab, "x/server", port, version) == [], "conntrack has forgotten it")
        if not also:
            server.sendall(b"still here")
            assert read_all(client, 10) == b"still here"
            return
        lab.node("b").restart()
        server.sendall(b"still here?")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        assert denials(lab, "x/server")[-1] == "unknown-flow"


# Tables that somebody emptied.


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("place", EVERYWHERE)
def test_established_connections_survive_an_emptied_table(lab: Lab, place: str, version: int) -> None:
    grow_old(lab)  # Of a new pod, or one that lost a flow lately, the node must have seen the connection begin.
    with connection(lab, "x/client", "x/server", version) as (client, server):
        assert carries_words(client, server)
        lab.run(place, "conntrack", "-F")
        assert carries_words(client, server)
        lab.run(place, "conntrack", "-F")
        assert carries_words(server, client)
        transfer(client, server, 1)
        transfer(server, client, 1)
        port = client.getsockname()[1]
        assert [state for state, _ in entries(lab, place, port, version)] == ["ESTABLISHED"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("place", "node"), [("x/client", "a"), ("x/server", "b")])
@pytest.mark.parametrize("speaker", ["client", "server"])
def test_what_the_enforcer_forgot_too_is_reset_at_both_ends(
    lab: Lab, place: str, node: str, speaker: str, version: int
) -> None:
    with connection(lab, "x/client", "x/server", version) as (client, server):
        assert carries_words(client, server)
        lab.run(place, "conntrack", "-F")
        lab.node(node).restart()
        (client if speaker == "client" else server).sendall(b"hello?")
        for end in (client, server):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
        assert denials(lab, place)[-1] == "unknown-flow"


# A pod and itself.


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("where", ["loopback", "own address"])
def test_a_pod_reaches_itself_past_every_policy(lab: Lab, where: str, version: int) -> None:
    """Such connections do not leave the pod: they go over its loopback, which is nobody's business."""
    loopback = {4: "127.0.0.1", 6: "::1"}[version]
    address = loopback if where == "loopback" else str(lab.place("x/client").address(version))
    with lab.open_socket("x/client", FAMILIES[version]) as listener:
        listener.bind((address, 0))
        listener.listen()
        with lab.open_socket("x/client", FAMILIES[version]) as client:
            client.settimeout(20)
            client.connect(listener.getsockname()[:2])
            with listener.accept()[0] as server:
                server.settimeout(20)
                assert carries_words(client, server)
                transfer(client, server, 1)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_pod_reaches_itself_through_its_service(lab: Lab, version: int) -> None:
    with lab.open_socket("x/server", FAMILIES[version]) as client:
        client.settimeout(20)
        client.connect((str(lab.address_of("service:x/server", version)), 80))
        assert client.recv(100) == b"x/server\n"
        client.sendall(b"a word")
        assert read_all(client, 6) == b"a word"
