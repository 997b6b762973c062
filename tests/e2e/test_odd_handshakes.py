# SPDX-License-Identifier: Apache-2.0
"""Handshakes as only some kernels and programs do them: each with a result that is known beforehand."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from enforcer_daemon.handshake.frames import find_proof, is_frame
from enforcer_daemon.packet.tcp import ACK, RST, SYN, SYN_ACK, TCP_MAX_HEADER, TCP_MIN_HEADER, walk_options
from tests.e2e.odd_world import (
    RESET_ON_CLOSE,
    VERSIONS,
    bound,
    carries_words,
    half_open,
    odd_world,
    paused,
    sysctls,
    wait_until,
)
from tests.e2e.operation_world import (
    FAMILIES,
    app,
    connection,
    denials,
    dial,
    listening,
    outcome,
    policy,
    read_all,
    segments,
    transfer,
)
from trireme_lab import Lab, Outcome
from trireme_lab.manifests import object_ref
from trireme_lab.netns import open_socket

pytestmark = pytest.mark.kernel

IPV6_HOPOPTS, IPV6_DSTOPTS = 54, 59
PADDING = bytes((0, 0, 1, 4, 0, 0, 0, 0))
"""An extension header that holds nothing but a PadN option (RFC 8200, section 4.2)."""
TCP_MD5SIG, OPTION_MD5 = 14, 19
TCP_FASTOPEN, TCP_FASTOPEN_CONNECT, MSG_FASTOPEN = 23, 30, 0x2000_0000
FAST_OPEN, FAST_OPEN_WITHOUT_COOKIE = 0x3, 0x607
"""net.ipv4.tcp_fastopen: client and server; and neither asks for a cookie."""
FAST_OPEN_KIND = 34
NO_ACK_YET = (errno.EINPROGRESS, errno.EAGAIN)
SYN_SENT = 2


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    with odd_world(plugin) as lab:
        yield lab


# Both at once.


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("both", [True, False], ids=["both allowed", "one allowed"])
def test_simultaneous_open(lab: Lab, version: int, *, both: bool) -> None:
    """Both SYNs are under way before either arrives. If only one may come, it is a connection like any other.

    Where they cross in a node, its conntrack can make an entry of each, and then drops one: both leave their pods.
    """
    allow = policy("back", "client", ingress=[{"from": [app("server")]}])
    if both:
        assert lab.apply(allow)
    port, before = 7000 + version, half_open(lab)
    try:
        with (
            lab.capture("x/client") as of_client,
            lab.capture("x/server") as of_server,
            bound(lab, "x/client", version, port) as one,
            bound(lab, "x/server", version, port) as two,
        ):
            with paused(lab, "a", "b"):
                for end, place in ((one, "x/server"), (two, "x/client")):
                    end.setblocking(False)
                    assert end.connect_ex((str(lab.place(place).address(version)), port)) in NO_ACK_YET
            for end in (one, two):
                end.settimeout(20)
                wait_until(lambda end=end: _is_connected(end), "both ends are connected")  # type: ignore[misc]
            assert carries_words(one, two)
            transfer(one, two, 2)
            transfer(two, one, 2)
            for place, capture in (("x/client", of_client), ("x/server", of_server)):
                own = lab.place(place).address(version).packed
                seen = segments(capture.close(), port)
                assert any(segment.src == own and segment.flags & SYN_ACK == SYN for segment in seen)
        assert half_open(lab) <= before
    finally:
        if both:
            lab.remove(object_ref(allow))


def _is_connected(end: socket.socket) -> bool:
    error = end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    assert error == 0, errno.errorcode[error]
    return end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 1


# Servers under pressure.


@pytest.mark.parametrize("version", VERSIONS)
def test_syn_cookies(lab: Lab, version: int) -> None:
    """The server's kernel remembers nothing of the SYN; its sequence number comes back in the ACK with the proof."""
    with sysctls(lab, "x/server", {"net/ipv4/tcp_syncookies": "2"}):
        before = _sent_cookies(lab)
        for _ in range(5):
            with connection(lab, "x/client", "x/server", version) as ends:
                assert carries_words(*ends)
        with connection(lab, "x/client", "x/server", version) as (client, server):
            transfer(server, client, 2)
            transfer(client, server, 2)
        assert _sent_cookies(lab) - before >= 6


