# SPDX-License-Identifier: Apache-2.0
"""Many connections, and the ways in which applications use theirs: all as if there were no enforcer between."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from enforcer_daemon.handshake.frames import find_proof
from enforcer_daemon.model import PodRef
from enforcer_daemon.packet.tcp import walk_options
from tests.e2e.operation_world import (
    FAMILIES,
    HTTP,
    NODES,
    app,
    connection,
    dial,
    endpoint,
    in_background,
    listening,
    outcome,
    pod,
    policy,
    read_all,
    segments,
    transfer,
)
from trireme_lab import Lab, LabError, LabSpec, Outcome, PodSpec, Tools
from trireme_lab.chain import load_conflist
from trireme_lab.netns import open_socket, write_sysctls

pytestmark = pytest.mark.kernel

VERSIONS = [4, 6]
SEQUENTIAL = 2_000
CONCURRENT = 200
NO_QUICK_ACK = [(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)]
DEFER = [(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)]
_OPTION_TIMESTAMPS = 8
_OPTION_MPTCP = 30
MANIFESTS = (policy("deny-all", ingress=[]), policy("server", "server", ingress=[{"from": [app("client")]}]))


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    pods = (pod("client", "a"), pod("near-client", "b", app="client"), pod("server", "b"))
    with Lab(LabSpec(NODES, pods=pods, manifests=MANIFESTS), Tools(plugin=plugin)) as lab:
        yield lab


def _mtu_lab(plugin: Path, directory: Path, mtu: int) -> Lab:
    """Describe a world like the others, with another MTU on every pod's interface."""
    conflist = load_conflist(Tools().conflist)
    conflist["plugins"][0]["mtu"] = mtu
    changed = directory / "mtu.conflist"
    changed.write_text(json.dumps(conflist))
    pods = (pod("client", "a"), pod("server", "b"))
    return Lab(LabSpec(NODES, pods=pods, manifests=MANIFESTS), Tools(plugin=plugin, conflist=changed))


@pytest.mark.parametrize("source", ["x/client", "x/near-client"])
def test_two_thousand_connections_one_after_another(lab: Lab, source: str) -> None:
    before = _denied(lab)
    with listening(lab, "x/server") as listener:
        for _ in range(SEQUENTIAL):
            with dial(lab, source, listener) as client, listener.accept()[0] as server:
                server.sendall(b"hello")
                assert client.recv(100) == b"hello"
    assert _denied(lab) == before


