# SPDX-License-Identifier: Apache-2.0
"""Established flows in the kernel: which are found, how they end, and what is left alone."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import pytest

from enforcer_daemon.dataplane import established, netlink
from enforcer_daemon.dataplane.backends import choose_backend
from enforcer_daemon.dataplane.established import ReleasedFlow, end_flows, highest_index, list_released
from enforcer_daemon.dataplane.netlink import SOCK_DESTROY
from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.dataplane.tools import run_in
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.marks import MAX_INDEX, released_mark
from enforcer_daemon.model import Direction
from enforcer_daemon.settings import RulesBackend
from enforcer_daemon.verdict import DROP, Action, Verdict
from tests.netns.lab import NODE, PATIENCE_S, POD, REMOTE, Lab, Recorder, open_lab, serve, wait_until

pytestmark = pytest.mark.kernel

PORT = 8080
PEER = 7
"""The index that flows of these tests are released with."""


@dataclass
class Ended:
    """A evaluate that ends flows by a condition, and counts what it was asked."""

    condition: Callable[[ReleasedFlow], bool] = lambda flow: True
    allowed: frozenset[int] = frozenset()

    def is_index_allowed(self, index: int) -> bool:
        return index in self.allowed

    def is_ended(self, flow: ReleasedFlow) -> bool:
        return self.condition(flow)


def release(packet: bytes, direction: Direction, mark: int) -> Verdict:
    return Verdict(Action.RELEASE, mark=released_mark(PEER))


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Yield a pod whose rules release all that its queue sees, as flows of one index."""
    with open_lab() as lab:
        choose_backend(RulesBackend.AUTO).apply(lab.pod, lab.rules())
        yield lab