def _sent_cookies(lab: Lab) -> int:
    names, values = (line.split() for line in lab.run("x/server", "grep", "^TcpExt:", "/proc/net/netstat").splitlines())
    return int(dict(zip(names, values, strict=True))["SyncookiesSent"])


@pytest.mark.parametrize("speaker", ["client", "server"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_full_accept_queue(lab: Lab, version: int, speaker: str) -> None:
    """The kernel throws third ACKs away although the enforcer has seen their proof; when it asks again, all is well."""
    with lab.capture("node:a") as capture, listening(lab, "x/server", version) as listener, ExitStack() as stack:
        port = listener.getsockname()[1]
        with paused(lab, "b"):
            clients = [stack.enter_context(_connecting(lab, listener)) for _ in range(3)]
            wait_until(lambda: len(segments(capture.packets(), port)) >= 3, "the SYNs have left")
            stack_a = stack.enter_context(ExitStack())
            stack_a.enter_context(paused(lab, "a"))
        wait_until(lambda: _request_sockets(lab) == 3, "the server's kernel has answered")
        listener.listen(0)  # The SYNs are in already; of the ACKs that follow, there is room for one.
        stack_a.close()
        for client in clients:
            client.settimeout(20)
            wait_until(lambda client=client: _is_connected(client), "connect() returns")  # type: ignore[misc]
        assert _request_sockets(lab) > 0
        for client in clients if speaker == "client" else ():
            client.sendall(b"hello")
        for _ in clients:
            server = stack.enter_context(listener.accept()[0])
            server.settimeout(20)
            if speaker == "server":
                server.sendall(b"hello")
            else:
                assert read_all(server, 5) == b"hello"
        for client in clients if speaker == "server" else ():
            assert read_all(client, 5) == b"hello"


def _request_sockets(lab: Lab) -> int:
    return len(lab.run("x/server", "ss", "-Htn", "state", "syn-recv").splitlines())


# Options.


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("where", ["x/client", "x/server"])
@pytest.mark.parametrize("option", ["timestamps", "sack", "window_scaling"])
def test_one_option_less(lab: Lab, option: str, where: str, version: int) -> None:
    with (
        sysctls(lab, where, {f"net/ipv4/tcp_{option}": "0"}),
        connection(lab, "x/client", "x/server", version) as (client, server),
    ):
        assert carries_words(client, server)
        transfer(client, server, 2)
        transfer(server, client, 2)


@pytest.mark.parametrize("version", VERSIONS)
def test_explicit_congestion_notification(lab: Lab, version: int) -> None:
    with (
        sysctls(lab, "x/client", {"net/ipv4/tcp_ecn": "1"}),
        lab.capture("node:a") as capture,
        connection(lab, "x/client", "x/server", version) as (client, server),
    ):
        port = server.getsockname()[1]
        transfer(client, server, 2)
        transfer(server, client, 2)
        syn, syn_ack = segments(capture.close(), port)[:2]
    ece, cwr = 0x40, 0x80
    assert (syn.flags, syn_ack.flags) == (SYN | ece | cwr, SYN_ACK | ece)


@pytest.mark.parametrize("version", VERSIONS)
def test_signed_segments_and_a_full_option_space(lab: Lab, version: int) -> None:
    """A signature (RFC 2385) takes 20 bytes, which leaves just enough for the proof; it holds from end to end."""
    with lab.capture("node:a") as capture, listening(lab, "x/server", version) as listener:
        _sign(listener, str(lab.place("x/client").address(version)))
        with open_socket(lab.place("x/client").netns, FAMILIES[version], socket.SOCK_STREAM) as client:
            client.settimeout(20)
            _sign(client, str(lab.place("x/server").address(version)))
            client.connect(listener.getsockname()[:2])
            with listener.accept()[0] as server:
                server.settimeout(20)
                assert carries_words(client, server)
                transfer(server, client, 2)
                found = segments(capture.close(), listener.getsockname()[1])
    assert all(OPTION_MD5 in {kind for kind, _, _ in walk_options(s.options)} for s in found[:2])
    assert find_proof(found[2].options) is not None
    assert len(found[2].options) == TCP_MAX_HEADER - TCP_MIN_HEADER


def _sign(sock: socket.socket, peer: str) -> None:
    """Share a key with a peer (linux/tcp.h, struct tcp_md5sig); skip where the kernel cannot."""
    packed = socket.inet_pton(sock.family, peer)
    address = packed if sock.family == socket.AF_INET else bytes(4) + packed
    storage = struct.pack("=HH124s", sock.family, 0, address)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_MD5SIG, storage + struct.pack("=BBHI80s", 0, 0, 3, 0, b"key"))
    except OSError as err:
        if err.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
            pytest.skip("this kernel cannot sign segments (CONFIG_TCP_MD5SIG)")
        raise


@pytest.mark.parametrize("mss", [536, 1000, 1220])
def test_a_small_segment_size(lab: Lab, mss: int) -> None:
    """The answer must fit the segments that the client says it can take; where it does not, the reason says so."""
    option = [(socket.IPPROTO_TCP, socket.TCP_MAXSEG, mss)]
    with listening(lab, "x/server") as listener:
        if mss == 536:
            with open_socket(lab.place("x/client").netns, socket.AF_INET, socket.SOCK_STREAM) as client:
                client.setsockopt(*option[0])
                client.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    client.connect(listener.getsockname())
            assert denials(lab, "x/server")[-1] == "identity-too-large"
            return
        with dial(lab, "x/client", listener, options=option) as client, listener.accept()[0] as server:
            server.settimeout(20)
            transfer(client, server, 2)
            transfer(server, client, 2)


@pytest.mark.parametrize("ends", [("client",), ("server",), ("client", "server")], ids="+".join)
def test_ipv6_extension_headers(lab: Lab, ends: tuple[str, ...]) -> None:
    """Hop-by-hop and destination options before the TCP header of every packet, SYN and data.

    No bulk: with such headers the kernel's own segmentation stalls now and then, without an enforcer as well.
    """
    options = [(socket.IPPROTO_IPV6, kind, PADDING) for kind in (IPV6_HOPOPTS, IPV6_DSTOPTS)]
    with lab.capture("node:a") as capture, listening(lab, "x/server", 6) as listener:
        port = listener.getsockname()[1]
        with open_socket(lab.place("x/client").netns, socket.AF_INET6, socket.SOCK_STREAM) as client:
            for sock in [end for name, end in (("client", client), ("server", listener)) if name in ends]:
                for option in options:
                    sock.setsockopt(*option)
            client.settimeout(20)
            client.connect(listener.getsockname()[:2])
            with listener.accept()[0] as server:
                server.settimeout(20)
                assert carries_words(client, server)
                for sender, receiver in ((client, server), (server, client)):
                    sender.sendall(bytes(1000))
                    assert len(read_all(receiver, 1000)) == 1000
        found = segments(capture.close(), port)
    assert all(is_frame(s.payload) for s in found if s.flags & SYN)
    extended = 40 + len(options) * len(PADDING)
    for end, own_port in (("client", found[0].sport), ("server", port)):
        offsets = {s.offset for s in found if s.sport == own_port and (s.flags & SYN or s.payload)}
        assert offsets == {extended if end in ends else 40}


# Data in the SYN.


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("sysctl", [FAST_OPEN, FAST_OPEN_WITHOUT_COOKIE], ids=["with cookie", "without"])
@pytest.mark.parametrize("by_option", [True, False], ids=["TCP_FASTOPEN_CONNECT", "MSG_FASTOPEN"])
def test_fast_open_by_the_application(lab: Lab, version: int, sysctl: int, *, by_option: bool) -> None:
    """An ordinary handshake comes of it, also the second time: no cookie is given. The data arrives once."""
    parameters = {"net/ipv4/tcp_fastopen": str(sysctl)}  # It counts for both families.
    with (
        sysctls(lab, "x/client", parameters),
        sysctls(lab, "x/server", parameters),
        lab.capture("node:a") as capture,
        listening(lab, "x/server", version, options=[(socket.IPPROTO_TCP, TCP_FASTOPEN, 16)]) as listener,
    ):
        address = listener.getsockname()[:2]
        for words in (b"first", b"second"):
            with open_socket(lab.place("x/client").netns, FAMILIES[version], socket.SOCK_STREAM) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 10, 0))
                if by_option:
                    client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
                    client.connect(address)
                    client.sendall(words)
                else:
                    client.sendto(words, MSG_FASTOPEN, address)
                client.settimeout(10)
                server, _ = listener.accept()
                with server:
                    server.settimeout(10)
                    assert read_all(server, len(words)) == words
                    assert carries_words(client, server)
        syns = [found for found in segments(capture.close(), address[1]) if found.flags & SYN]
    assert len(syns) >= 4
    assert all(is_frame(syn.payload) for syn in syns)
    assert not any(kind == FAST_OPEN_KIND for syn in syns for kind, _, _ in walk_options(syn.options))


