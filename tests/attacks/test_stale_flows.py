# SPDX-License-Identifier: Apache-2.0
"""A flow outlives its pod or its identity nowhere: who has the address next, or is another now, sends into nothing.

The attacker has CAP_NET_RAW and sends whole frames past the rules of its own pod, under its own address, which is that
of the pod that had the flow; or it has plain sockets alone. Each test first sends the same frames as the rightful
owner of the flow, which arrive.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
from scapy.layers.inet import TCP, UDP

from enforcer_daemon.handshake.datagrams import PIGGYBACKED_EXID
from enforcer_daemon.handshake.frames import MARKER_ID, encode_again, encode_proof
from enforcer_daemon.model import PodRef, Protocol
from enforcer_daemon.packet.udp import UDPDatagram, decode_udp, with_marker, with_option
from tests.e2e.attackers import Listener, Wire, endpoint_of
from tests.e2e.operation_world import FAMILIES, NODES, Stream, app, connection, pod, policy
from tests.e2e.raw_pod import RawPod, Scene, fresh_marker
from trireme_lab import Lab, LabError, LabSpec, PodSpec, PortSpec, ServicePort, ServiceSpec, Tools
from trireme_lab.manifests import object_ref
from trireme_lab.netns import exec_prefix, run
from trireme_lab.network import node_rules

pytestmark = pytest.mark.kernel

PORT = 5353
REUSED = {
    "a": (ip_address("10.244.1.77"), ip_address("fd00:10:244:1::77")),
    "b": (ip_address("10.244.2.77"), ip_address("fd00:10:244:2::77")),
}
MANIFESTS = (
    policy("server", "server", ingress=[{"from": [app("old")]}]),
    policy("client", "client", ingress=[], egress=[{"to": [app("old")]}]),
    policy("caged", "caged", egress=[]),
    policy("backend", "backend", ingress=[{"from": [app("caged-client"), app("free-client"), app("far-client")]}]),
    policy("caged-client", "caged-client", ingress=[], egress=[{"to": [app("backend")]}]),
    policy("quarantine", "quarantine", ingress=[], egress=[]),
)
ECHO = PortSpec(7007, Protocol.UDP)
PODS = (
    pod("server", "a"),
    pod("client", "a"),
    pod("caged-client", "a"),
    pod("free-client", "a"),
    pod("far-client", "b"),
    pod("backend-1", "b", ECHO, app="backend"),
    pod("backend-2", "b", ECHO, app="backend"),
)
SERVICE = ServiceSpec(
    "x",
    "dns",
    (ip_address("10.96.0.53"), ip_address("fd00:10:96::53")),
    (PodRef("x", "backend-1"),),
    (ServicePort(53, ECHO.number, Protocol.UDP),),
)
RECOVERY_S = 2.0
versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
nodes = pytest.mark.parametrize("node", ["a", "b"], ids=["one-node", "two-nodes"])
# Of version, node, bridge-nf and newcomer each value meets each value of the others, and the rest is left out.
placed = pytest.mark.parametrize(
    ("version", "node", "bridge_filter"),
    [(4, "a", True), (4, "b", False), (6, "a", False), (6, "b", True)],
    indirect=["bridge_filter"],
)
newcomers = pytest.mark.parametrize(
    ("version", "node", "newcomer", "bridge_filter"),
    [
        (4, "a", "free", True),
        (4, "b", "free", True),
        (4, "b", "caged", False),
        (6, "a", "caged", False),
        (6, "b", "free", False),
        (6, "b", "caged", True),
    ],
    indirect=["bridge_filter"],
)
bridges = pytest.mark.parametrize("bridge_filter", [True, False], ids=["bridge-nf", "no-bridge-nf"], indirect=True)
QUIET_S = 0.5
PATIENCE_S = 10.0


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    with Lab(LabSpec(NODES, {"x": {}}, PODS, (), (SERVICE,), MANIFESTS), Tools(plugin=plugin)) as lab:
        yield lab


@pytest.fixture
def bridge_filter(request: pytest.FixtureRequest, lab: Lab) -> Iterator[bool]:
    """Have the bridge of the server's node show netfilter what it switches, or not."""
    names = [f"net.bridge.bridge-nf-call-{tool}" for tool in ("iptables", "ip6tables")]
    before = [lab.run("node:a", "sysctl", "-n", name).strip() for name in names]
    try:
        lab.run("node:a", "sysctl", "-qw", *(f"{name}={int(request.param)}" for name in names))
        yield bool(request.param)
    finally:
        lab.run("node:a", "sysctl", "-qw", *(f"{name}={value}" for name, value in zip(names, before, strict=True)))