@pytest.mark.parametrize("version", VERSIONS)
def test_two_hundred_connections_at_once(lab: Lab, version: int) -> None:
    request = replace(lab.request("x/client", "x/server", HTTP.number, version), timeout_s=20.0)
    start = threading.Barrier(50)

    def many(_: int) -> set[Outcome]:
        start.wait()
        return {result.outcome for result in lab.probe_all([request] * (CONCURRENT // 50))}

    with ThreadPoolExecutor(50) as executor:
        outcomes = set().union(*executor.map(many, range(50)))
    assert outcomes == {Outcome.CONNECTED}
    assert endpoint(lab, "x/server")["lost_packets"] == {"queue": 0, "buffer": 0, "limit": 0}


def _denied(lab: Lab) -> int:
    """Count what any enforcer has dropped for an authenticated peer's fault or its own."""
    drops = [lab.node(name).status()["drops"] for name in "ab"]
    return sum(sum(dropped.values()) for dropped in drops if isinstance(dropped, dict))


@pytest.mark.parametrize("version", VERSIONS)
def test_ten_megabytes_each_way_at_once(lab: Lab, version: int) -> None:
    with (
        connection(lab, "x/client", "x/server", version) as (client, server),
        in_background(lambda: transfer(client, server, 10)),
    ):
        transfer(server, client, 10)


@pytest.mark.stock_kernel
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("first", ["client", "server"])
def test_either_side_may_speak_first(lab: Lab, first: str, version: int) -> None:
    with connection(lab, "x/client", "x/server", version) as (client, server):
        speaker, hearer = (client, server) if first == "client" else (server, client)
        speaker.sendall(b"hello")
        assert read_all(hearer, 5) == b"hello"
        hearer.sendall(b"good day")
        assert read_all(speaker, 8) == b"good day"


@pytest.mark.parametrize("version", VERSIONS)
def test_half_a_connection_goes_on_when_the_other_half_is_closed(lab: Lab, version: int) -> None:
    with connection(lab, "x/client", "x/server", version) as (client, server):
        client.sendall(b"all I have to say")
        client.shutdown(socket.SHUT_WR)
        assert read_all(server, 1000) == b"all I have to say"
        time.sleep(0.05)
        transfer(server, client, 2)
        server.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""


def test_a_connection_that_is_closed_at_once_is_seen_as_closed(lab: Lab) -> None:
    with listening(lab, "x/server") as listener:
        for _ in range(50):
            dial(lab, "x/client", listener).close()
            with listener.accept()[0] as server:
                server.settimeout(5)
                assert server.recv(1) == b""


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_midway_reaches_the_other_side(lab: Lab, who: str, version: int) -> None:
    with connection(lab, "x/client", "x/server", version) as (client, server):
        resetting, other = (client, server) if who == "client" else (server, client)
        transfer(client, server, 1)
        resetting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        resetting.close()
        with pytest.raises(ConnectionResetError):
            other.recv(1)


def test_a_closed_port_refuses(lab: Lab) -> None:
    assert outcome(lab, "x/client", "x/server", 9) is Outcome.REFUSED


@pytest.mark.stock_kernel
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bytes_first", [1, 100_000])
def test_a_client_whose_first_packet_is_data(lab: Lab, bytes_first: int, version: int) -> None:
    """Without quick acknowledgement the kernel makes no bare ACK that could carry the proof."""
    payload = os.urandom(bytes_first)
    with (
        listening(lab, "x/server", version) as listener,
        lab.capture("node:a") as capture,
        dial(lab, "x/client", listener, options=NO_QUICK_ACK) as client,
    ):
        client.sendall(payload)
        with listener.accept()[0] as server:
            server.settimeout(20)
            assert read_all(server, len(payload)) == payload
            transfer(server, client, 1)
        port = listener.getsockname()[1]
        sent = [s for s in segments(capture.close(), port) if s.dport == port]
    proof, fits = find_proof(sent[1].options), bytes_first == 1
    assert proof is not None
    assert proof.is_standalone != fits
    first = sent[1 if fits else 2].payload
    assert first
    assert payload.startswith(first)


@pytest.mark.parametrize("options", [[], NO_QUICK_ACK], ids=["ack first", "data first"])
def test_a_server_that_defers_accept(lab: Lab, options: list[tuple[int, int, int]]) -> None:
    with (
        listening(lab, "x/server", options=DEFER) as listener,
        dial(lab, "x/client", listener, options=options) as client,
    ):
        time.sleep(0.1)
        client.sendall(b"now")
        with listener.accept()[0] as server:
            assert server.recv(100) == b"now"
            transfer(client, server, 1)
            transfer(server, client, 1)


def test_a_server_whose_deferred_client_stays_silent(lab: Lab) -> None:
    """The server's kernel repeats its SYN-ACK, which must not disturb the client's connection."""
    with listening(lab, "x/server", options=DEFER) as listener, dial(lab, "x/client", listener) as client:
        time.sleep(1.5)
        client.sendall(b"at last")
        with listener.accept()[0] as server:
            assert server.recv(100) == b"at last"


@pytest.mark.stock_kernel
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("both", [True, False], ids=["both speak it", "the client alone"])
def test_multipath_tcp(lab: Lab, version: int, *, both: bool) -> None:
    netns = lab.place("x/server").netns
    try:
        open_socket(netns, socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP).close()
    except OSError as err:
        if err.errno in (errno.EPROTONOSUPPORT, errno.ENOPROTOOPT):
            pytest.skip("this kernel has no Multipath TCP (CONFIG_MPTCP, net.mptcp.enabled)")
        raise
    with (
        lab.capture("node:a") as capture,
        listening(lab, "x/server", version, protocol=socket.IPPROTO_MPTCP if both else 0) as listener,
        dial(lab, "x/client", listener, protocol=socket.IPPROTO_MPTCP) as client,
    ):
        client.sendall(b"hello")
        with listener.accept()[0] as server:
            server.settimeout(10)
            assert server.recv(100) == b"hello"
            transfer(client, server, 10)
            transfer(server, client, 10)
        found = segments(capture.close(), listener.getsockname()[1])
    kinds = [{kind for kind, _, _ in walk_options(s.options)} for s in found[:2]]
    assert [_OPTION_MPTCP in of_one for of_one in kinds] == [True, both]


def test_without_timestamps(lab: Lab) -> None:
    """Also with an interface that announces nothing but its MSS."""
    netns = lab.place("x/client").netns
    off = {"net/ipv4/tcp_timestamps": "0", "net/ipv4/tcp_sack": "0", "net/ipv4/tcp_window_scaling": "0"}
    write_sysctls(netns, off)
    try:
        with lab.capture("node:a") as capture, connection(lab, "x/client", "x/server") as (client, server):
            transfer(client, server, 10)
            transfer(server, client, 10)
            found = segments(capture.close(), server.getsockname()[1])
    finally:
        write_sysctls(netns, dict.fromkeys(off, "1"))
    assert _OPTION_TIMESTAMPS not in {kind for kind, _, _ in walk_options(found[0].options)}


@pytest.mark.parametrize("mtu", [1280, 1400])
def test_a_small_mtu(plugin: Path, tmp_path: Path, mtu: int) -> None:
    with _mtu_lab(plugin, tmp_path, mtu) as lab:
        assert f"mtu {mtu}" in lab.run("x/client", "ip", "link", "show", "eth0")
        for version in VERSIONS:
            with lab.capture("x/server") as capture:
                with connection(lab, "x/client", "x/server", version) as (client, server):
                    port = server.getsockname()[1]
                    client.sendall(b"hello")
                    assert server.recv(10) == b"hello"
                sizes = [len(s.packet) for s in segments(capture.close(), port)]
            assert max(sizes) <= mtu
            with connection(lab, "x/client", "x/server", version) as (client, server):
                transfer(client, server, 5)
                transfer(server, client, 5)
            _exchange_datagrams(lab, version)
        if mtu == 1280:
            _assert_large_identity_is_refused(lab)


def _exchange_datagrams(lab: Lab, version: int) -> None:
    """Send what QUIC begins with, many before the first answer."""
    burst = [bytes((n,)) * 1_200 for n in range(20)]
    with (
        lab.open_socket("x/server", FAMILIES[version], socket.SOCK_DGRAM) as server,
        lab.open_socket("x/client", FAMILIES[version], socket.SOCK_DGRAM) as client,
    ):
        for end in (server, client):
            end.settimeout(10.0)
        server.bind((str(lab.address_of("x/server", version)), 0))
        client.connect(server.getsockname()[:2])
        for datagram in burst:
            client.send(datagram)
        received = [server.recvfrom(2_048) for _ in burst]
        assert sorted(datagram for datagram, _ in received) == burst
        server.sendto(burst[0], received[0][1])
        assert client.recv(2_048) == burst[0]


def _large(name: str, count: int) -> PodSpec:
    """Describe a pod whose labels do not compress; the last is the longest."""
    labels = {f"example.org/label-{n}": os.urandom(20 + n // 2).hex() for n in range(count)}
    return PodSpec(PodRef("x", name), "a", labels=labels)


def _assert_large_identity_is_refused(lab: Lab) -> None:
    before = len(lab.node("a").endpoints())
    with pytest.raises(LabError) as refusal:
        lab.add_pod(_large("large", 20))
    text = str(refusal.value)
    assert "identity of x/large takes " in text
    assert "(MTU 1280) has room for " in text
    assert "its largest labels: example.org/label-1" in text
    assert "code 101" in text
    assert len(lab.node("a").endpoints()) == before
    lab.add_pod(_large("smaller", 3))
    lab.remove_pod("x/smaller")