# Resets, at each step.


def _connecting(lab: Lab, listener: socket.socket) -> socket.socket:
    client = open_socket(lab.place("x/client").netns, listener.family, socket.SOCK_STREAM)
    client.setblocking(False)
    assert client.connect_ex(listener.getsockname()[:2]) in NO_ACK_YET
    return client


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_that_gave_up_refuses_the_answer(lab: Lab, version: int) -> None:
    """Its kernel answers the SYN-ACK by RST; neither the server's kernel nor an enforcer keeps anything."""
    before = half_open(lab)
    with listening(lab, "x/server", version) as listener, lab.capture("node:a") as capture:
        with paused(lab, "b"):
            _connecting(lab, listener).close()
            wait_until(lambda: len(segments(capture.packets(), listener.getsockname()[1])) > 0, "the SYN has left")
        port = listener.getsockname()[1]
        wait_until(lambda: any(s.flags & RST for s in segments(capture.packets(), port)), "the refusal has left")
        wait_until(lambda: half_open(lab) <= before, "both enforcers forget it")
        wait_until(lambda: _request_sockets(lab) == 0, "the server's kernel forgets it")
        with dial(lab, "x/client", listener) as client, listener.accept()[0] as server:
            server.settimeout(20)
            assert carries_words(client, server)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_server_that_closed_meanwhile_refuses_the_third_segment(lab: Lab, version: int) -> None:
    """The client's enforcer stands still between the SYN and the answer, so the third segment is sure to come late."""
    before = half_open(lab)
    with lab.capture("x/server") as capture, listening(lab, "x/server", version) as listener:
        port = listener.getsockname()[1]
        with paused(lab, "a"):
            client = _connecting(lab, listener)
        with client:
            wait_until(lambda: any(s.flags & SYN for s in segments(capture.packets(), port)), "the SYN has arrived")
            with paused(lab, "a"):
                listener.close()
            wait_until(lambda: _has_ended(client), "the client is told")
    wait_until(lambda: half_open(lab) <= before, "both enforcers forget it")


