# SPDX-License-Identifier: Apache-2.0
"""What the tests of the product in operation share: worlds, policies, connections and transfers in them."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from enforcer_daemon.dataplane.ruleset import QUEUE_NUMBER
from enforcer_daemon.model import PodRef
from enforcer_daemon.packet.ip import decode_ip
from enforcer_daemon.packet.tcp import TCP, Segment, decode_segment
from trireme_lab import Lab, NodeSpec, Outcome, PodSpec, PortSpec
from trireme_lab.netns import open_socket
from trireme_lab.spec import Manifest

NODES = (NodeSpec.numbered("a", 1), NodeSpec.numbered("b", 2))
HTTP = PortSpec(8080)
RESET = {"denyWith": "reset"}
"""Denied attempts end at once, so that tests need not wait for them."""
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_PATIENCE_S = 20.0
_BLOCK_BYTES = 1 << 20
QUEUE = "/proc/net/netfilter/nfnetlink_queue"


def pod(name: str, node: str, *ports: PortSpec, namespace: str = "x", **labels: str) -> PodSpec:
    """Describe a pod that listens on port 8080 unless told otherwise; its label `app` is its name unless given."""
    return PodSpec(PodRef(namespace, name), node, labels={"app": name, **labels}, ports=ports or (HTTP,))


def policy(name: str, app: str | None = None, namespace: str = "x", **directions: Sequence[object]) -> Manifest:
    """Return a NetworkPolicy for the pods of an app (None: for all) with these rules of `ingress` and `egress`."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "podSelector": {} if app is None else {"matchLabels": {"app": app}},
            "policyTypes": [direction.capitalize() for direction in directions],
            **directions,
        },
    }


def app(name: str) -> Mapping[str, object]:
    """Return the peer of a rule: pods of an app."""
    return {"podSelector": {"matchLabels": {"app": name}}}


def block(*cidrs: str) -> list[Mapping[str, object]]:
    """Return the peers of a rule: addresses."""
    return [{"ipBlock": {"cidr": cidr}} for cidr in cidrs]


def outcome(lab: Lab, source: str, target: str, port: int, version: int = 4, *, timeout_s: float = 10.0) -> Outcome:
    """Try one connection and say what came of it; what is allowed may take an emulated processor seconds."""
    return lab.probe_all([replace(lab.request(source, target, port, version), timeout_s=timeout_s)])[0].outcome


def endpoint(lab: Lab, name: str) -> Mapping[str, object]:
    """Return what the enforcer of a pod says of it."""
    return next(e for e in lab.pod_node(name).endpoints() if f"{e['namespace']}/{e['pod']}" == name)


def denials(lab: Lab, name: str) -> list[str]:
    """Return why the enforcer of a pod denied lately, oldest first."""
    recent = endpoint(lab, name)["recent_denials"]
    assert isinstance(recent, list)
    return [str(denial["reason"]) for denial in recent]


@contextmanager
def listening(
    lab: Lab, place: str, version: int = 4, *, options: Sequence[tuple[int, int, int]] = (), protocol: int = 0
) -> Iterator[socket.socket]:
    """Yield a socket that listens at a place, on a port that the kernel chose."""
    with open_socket(lab.place(place).netns, FAMILIES[version], socket.SOCK_STREAM, protocol) as listener:
        for option in options:
            listener.setsockopt(*option)
        listener.settimeout(_PATIENCE_S)
        listener.bind((str(lab.place(place).address(version)), 0))
        listener.listen(512)
        yield listener


def dial(
    lab: Lab,
    source: str,
    listener: socket.socket,
    *,
    options: Sequence[tuple[int, int, int]] = (),
    protocol: int = 0,
) -> socket.socket:
    """Connect from a place to a listening socket. The caller owns the connection."""
    client = open_socket(lab.place(source).netns, listener.family, socket.SOCK_STREAM, protocol)
    try:
        for option in options:
            client.setsockopt(*option)
        client.settimeout(_PATIENCE_S)
        client.connect(listener.getsockname()[:2])
    except BaseException:
        client.close()
        raise
    return client


