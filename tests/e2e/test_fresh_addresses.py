# SPDX-License-Identifier: Apache-2.0
"""Fresh addresses over restarts of the daemon, and connections of theirs that the node's conntrack loses."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from enforcer_daemon.dataplane.backends import choose_backend
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.settings import RulesBackend
from tests.attacks.guard_world import Sender, mac, packet
from tests.e2e.attackers import grow_old
from tests.e2e.operation_world import NODES, app, connection, endpoint, pod, policy
from tests.netns.lab import wait_until
from trireme_lab import Lab, LabSpec, Tools
from trireme_lab.manifests import object_ref

pytestmark = [pytest.mark.kernel, pytest.mark.stock_kernel]

CAGED = policy("caged", "caged", egress=[{"to": [app("server")]}])
PODS = {"x/client": "a", "x/caged": "a", "x/near": "b", "x/server": "b"}
VERSIONS = [4, 6]
_PATIENCE_S = 20.0
_FLOOD_S = 4.0


@pytest.fixture(scope="module", params=["nft", "iptables"])
def lab(plugin: Path, request: pytest.FixtureRequest) -> Iterator[Lab]:
    try:
        choose_backend(RulesBackend(request.param))
    except DataplaneError as err:
        pytest.skip(str(err)[:200])
    pods = tuple(pod(name.partition("/")[2], node) for name, node in PODS.items())
    ingress = policy("allow", "server", ingress=[{"from": [app("client"), app("near"), app("caged")]}])
    settings = {"dataplane": {"rulesBackend": request.param}}
    world = LabSpec(NODES, pods=pods, manifests=(ingress, CAGED), settings=settings)
    with Lab(world, Tools(plugin=plugin)) as lab:
        yield lab


def fresh(lab: Lab, name: str, node: str) -> dict[str, float]:
    """Return the elements of a set of the guard, and how long they last yet, seconds."""
    listing = json.loads(lab.run(f"node:{node}", "nft", "-j", "list", "set", "inet", "trireme_guard", name))
    elements = next(entry["set"] for entry in listing["nftables"] if "set" in entry).get("elem", [])
    return {each["elem"]["val"]: float(each["elem"]["expires"]) for each in elements}


def vouched_for(lab: Lab, node: str) -> str:
    """Return the connections of IPv4 that the daemon vouches for."""
    return lab.run(f"node:{node}", "nft", "list", "set", "inet", "trireme_guard", "live4")


def freshen(lab: Lab, name: str, seconds: int = 600) -> None:
    """Let a pod be fresh for TCP, as after its start."""
    for version in VERSIONS:
        address = lab.place(name).address(version)
        element = f"inet trireme_guard fresh_tcp{version} {{ {address} timeout {seconds}s }}"
        bare = element.replace(f" timeout {seconds}s", "")
        command = f"add element {element}; delete element {bare}; add element {element}"
        lab.run(f"node:{PODS[name]}", "nft", command)


def flush(lab: Lab, node: str) -> None:
    lab.run(f"node:{node}", "sh", "-c", "conntrack -F 2>&1")


def carries(sender: socket.socket, receiver: socket.socket) -> bool:
    """Tell whether a word comes through, within the time of some retransmissions."""
    receiver.settimeout(_PATIENCE_S)
    try:
        sender.sendall(b"word")
        return receiver.recv(4) == b"word"
    except OSError:
        return False


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_makes_no_address_fresh_again(lab: Lab, ending: signal.Signals) -> None:
    grow_old(lab)
    freshen(lab, "x/near", 300)
    near, server = (lab.address_of(name) for name in ("x/near", "x/server"))
    lab.node("b").daemon.stop(ending)
    lab.node("b").start()
    lab.node("b").wait_ready()
    left = fresh(lab, "fresh_tcp4", "b")
    assert str(server) not in left
    assert 200 < left[str(near)] <= 300
    with connection(lab, "x/client", "x/server") as (client, served):
        assert carries(client, served)
        flush(lab, "b")
        assert carries(client, served)
        assert carries(served, client)


def test_a_pod_that_is_another_after_the_restart_is_fresh(lab: Lab) -> None:
    grow_old(lab)
    lab.node("b").daemon.stop(signal.SIGKILL)
    try:
        lab.label("x/near", {"app": "near", "role": "new"})
    finally:
        lab.node("b").start()
        lab.node("b").wait_ready()
    left = fresh(lab, "fresh_tcp4", "b")
    assert wait_until(lambda: str(lab.address_of("x/near")) in fresh(lab, "fresh_tcp4", "b"), _PATIENCE_S)
    assert str(lab.address_of("x/server")) not in left


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("speaker", ["client", "server"])
@pytest.mark.parametrize("opener", ["x/client", "x/near", "x/caged"])
@pytest.mark.parametrize("fresh_end", ["opener", "server"])
def test_a_connection_of_a_fresh_address_outlives_a_flush_of_the_nodes_conntrack(
    lab: Lab, opener: str, fresh_end: str, speaker: str, version: int
) -> None:
    """Whichever end is fresh, and whichever speaks first after it."""
    grow_old(lab)
    with connection(lab, opener, "x/server", version) as (client, server):
        assert carries(client, server)
        assert carries(server, client)
        freshen(lab, opener if fresh_end == "opener" else "x/server")
        for node in "ab":
            flush(lab, node)
        first, second = (client, server) if speaker == "client" else (server, client)
        assert carries(first, second), endpoint(lab, opener)["recent_denials"]
        assert carries(second, first)


def test_many_connections_outlive_a_flush(lab: Lab) -> None:
    grow_old(lab)
    with ExitStack() as stack:
        ends = [stack.enter_context(connection(lab, "x/client", "x/server")) for _ in range(200)]
        freshen(lab, "x/client")
        flush(lab, "a")
        for client, _ in ends:
            client.sendall(b"word")
        for _, server in ends:
            server.settimeout(_PATIENCE_S)
            assert server.recv(4) == b"word"


def test_a_connection_that_a_policy_ended_is_not_vouched_for(lab: Lab) -> None:
    grow_old(lab)
    with connection(lab, "x/near", "x/server") as (client, server):
        assert carries(client, server)
        freshen(lab, "x/near")
        flush(lab, "b")
        assert carries(client, server)
        element = f"{lab.address_of('x/near')} . {client.getsockname()[1]} . "
        assert element in vouched_for(lab, "b")
        closed = policy("closed", "near", egress=[])
        try:
            lab.apply(closed)
            assert wait_until(lambda: element not in vouched_for(lab, "b"), _PATIENCE_S)
        finally:
            lab.remove(object_ref(closed))


def test_a_flood_of_segments_that_belong_to_nothing_costs_little_and_keeps_none_waiting(lab: Lab) -> None:
    """The guard tells of few of them, and the pod that sends them is looked at less and less often."""
    grow_old(lab)
    freshen(lab, "x/client")
    freshen(lab, "x/caged")
    source, target = lab.address_of("x/caged"), lab.address_of("x/server")
    gateway = mac(lab, "node:a")
    with connection(lab, "x/client", "x/server") as (client, server), Sender(lab, "x/caged") as sender:
        assert carries(client, server)
        flush(lab, "a")
        before, began, sent = processor_s(lab, "a"), time.monotonic(), 0
        while time.monotonic() < began + _FLOOD_S:
            sender.send(gateway, [packet("segment", source, target, port, 80) for port in range(20_000, 20_100)])
            sent += 100
        client.sendall(b"word")
        assert server.recv(4) == b"word"
        assert sent > 1_000
        assert processor_s(lab, "a") - before < _FLOOD_S / 2


def processor_s(lab: Lab, node: str) -> float:
    """Return the processor time that a node's daemon and its programs have taken, seconds."""
    fields = Path(f"/proc/{lab.node(node).daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