def _spec(name: str, node: str, label: str, *ports: PortSpec) -> PodSpec:
    return PodSpec(PodRef("x", name), node, labels={"app": label}, addresses=REUSED[node], ports=ports)


@contextmanager
def _pod(lab: Lab, name: str, node: str, label: str) -> Iterator[str]:
    """Yield a pod at the address that is used again."""
    lab.add_pod(_spec(name, node, label))
    for place in ("x/server", "x/client", "node:a", "node:b"):  # The pod before had another MAC.
        lab.run(place, "ip", "neigh", "flush", "to", str(REUSED[node][0]))
        lab.run(place, "ip", "-6", "neigh", "flush", "to", str(REUSED[node][1]))
    try:
        yield f"x/{name}"
    finally:
        if lab.has_pod(f"x/{name}"):
            lab.remove_pod(f"x/{name}")


Disguise = Callable[[UDPDatagram], bytes]
"""What makes a datagram look like one of an enforcer: packet in, packet out."""


def marked(datagram: UDPDatagram) -> bytes:
    """Set the marker, and carry nothing."""
    return with_marker(datagram, MARKER_ID)


def beside_a_made_up_proof(datagram: UDPDatagram) -> bytes:
    return with_option(datagram, PIGGYBACKED_EXID, encode_proof(os.urandom(16), os.urandom(16)), MARKER_ID)


def beside_a_request(datagram: UDPDatagram) -> bytes:
    return with_option(datagram, PIGGYBACKED_EXID, encode_again(os.urandom(16)), MARKER_ID)


DISGUISES = (None, marked, beside_a_made_up_proof, beside_a_request)


@dataclass
class DatagramFlow:
    """A flow that is released at both ends, by what the attacker's end of it sends."""

    lab: Lab
    own: int
    """Port of the end whose pod goes or changes."""
    far: str
    far_port: int
    version: int
    heard: Callable[[], list[bytes]]
    """Returns what the application at the far end has received since it was last asked."""

    def frames(self, sender: str, marker: bytes, disguise: Disguise | None) -> list[bytes]:
        scene = Scene(self.lab, sender, self.far, "", "", self.version)
        packet = scene.packet(sender, self.far) / UDP(sport=self.own, dport=self.far_port) / marker
        if disguise is not None:
            plain = decode_udp(bytes(packet))
            packet = type(packet)(disguise(plain))
        with RawPod(self.lab, sender) as raw:
            return raw.frames(self.far, [packet])

    def arrives_raw(self, sender: str, times: int = 5, disguise: Disguise | None = None) -> bool:
        """Send by packet socket; tell whether the application reads it."""
        marker = fresh_marker()
        frames = self.frames(sender, marker, disguise)
        with RawPod(self.lab, sender) as raw:
            return self._arrives(marker, lambda: raw.send_frame(frames[0]), times)

    def arrives(self, sock: socket.socket, times: int = 5, size: int = 0) -> bool:
        """Send by a plain socket, each datagram of a size; tell whether the application reads one."""
        marker = fresh_marker()
        return self._arrives(marker, lambda: sock.sendto(marker.ljust(size), self.target), times)

    @property
    def target(self) -> tuple[str, int]:
        return str(self.lab.place(self.far).address(self.version)), self.far_port

    def _arrives(self, marker: bytes, send: Callable[[], object], times: int) -> bool:
        for _ in range(times):
            send()
            deadline = time.monotonic() + max(QUIET_S / times, 0.05)
            while time.monotonic() < deadline:
                if any(heard.startswith(marker) for heard in self.heard()):
                    return True
                time.sleep(0.01)
        return False