@contextmanager
def connection(lab: Lab, source: str, target: str, version: int = 4) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a connection between two places."""
    with listening(lab, target, version) as listener, dial(lab, source, listener) as client:
        server, _ = listener.accept()
        with server:
            server.settimeout(_PATIENCE_S)
            yield client, server


def read_all(sock: socket.socket, count: int) -> bytes:
    """Read exactly so many bytes, fewer only where the peer sends no more."""
    received = bytearray()
    while len(received) < count and (more := sock.recv(min(1 << 20, count - len(received)))):
        received += more
    return bytes(received)


def transfer(sender: socket.socket, receiver: socket.socket, megabytes: int) -> None:
    """Send random bytes one way; fail unless they all arrive as they were."""
    piece = os.urandom(_BLOCK_BYTES)
    expected = hashlib.sha256()
    for _ in range(megabytes):
        expected.update(piece)

    def send() -> None:
        for _ in range(megabytes):
            sender.sendall(piece)

    received, left, buffer = hashlib.sha256(), megabytes * _BLOCK_BYTES, memoryview(bytearray(_BLOCK_BYTES))
    with in_background(send):
        while left and (count := receiver.recv_into(buffer, min(left, _BLOCK_BYTES))):
            received.update(buffer[:count])
            left -= count
    assert left == 0
    assert received.digest() == expected.digest()


@contextmanager
def in_background(work: Callable[[], None]) -> Iterator[None]:
    """Do some work beside the block; what it raises is raised at the end of the block."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as err:  # noqa: BLE001 - raised again in the test's own thread
            errors.append(err)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    for error in errors:
        raise error


class Stream:
    """A connection in use: blocks go both ways, one after another, until it is stopped; each is compared."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.rounds = 0
        self._ends = client, server
        self._is_stopped = False
        self._background = in_background(self._run)

    def __enter__(self) -> Stream:
        self._background.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_stopped = True
        self._background.__exit__(None, None, None)

    def wait_for_rounds(self, count: int) -> None:
        """Wait until so many more blocks went there and back."""
        until, deadline = self.rounds + count, time.monotonic() + _PATIENCE_S
        while self.rounds < until:
            assert time.monotonic() < deadline, "the stream stands still"
            time.sleep(0.001)

    def _run(self) -> None:
        client, server = self._ends
        while not self._is_stopped:
            piece = os.urandom(65_536)
            for sender, receiver in ((client, server), (server, client)):
                sender.sendall(piece)
                assert read_all(receiver, len(piece)) == piece
            self.rounds += 1
            time.sleep(0.001)


def segments(packets: Sequence[bytes], port: int) -> list[Segment]:
    """Read the TCP segments to and from a port among captured packets."""
    found = []
    for packet in packets:
        header = decode_ip(packet)
        if header.protocol == TCP:
            segment = decode_segment(packet, header)
            if port in (segment.sport, segment.dport):
                found.append(segment)
    return found


def queued_packets(lab: Lab, name: str) -> int:
    """Return how many packets a pod's queue has ever had."""
    return int(queue_fields(lab, name)[7])


def queue_fields(lab: Lab, name: str) -> list[str]:
    """Return what the kernel says of a pod's queue; the enforcer's other one never has a packet."""
    lines = [line.split() for line in lab.run(name, "cat", QUEUE).splitlines()]
    (fields,) = [fields for fields in lines if fields[0] == str(QUEUE_NUMBER)]
    return fields


def queue_rule_hits(lab: Lab, name: str) -> dict[str, int]:
    """Return how often each rule that leads to the queue was met, for both families."""
    hits = {}
    for tool in ("iptables", "ip6tables"):
        for line in lab.run(name, f"{tool}-save", "-c", "-t", "mangle").splitlines():
            if found := re.fullmatch(r"\[(\d+):\d+\] -A (\S+) .*-j NFQUEUE .*", line):
                hits[f"{tool} {found[2]}"] = int(found[1])
    assert hits
    return hits


def rules_of(lab: Lab, place: str) -> str:
    """Return all rules of a place, without counters and comments."""
    saved = [lab.run(place, f"{tool}-save") for tool in ("iptables", "ip6tables")]
    lines = [line for text in saved for line in text.splitlines() if not line.startswith("#")]
    return re.sub(r"\[\d+:\d+\]", "", "\n".join(lines))