@contextmanager
def flow(
    lab: Lab, direction: Direction, version: int, port: int = PORT
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield the pod's and the remote's end of a connection."""
    client_at, server_at = (lab.remote, lab.pod) if direction is Direction.INGRESS else (lab.pod, lab.remote)
    address = (POD if direction is Direction.INGRESS else REMOTE)[version]
    with lab.listen(server_at, version, port) as listener, lab.open_socket(client_at, version) as client:
        client.connect((address, port))
        server, _ = listener.accept()
        with server:
            server.settimeout(PATIENCE_S)
            yield (server, client) if direction is Direction.INGRESS else (client, server)


def is_gso(end: socket.socket) -> bool:
    """Return whether an end has had a RST, or its own kernel's word that it is over."""
    end.settimeout(PATIENCE_S)
    try:
        end.recv(1)
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return False


def says(one: socket.socket, other: socket.socket) -> bool:
    one.sendall(b"x")
    return other.recv(1) == b"x"


def released(lab: Lab) -> list[ReleasedFlow]:
    return open_in(lab.pod, list_released)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("direction", list(Direction))
def test_a_flow_is_listed_and_cut_at_both_ends(lab: Lab, direction: Direction, version: int) -> None:
    with serve(lab, Recorder(release)), flow(lab, direction, version) as (pod, remote):
        assert says(pod, remote)
        (found,) = released(lab)
        opener = remote if direction is Direction.INGRESS else pod
        assert (found.protocol, found.index, found.destination_port) == (6, PEER, PORT)
        assert (str(found.source), found.source_port) == opener.getsockname()[:2]
        assert found.answering == (found.destination, PORT)
        assert highest_index(lab.pod) == PEER

        assert end_flows(lab.pod, Ended()) == [found]

        assert is_gso(pod)
        assert is_gso(remote)
        assert released(lab) == []
        assert highest_index(lab.pod) == 0


def test_flows_that_may_go_on_are_not_touched(lab: Lab) -> None:
    with serve(lab, Recorder(release)), flow(lab, Direction.INGRESS, 4) as one, flow(lab, Direction.EGRESS, 6) as two:
        asked: list[ReleasedFlow] = []
        assert end_flows(lab.pod, Ended(asked.append, frozenset({PEER}))) == []  # type: ignore[arg-type]
        assert asked == []
        assert end_flows(lab.pod, Ended(lambda found: found.source.version == 6)) != []
        assert says(*one)
        assert says(*reversed(one))
        assert is_gso(two[0])
        assert len(released(lab)) == 1


def test_a_listening_socket_lives_on_and_takes_the_next_connection(lab: Lab) -> None:
    """Also where conntrack remembers a connection whose socket is gone, so that only the listener is found."""
    with serve(lab, Recorder(release)), lab.listen(lab.pod, 4) as listener:
        for _ in range(3):
            with lab.open_socket(lab.remote, 4) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.connect((POD[4], PORT))
                listener.accept()[0].close()
        end_flows(lab.pod, Ended())
        with lab.open_socket(lab.remote, 4) as client:
            client.connect((POD[4], PORT))
            listener.accept()[0].close()


@pytest.mark.parametrize("version", [4, 6])
def test_a_socket_in_time_wait_is_no_error(lab: Lab, version: int) -> None:
    with serve(lab, Recorder(release)), lab.listen(lab.remote, version) as listener:
        with lab.open_socket(lab.pod, version) as client:
            client.connect((REMOTE[version], PORT))
            server, _ = listener.accept()
            client.close()  # first, so that the pod's end is the one that waits
            with server:
                assert server.recv(1) == b""
        assert wait_until(lambda: "TIME-WAIT" in run_in(lab.pod, ("ss", "-tan")))
        assert len(released(lab)) == 1
        assert len(end_flows(lab.pod, Ended())) == 1
        assert released(lab) == []


def test_a_connection_of_an_ipv6_listener_for_both_families_is_cut(lab: Lab) -> None:
    with (
        serve(lab, Recorder(release)),
        lab.open_socket(lab.pod, 6) as listener,
        lab.open_socket(lab.remote, 4) as client,
    ):
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", PORT))
        listener.listen()
        client.connect((POD[4], PORT))
        server, _ = listener.accept()
        with server:
            end_flows(lab.pod, Ended())
            assert is_gso(server)
            assert is_gso(client)


def test_a_connection_that_a_sidecar_took_over_is_cut(lab: Lab) -> None:
    redirect = ("iptables", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "80", "-j", "REDIRECT")
    run_in(lab.pod, (*redirect, "--to-ports", str(PORT)))
    with serve(lab, Recorder(release)), lab.listen(lab.pod, 4) as sidecar, lab.open_socket(lab.remote, 4) as client:
        client.connect((POD[4], 80))
        server, _ = sidecar.accept()
        with server:
            assert says(client, server)
            (found,) = end_flows(lab.pod, Ended())
            assert (found.destination_port, found.answering[1]) == (80, PORT)
            assert is_gso(server)
            assert is_gso(client)


@pytest.mark.parametrize("version", [4, 6])
def test_a_udp_flow_loses_its_mark_and_is_judged_anew(lab: Lab, version: int) -> None:
    evaluate = Recorder(release)
    with ExitStack() as stack:
        stack.enter_context(serve(lab, evaluate))
        pod, remote = (
            stack.enter_context(lab.open_socket(place, version, socket.SOCK_DGRAM)) for place in (lab.pod, lab.remote)
        )
        remote.bind((REMOTE[version], 53))
        pod.connect((REMOTE[version], 53))
        pod.send(b"one")
        data, back = remote.recvfrom(10)
        remote.sendto(b"answer", back)
        assert (data, pod.recv(10), len(evaluate.seen)) == (b"one", b"answer", 1)

        (found,) = end_flows(lab.pod, Ended())

        assert (found.protocol, found.destination_port) == (17, 53)
        evaluate.answer = lambda *_: DROP
        pod.send(b"two")
        remote.sendto(b"late answer", back)
        assert wait_until(lambda: len(evaluate.seen) == 3)
        pod.settimeout(0.1)
        remote.settimeout(0.1)
        for end in (pod, remote):
            with pytest.raises(TimeoutError):
                end.recv(10)
        assert pod.fileno() >= 0  # the socket is the application's, for other peers too


@pytest.mark.parametrize("version", [4, 6])
def test_flows_of_the_node_are_never_asked_about(lab: Lab, version: int) -> None:
    with lab.listen(lab.pod, version) as listener, lab.open_socket(lab.node, version) as probe:
        probe.connect((POD[version], PORT))
        server, _ = listener.accept()
        with server:
            assert end_flows(lab.pod, Ended()) == []
            assert says(probe, server)
            assert NODE[version] in server.getpeername()[0]


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_the_mark_goes_also_where_the_kernel_destroys_no_sockets(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A kernel without INET_DIAG_DESTROY answers EOPNOTSUPP, which is no error: the flow ends with its next data."""
    real = netlink.acknowledged

    def refusing(sock: socket.socket, kind: int, body: bytes, tolerated: Container[int] = ()) -> None:
        if kind != SOCK_DESTROY:
            real(sock, kind, body, tolerated)
        elif code not in tolerated:
            raise DataplaneError(os.strerror(code))

    monkeypatch.setattr(established, "acknowledged", refusing)
    evaluate = Recorder(release)
    with serve(lab, evaluate), flow(lab, Direction.INGRESS, 4) as (pod, remote):
        expected = nullcontext() if code == errno.EOPNOTSUPP else pytest.raises(DataplaneError, match="not permitted")
        with expected:
            end_flows(lab.pod, Ended())
        assert released(lab) == []
        seen = len(evaluate.seen)
        evaluate.answer = lambda *_: DROP
        remote.sendall(b"more")
        assert wait_until(lambda: len(evaluate.seen) > seen)
        assert pod.fileno() >= 0


def test_the_highest_index_fits_the_mark(lab: Lab) -> None:
    evaluate = Recorder(lambda *_: Verdict(Action.RELEASE, mark=released_mark(MAX_INDEX)))
    with serve(lab, evaluate), flow(lab, Direction.INGRESS, 4):
        assert highest_index(lab.pod) == MAX_INDEX
        assert [found.index for found in released(lab)] == [MAX_INDEX]


def test_two_thousand_flows_are_judged_in_a_moment(lab: Lab) -> None:
    with serve(lab, Recorder(release)), ExitStack() as stack, lab.listen(lab.pod, 4) as listener:
        pairs = []
        for _ in range(2_000):
            client = stack.enter_context(lab.open_socket(lab.remote, 4))
            client.connect((POD[4], PORT))
            server, _ = listener.accept()
            pairs.append((stack.enter_context(server), client))
        doomed = pairs[1_000][1].getsockname()[1]
        started = time.monotonic()
        assert end_flows(lab.pod, Ended(allowed=frozenset({PEER}))) == []
        judged_s = time.monotonic() - started
        started = time.monotonic()
        (ended,) = end_flows(lab.pod, Ended(lambda found: found.source_port == doomed))
        decoded_s = time.monotonic() - started
        print(f"2,000 flows: by index {judged_s * 1e3:.1f} ms, each by its addresses {decoded_s * 1e3:.1f} ms")  # noqa: T201
        assert ended.source_port == doomed
        assert judged_s < 0.5
        assert is_gso(pairs[1_000][0])
        assert all(says(*pair) for pair in (pairs[0], pairs[999], pairs[1_001], pairs[1_999]))


def test_no_descriptor_is_left(lab: Lab) -> None:
    with serve(lab, Recorder(release)), flow(lab, Direction.INGRESS, 4):
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        end_flows(lab.pod, Ended())
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
