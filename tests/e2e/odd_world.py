# SPDX-License-Identifier: Apache-2.0
"""What the tests of unusual TCP share: a world of three pods, enforcers that stand still, kernels set otherwise."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

from enforcer_daemon.model import PodRef
from tests.e2e.operation_world import FAMILIES, HTTP, NODES, app, pod, policy, read_all
from trireme_lab import HostSpec, Lab, LabSpec, ServicePort, ServiceSpec, Tools
from trireme_lab.netns import in_netns, write_sysctls

VERSIONS = [4, 6]
OUTSIDE = HostSpec("outside", (ip_address("203.0.113.7"), ip_address("2001:db8::7")))
RESET_ON_CLOSE = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
PATIENCE_S = 20.0
MANIFESTS = (policy("deny-all", ingress=[]), policy("server", "server", ingress=[{"from": [app("client")]}]))
SERVICE = ServiceSpec(
    "x",
    "server",
    (ip_address("10.96.0.80"), ip_address("fd00:10:96::80")),
    (PodRef("x", "server"),),
    (ServicePort(80, HTTP.number),),
)
_POLL_S = 0.005


def odd_world(plugin: Path, *, conflist: Path | None = None) -> Lab:
    """Describe a client, a server on another node that admits it alone, and an outside host."""
    pods = (pod("client", "a"), pod("near-client", "b", app="client"), pod("server", "b"))
    tools = Tools(plugin=plugin) if conflist is None else Tools(plugin=plugin, conflist=conflist)
    return Lab(LabSpec(NODES, pods=pods, hosts=(OUTSIDE,), services=(SERVICE,), manifests=MANIFESTS), tools)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that must come; fail with its name where it does not."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(_POLL_S)


@contextmanager
def paused(lab: Lab, *nodes: str) -> Iterator[None]:
    """Let the enforcers of nodes stand still: what comes to their queues waits, in order."""
    pids = [lab.node(name).daemon.pid for name in nodes]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for pid in pids:
            wait_until(lambda pid=pid: _state(pid) == "T", "the enforcer stands still")  # type: ignore[misc]
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextmanager
def sysctls(lab: Lab, place: str, values: Mapping[str, str]) -> Iterator[None]:
    """Set kernel parameters of a place for the block (paths below /proc/sys)."""
    netns = lab.place(place).netns
    before = in_netns(netns, lambda: {path: Path("/proc/sys", path).read_text().strip() for path in values})
    try:
        write_sysctls(netns, values)
        yield
    finally:
        write_sysctls(netns, before)


def bound(lab: Lab, place: str, version: int, port: int) -> socket.socket:
    """Return a socket of a place with a fixed port of its own. The caller owns it."""
    sock = lab.open_socket(place, FAMILIES[version])
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.settimeout(PATIENCE_S)
        sock.bind((str(lab.place(place).address(version)), port))
    except OSError:
        sock.close()
        raise
    return sock


def carries_words(*ends: socket.socket) -> bool:
    """Return whether a connection carries words both ways."""
    one, other = ends
    for sender, receiver in ((one, other), (other, one)):
        sender.sendall(b"a word")
        if read_all(receiver, 6) != b"a word":
            return False
    return True


def half_open(lab: Lab) -> int:
    """Count the unfinished handshakes that all enforcers know."""
    return sum(int(str(e["half_open_flows"])) for name in "ab" for e in lab.node(name).endpoints())


def denied(lab: Lab, name: str) -> int:
    """Count the denials that a node's enforcer has met."""
    drops = lab.node(name).status()["drops"]
    assert isinstance(drops, dict)
    return sum(drops.values())