def _await(is_there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_there():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@contextmanager
def _served(lab: Lab, client: str, server: str, version: int, port: int) -> Iterator[tuple[socket.socket, Listener]]:
    """Yield a flow between two pods' sockets, in use for so long that it is in the kernel at both ends."""
    with ExitStack() as stack:
        listener = stack.enter_context(Listener(lab, server, port, version, socket.SOCK_DGRAM))
        sock = stack.enter_context(lab.open_socket(client, FAMILIES[version], socket.SOCK_DGRAM))
        sock.bind((str(lab.place(client).address(version)), port))
        sock.connect((str(lab.place(server).address(version)), port))
        sock.setblocking(False)
        _exchange(sock, listener, client, lab, version)
        yield sock, listener


def _exchange(sock: socket.socket, listener: Listener, client: str, lab: Lab, version: int) -> None:
    back = str(lab.place(client).address(version)), listener.port
    rounds = 0
    deadline = time.monotonic() + PATIENCE_S
    while rounds < 5:
        assert time.monotonic() < deadline, "the flow does not come about"
        sock.send(b"question")
        time.sleep(0.05)
        if b"question" in listener.received():
            listener.socket.sendto(b"answer", back)
            time.sleep(0.05)
            rounds += _has(sock, b"answer")


def _has(sock: socket.socket, wanted: bytes) -> bool:
    return wanted in _drain(sock)


def _drain(sock: socket.socket) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(sock.recv(2048))
        except BlockingIOError:
            return found
        except ConnectionRefusedError:
            continue


# A pod that is dead, and who has its address now.


@newcomers
def test_a_new_pod_with_the_address_of_a_dead_client(
    lab: Lab, version: int, node: str, newcomer: str, bridge_filter: bool, port: int
) -> None:
    with _pod(lab, "old", node, "old") as old, ExitStack() as stack:
        sock, listener = stack.enter_context(_served(lab, old, "x/server", version, port))
        flow = DatagramFlow(lab, port, "x/server", port, version, listener.received)
        assert flow.arrives_raw(old)
        sock.close()
        lab.remove_pod(old)
        with _pod(lab, "new", node, newcomer) as new:
            for disguise in DISGUISES:
                assert not flow.arrives_raw(new, disguise=disguise), disguise


@versions
def test_the_marker_costs_the_rightful_owner_nothing(lab: Lab, version: int, port: int) -> None:
    """It may be there by chance, for one datagram of a flow or for all of them, long after the handshake."""
    with _pod(lab, "old", "b", "old") as old, ExitStack() as stack:
        _, listener = stack.enter_context(_served(lab, old, "x/server", version, port))
        flow = DatagramFlow(lab, port, "x/server", port, version, listener.received)
        for _ in range(3):
            assert flow.arrives_raw(old, disguise=marked)
            time.sleep(1.5)


@newcomers
def test_a_new_pod_with_the_address_of_a_dead_server(
    lab: Lab, version: int, node: str, newcomer: str, bridge_filter: bool, port: int
) -> None:
    """The client goes on asking; who has the server's address now answers by packet socket."""
    with _pod(lab, "old", node, "old") as old, ExitStack() as stack:
        sock, _ = stack.enter_context(_served(lab, "x/client", old, version, port))
        flow = DatagramFlow(lab, port, "x/client", port, version, lambda: _drain(sock))
        assert flow.arrives_raw(old)
        lab.remove_pod(old)
        with _pod(lab, "new", node, newcomer) as new:
            for disguise in DISGUISES:
                sock.send(b"still asking")
                assert not flow.arrives_raw(new, disguise=disguise), disguise


@placed
def test_a_plain_socket_while_the_servers_enforcer_is_down(
    lab: Lab, version: int, node: str, bridge_filter: bool, port: int
) -> None:
    """Nobody answers its offer, and large datagrams have no room for it: they leave plain, by the address."""
    with _pod(lab, "old", node, "old") as old, ExitStack() as stack:
        client, listener = stack.enter_context(_served(lab, old, "x/server", version, port))
        flow = DatagramFlow(lab, port, "x/server", port, version, listener.received)
        assert flow.arrives(client, size=1_300)
        client.close()
        lab.remove_pod(old)
        with _pod(lab, "new", node, "free") as new, ExitStack() as down:
            if node == "b":
                lab.node("a").kill()
                down.callback(lab.node("a").wait_ready)
                down.callback(lab.node("a").start)
            with lab.open_socket(new, FAMILIES[version], socket.SOCK_DGRAM) as sock:
                sock.bind((str(lab.place(new).address(version)), port))
                assert not flow.arrives(sock, times=20)
                assert not flow.arrives(sock, times=20, size=1_300)


@dataclass
class Connection:
    """A connection whose one end dies without a word, as what the other end's kernel shows of it."""

    lab: Lab
    version: int
    ports: tuple[int, int]
    """Those of the end that dies, and of the server."""
    numbers: tuple[int, int]
    """The sequence numbers that a keepalive of the server asks for."""

    def frames(self, sender: str, server: str, data: bytes) -> list[bytes]:
        scene = Scene(self.lab, sender, server, "", "", self.version)
        segment = TCP(sport=self.ports[0], dport=self.ports[1], seq=self.numbers[0], ack=self.numbers[1], flags="PA")
        with RawPod(self.lab, sender) as raw:
            return raw.frames(server, [scene.packet(sender, server) / segment / data])


@contextmanager
def _left_connection(lab: Lab, old: str, version: int, port: int) -> Iterator[tuple[socket.socket, Connection]]:
    """Yield the server's end of a connection, whose other end is silenced before its pod dies: no FIN, no RST."""
    with ExitStack() as stack:
        listener = stack.enter_context(Listener(lab, "x/server", port, version))
        client = stack.enter_context(lab.open_socket(old, FAMILIES[version], socket.SOCK_STREAM))
        wire = stack.enter_context(Wire(lab, "x/server", version))
        client.connect((str(listener.ip), port))
        server = listener.accept()
        client.send(b"hello")
        assert server.recv(5) == b"hello"
        server.send(b"welcome")
        assert client.recv(7) == b"welcome"
        own_port = client.getsockname()[1]
        # Its last segment shows what a keepalive would: numbers of both sides.
        last = wire.await_segment(lambda found: found.sport == own_port and found.payload == b"hello")
        acknowledged = wire.await_segment(lambda found: found.sport == port and found.payload == b"welcome")
        numbers = acknowledged.ack, (acknowledged.seq + len(b"welcome")) & 0xFFFF_FFFF
        assert last.seq + len(b"hello") == numbers[0]
        tool = "iptables" if version == 4 else "ip6tables"
        lab.run(old, tool, "-t", "raw", "-I", "OUTPUT", "-p", "tcp", "-j", "DROP")
        yield server, Connection(lab, version, (own_port, port), numbers)


@newcomers
def test_data_in_the_connection_of_a_pod_that_died_without_a_word(
    lab: Lab, version: int, node: str, newcomer: str, bridge_filter: bool, port: int
) -> None:
    with _pod(lab, "old", node, "old") as old, _left_connection(lab, old, version, port) as (server, left):
        with RawPod(lab, old) as raw:  # The control: these numbers are right.
            raw.send_frame(left.frames(old, "x/server", b"control")[0])
        assert server.recv(100) == b"control"
        left.numbers = left.numbers[0] + len(b"control"), left.numbers[1]
        lab.remove_pod(old)
        with _pod(lab, "new", node, newcomer) as new, RawPod(lab, new) as raw:
            for _ in range(5):
                raw.send_frame(left.frames(new, "x/server", b"injected")[0])
                assert _reads(server) in (b"", None)


def _reads(server: socket.socket) -> bytes | None:
    """Read what comes at once: nothing, or b"" where the connection was ended."""
    server.settimeout(0.1)
    try:
        return server.recv(100)
    except TimeoutError:
        return None
    except ConnectionError:
        return b""


@versions
def test_a_stale_servers_keepalive_ends_its_connection_and_shows_nothing(lab: Lab, version: int, port: int) -> None:
    """The pod that has the address now could read the numbers off it."""
    with _pod(lab, "old", "b", "old") as old, _left_connection(lab, old, version, port) as (server, _):
        lab.remove_pod(old)
        with _pod(lab, "new", "b", "caged") as new, Wire(lab, new, version) as wire:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
            server.settimeout(PATIENCE_S)
            with pytest.raises(ConnectionResetError):
                server.recv(1)
            assert wire.find_segment(lambda found: found.sport == port, 0.2) is None


# A pod whose labels change.


@placed
def test_a_relabelled_pod_sends_into_nothing(lab: Lab, version: int, node: str, bridge_filter: bool, port: int) -> None:
    with _pod(lab, "old", node, "old") as old, ExitStack() as stack:
        _, listener = stack.enter_context(_served(lab, old, "x/server", version, port))
        flow = DatagramFlow(lab, port, "x/server", port, version, listener.received)
        assert flow.arrives_raw(old)
        assert lab.label(old, {"app": "quarantine"})
        assert not flow.arrives_raw(old)


@bridges
@versions
def test_a_relabelled_server_is_heard_no_more(lab: Lab, version: int, bridge_filter: bool, port: int) -> None:
    with _pod(lab, "old", "a", "old") as old, ExitStack() as stack:
        sock, _ = stack.enter_context(_served(lab, "x/client", old, version, port))
        flow = DatagramFlow(lab, port, "x/client", port, version, lambda: _drain(sock))
        assert flow.arrives_raw(old)
        assert lab.label(old, {"app": "quarantine"})
        assert not flow.arrives_raw(old)


@placed
def test_a_label_that_no_policy_asks_for_costs_no_flow(
    lab: Lab, version: int, node: str, bridge_filter: bool, port: int
) -> None:
    """As a leader election sets one: neither datagrams nor a connection notice it, in use or silent."""
    with _pod(lab, "old", node, "old") as old, ExitStack() as stack:
        client, listener = stack.enter_context(_served(lab, old, "x/server", version, port))
        flow = DatagramFlow(lab, port, "x/server", port, version, listener.received)
        one = stack.enter_context(connection(lab, old, "x/server", version))
        silent = stack.enter_context(connection(lab, old, "x/server", version))
        with Stream(*one) as stream:
            for role in ("leader", "follower", "leader"):
                assert lab.label(old, {"app": "old", "role": role})
                stream.wait_for_rounds(10)
                assert flow.arrives(client, times=1)
        silent[0].send(b"still here")
        assert silent[1].recv(10) == b"still here"


@bridges
@versions
def test_a_flow_that_a_policy_ends_is_not_picked_up_again_by_packet_socket(
    lab: Lab, version: int, bridge_filter: bool, port: int
) -> None:
    with _pod(lab, "old", "b", "old") as old, ExitStack() as stack:
        _, listener = stack.enter_context(_served(lab, old, "x/server", version, port))
        flow = DatagramFlow(lab, port, "x/server", port, version, listener.received)
        assert flow.arrives_raw(old)
        closed = policy("old", "old", egress=[])
        assert lab.apply(closed)
        try:
            assert not flow.arrives_raw(old)
        finally:
            assert lab.remove(object_ref(closed))


# The node forgets a flow.


BACKENDS = ("x/backend-1", "x/backend-2")


def _send_service_to(lab: Lab, backend: str) -> None:
    """Do what kube-proxy does when a Service's endpoint goes: other rules, and the UDP entries of the old one away."""
    addresses = list(lab.place(backend).addresses)
    for name, node in lab.nodes.items():
        run([*exec_prefix(node.netns), "nft", "-f", "-"], node_rules([(SERVICE, addresses)]))
        for family, front in zip(("ipv4", "ipv6"), SERVICE.addresses, strict=True):
            with suppress(LabError):  # none is an error for this tool
                lab.run(f"node:{name}", "conntrack", "-D", "-f", family, "-p", "udp", "--orig-dst", str(front))


@pytest.fixture
def service(lab: Lab) -> Iterator[str]:
    _send_service_to(lab, BACKENDS[0])
    try:
        yield BACKENDS[1]
    finally:
        _send_service_to(lab, BACKENDS[0])


@versions
@pytest.mark.parametrize("client", ["x/caged-client", "x/free-client", "x/far-client"])
def test_a_flow_that_the_node_forgot_goes_on_with_the_backend_that_is_there_now(
    lab: Lab, service: str, client: str, version: int
) -> None:
    front = str(SERVICE.addresses[version == 6]), SERVICE.ports[0].port
    with lab.open_socket(client, FAMILIES[version], socket.SOCK_DGRAM) as sock:
        sock.connect(front)
        sock.settimeout(0.5)
        _await(lambda: _is_answered(sock, BACKENDS[0]), "the first backend does not answer")
        for _ in range(3):
            time.sleep(0.5)
            assert _is_answered(sock, BACKENDS[0])
        _send_service_to(lab, service)
        began = time.monotonic()
        while not _is_answered(sock, service):  # asks each half second
            assert time.monotonic() - began < RECOVERY_S, endpoint_of(lab, client)["recent_denials"]
        assert _is_answered(sock, service)


def _is_answered(sock: socket.socket, backend: str) -> bool:
    """Ask; tell whether a backend answers within half a second, by its name."""
    with suppress(ConnectionRefusedError):
        sock.send(b"who is there?")
    deadline = time.monotonic() + 0.5
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            if backend.encode() in sock.recv(2048):
                return True
        except TimeoutError:
            return False
        except ConnectionRefusedError:
            continue
    return False


def test_operators_see_what_the_guard_drops(lab: Lab) -> None:
    with lab.open_socket("x/caged-client", socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", 0))
        port = sock.getsockname()[1]
    scene = Scene(lab, "x/caged-client", "x/server", "", "", 4)
    packet = scene.packet("x/caged-client", "x/server") / UDP(sport=port, dport=4_321) / b"caged"
    with RawPod(lab, "x/caged-client") as raw:
        raw.send("x/server", [packet])
    seen: list[object] = []

    def is_seen() -> bool:
        recent = endpoint_of(lab, "x/caged-client")["recent_denials"]
        assert isinstance(recent, list)
        seen[:] = [denial for denial in recent if denial["port"] == 4_321]
        return bool(seen)

    _await(is_seen, "no denial")
    (denial,) = seen
    assert isinstance(denial, dict)
    assert (denial["direction"], denial["address"]) == ("egress", scene.ip("x/server"))
    assert denial["detail"] == "dropped by the guard on the node"