def _has_ended(client: socket.socket) -> bool:
    try:
        client.setblocking(False)
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError as err:
        return err.errno in (errno.ECONNRESET, errno.ECONNREFUSED)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_closed_port_refuses_whatever_was_there(lab: Lab, version: int) -> None:
    before = half_open(lab)
    assert outcome(lab, "x/client", "x/server", 9, version) is Outcome.REFUSED
    wait_until(lambda: half_open(lab) <= before, "both enforcers forget it")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_right_after_the_handshake(lab: Lab, who: str, version: int) -> None:
    before = half_open(lab)
    with listening(lab, "x/server", version) as listener, dial(lab, "x/client", listener) as client:
        server, _ = listener.accept()
        with server:
            server.settimeout(20)
            resetting, other = (client, server) if who == "client" else (server, client)
            resetting.setsockopt(*RESET_ON_CLOSE)
            resetting.close()
            with pytest.raises(ConnectionResetError):
                other.recv(1)
    wait_until(lambda: half_open(lab) <= before, "both enforcers forget it")


@pytest.mark.parametrize("version", VERSIONS)
def test_data_in_the_third_segment_arrives_once(lab: Lab, version: int) -> None:
    """What is written before connect() has returned leaves with the ACK that acknowledges the SYN-ACK."""
    quick_ack_off = [(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)]
    with lab.capture("node:a") as capture, listening(lab, "x/server", version) as listener:
        with dial(lab, "x/client", listener, options=quick_ack_off) as client:
            client.sendall(b"at once")
            with listener.accept()[0] as server:
                server.settimeout(20)
                client.shutdown(socket.SHUT_WR)
                assert read_all(server, 100) == b"at once"
        sent = [s for s in segments(capture.close(), listener.getsockname()[1]) if s.sport != listener.getsockname()[1]]
    assert (sent[1].payload, bool(sent[1].flags & ACK)) == (b"at once", True)
    assert find_proof(sent[1].options) is not None
