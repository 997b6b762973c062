# SPDX-License-Identifier: Apache-2.0
"""Connections that are established when policies or labels change: which end, how soon, and what is not disturbed."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.model import PodRef
from tests.e2e.operation_world import (
    FAMILIES,
    HTTP,
    NODES,
    RESET,
    Stream,
    app,
    block,
    connection,
    dial,
    in_background,
    listening,
    outcome,
    pod,
    policy,
    transfer,
)
from trireme_lab import HostSpec, Lab, LabSpec, Outcome, ServicePort, ServiceSpec, Tools
from trireme_lab.manifests import object_ref, pod_ref
from trireme_lab.spec import Manifest

pytestmark = pytest.mark.kernel

WITHIN_S = 20.0
"""Far more than it takes; benchmarks measure that."""
IDLE = 1_000
OUTSIDE = HostSpec("outside", (ip_address("203.0.113.7"), ip_address("2001:db8::7")), (HTTP,))
SERVICE = ServiceSpec(
    "x",
    "server",
    (ip_address("10.96.0.80"), ip_address("fd00:10:96::80")),
    (PodRef("x", "server"),),
    (ServicePort(80, HTTP.number),),
)
VERSIONS = [4, 6]
ALLOW = policy("access", "server", ingress=[{"from": [app("client"), app("near")]}])
DENY = policy("access", "server", ingress=[])
TEAM = {"namespaceSelector": {"matchLabels": {"team": "blue"}}}


def ingress(*peers: object) -> Manifest:
    return policy("access", "server", ingress=[{"from": list(peers)}] if peers else [])


def egress(*peers: object, port: int | None = None) -> Manifest:
    ports = {} if port is None else {"ports": [{"port": port}]}
    return policy("access", "client", egress=[{"to": list(peers), **ports}] if peers else [])


@pytest.fixture(scope="module")
def world(plugin: Path) -> Iterator[Lab]:
    pods = (pod("client", "a"), pod("near", "b"), pod("other", "a", namespace="y"), pod("server", "b"))
    namespaces = {"x": {}, "y": {"team": "blue"}}
    with Lab(LabSpec(NODES, namespaces, pods, (OUTSIDE,), (SERVICE,), settings=RESET), Tools(plugin=plugin)) as lab:
        yield lab


@pytest.fixture
def lab(world: Lab) -> Iterator[Lab]:
    """Yield the world, and put back the policies and labels that a test changes."""
    yield world
    directory = world.node("a").directories.policy
    if (directory / object_ref(DENY).file_name).exists():
        world.remove(object_ref(DENY))
    client = directory / pod_ref(PodRef("x", "client")).file_name
    if client.exists() and "changed" in client.read_text():
        world.label("x/client", {"app": "client"})
    if "blue" not in (directory / "namespace_y.yaml").read_text():
        world.label_namespace("y", {"team": "blue"})


@contextmanager
def without_enforcer(lab: Lab, name: str) -> Iterator[Path]:
    """End a node's enforcer as a crash would, and start it after the block; give the place of its flow indexes."""
    node = lab.node(name)
    node.kill()
    try:
        yield node.directories.run / "flows"
    finally:
        node.start()
        node.wait_ready()


def is_gso(end: socket.socket, within_s: float = WITHIN_S) -> bool:
    """Return whether a connection is reset in that time; a FIN would be the application's own."""
    end.settimeout(within_s)
    try:
        while end.recv(65_536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return False


def still_works(ends: tuple[socket.socket, socket.socket]) -> bool:
    """Return whether a connection carries words both ways."""
    for sender, receiver in (ends, reversed(ends)):
        receiver.settimeout(WITHIN_S)
        sender.sendall(b"word")
        if receiver.recv(100) != b"word":
            return False
    return True


CHANGES: dict[str, tuple[Manifest, Callable[[Lab], object]]] = {
    "ingress by identity": (ALLOW, lambda lab: lab.apply(DENY)),
    "ingress by address": (ingress(*block("10.244.0.0/16", "fd00:10:244::/48")), lambda lab: lab.apply(DENY)),
    "egress by identity": (egress(app("server")), lambda lab: lab.apply(egress())),
    "egress by address": (egress(*block("10.244.0.0/16", "fd00:10:244::/48")), lambda lab: lab.apply(egress())),
    "the client's labels": (ALLOW, lambda lab: lab.label("x/client", {"app": "changed"})),
    "the client's own egress by labels": (
        policy("access", "changed", egress=[]),
        lambda lab: lab.label("x/client", {"app": "changed"}),
    ),
}


@pytest.mark.parametrize("version", [pytest.param(4, marks=pytest.mark.stock_kernel), 6])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_longer_allowed_is_cut_at_both_ends(lab: Lab, change: str, version: int) -> None:
    before, act = CHANGES[change]
    lab.apply(before)
    with connection(lab, "x/client", "x/server", version) as ends:
        assert still_works(ends)
        act(lab)
        for end in ends:
            assert is_gso(end)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_labels_of_a_namespace_count_for_its_established_flows(lab: Lab, version: int) -> None:
    lab.apply(ingress(TEAM))
    with connection(lab, "y/other", "x/server", version) as ends:
        lab.label_namespace("y", {"team": "blue", "more": "labels"})
        assert still_works(ends)
        lab.label_namespace("y", {"team": "red"})
        for end in ends:
            assert is_gso(end)


def test_labels_of_the_serving_pod_are_judged_by_the_clients_egress_too(lab: Lab) -> None:
    lab.apply(egress(app("server")))
    with connection(lab, "x/client", "x/server") as ends:
        lab.label("x/server", {"app": "server", "more": "labels"})
        assert still_works(ends)
        lab.label("x/server", {"app": "changed"})
        try:
            for end in ends:
                assert is_gso(end)
        finally:
            lab.label("x/server", {"app": "server"})


@contextmanager
def dialed(lab: Lab, source: str, target: str, port: int, version: int) -> Iterator[socket.socket]:
    """Yield a connection to one of the lab's own servers, after its banner."""
    with lab.open_socket(source, FAMILIES[version]) as client:
        client.settimeout(WITHIN_S)
        client.connect((str(lab.address_of(target, version)), port))
        assert client.recv(100)
        yield client


def echoes(client: socket.socket) -> bool:
    client.settimeout(WITHIN_S)
    client.sendall(b"word")
    return client.recv(100) == b"word"


@pytest.mark.stock_kernel
@pytest.mark.parametrize("version", VERSIONS)
def test_behind_a_service_the_pod_and_its_port_are_judged(lab: Lab, version: int) -> None:
    lab.apply(egress(app("server"), port=HTTP.number))
    with dialed(lab, "x/client", "service:x/server", 80, version) as client:
        pods = block("10.244.2.0/24", "fd00:10:244:2::/64")
        lab.apply(egress(*pods, port=HTTP.number))
        assert echoes(client)
        lab.apply(egress(*pods, port=80))
        assert is_gso(client)
    assert outcome(lab, "x/client", "service:x/server", 80, version, timeout_s=1.0).is_denied


@pytest.mark.parametrize("version", VERSIONS)
def test_flows_with_outside_are_judged_by_address(lab: Lab, version: int) -> None:
    outside, elsewhere = block("203.0.113.0/24", "2001:db8::/64"), block("198.51.100.0/24")
    lab.apply(egress(*outside))
    with dialed(lab, "x/client", "host:outside", HTTP.number, version) as client:
        lab.apply(egress(*outside, *elsewhere))
        assert echoes(client)
        lab.apply(egress(*elsewhere))
        assert is_gso(client)
    lab.apply(ingress(*outside))
    with dialed(lab, "host:outside", "x/server", HTTP.number, version) as client:
        lab.apply(ingress(*outside, *elsewhere))
        assert echoes(client)
        lab.apply(ingress(*elsewhere))
        assert is_gso(client)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_udp_flow_is_stopped_and_may_go_on_later(lab: Lab, version: int) -> None:
    allowed = egress(*block("203.0.113.0/24", "2001:db8::/64"))
    lab.apply(allowed)
    server = lab.open_socket("host:outside", FAMILIES[version], socket.SOCK_DGRAM)
    with server, lab.open_socket("x/client", FAMILIES[version], socket.SOCK_DGRAM) as client:
        server.bind((str(lab.address_of("host:outside", version)), 0))
        client.connect(server.getsockname()[:2])

        def arrives(within_s: float) -> bool:
            server.settimeout(within_s)
            with suppress(PermissionError):
                client.send(b"datagram")
            try:
                return server.recv(100) == b"datagram"
            except TimeoutError:
                return False

        assert arrives(WITHIN_S)
        lab.apply(egress())
        assert not arrives(0.2)
        lab.apply(allowed)
        assert arrives(WITHIN_S)


def test_flows_of_the_node_are_never_cut(lab: Lab) -> None:
    lab.apply(ALLOW)
    with dialed(lab, "node:b", "x/server", HTTP.number, 4) as probe:
        lab.apply(DENY)
        assert echoes(probe)
        assert outcome(lab, "node:b", "x/server", HTTP.number) is Outcome.CONNECTED


@pytest.mark.parametrize("version", VERSIONS)
def test_stricter_then_wider_again(lab: Lab, version: int) -> None:
    with listening(lab, "x/server", version) as listener:
        for _ in range(3):
            lab.apply(ALLOW)
            with dial(lab, "x/client", listener) as client, listener.accept()[0] as server:
                assert still_works((client, server))
                lab.apply(DENY)
                assert is_gso(client)
                assert is_gso(server)


def test_a_transfer_loses_nothing_over_a_hundred_changes(lab: Lab) -> None:
    lab.apply(ALLOW)

    def change() -> None:
        for number in range(100):
            lab.apply(ingress(app("client"), app(f"another-{number}")), is_awaited=False)
            time.sleep(0.03)

    before = lab.node("b").generation()
    with connection(lab, "x/client", "x/server") as (client, server), in_background(change):
        for _ in range(6):
            transfer(client, server, 30)
            transfer(server, client, 30)
            time.sleep(0.2)
    assert lab.node("b").generation() - before > 50


def test_a_thousand_others_are_not_disturbed(lab: Lab) -> None:
    lab.apply(ALLOW)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as stack, listening(lab, "x/server") as listener:
        idle = []
        for _ in range(IDLE):
            client = stack.enter_context(dial(lab, "x/client", listener))
            idle.append((client, stack.enter_context(listener.accept()[0])))
        doomed = stack.enter_context(connection(lab, "x/near", "x/server"))
        busy = [
            stack.enter_context(Stream(*stack.enter_context(connection(lab, "x/client", "x/server")))) for _ in "123"
        ]
        lab.apply(ingress(app("client")))
        assert is_gso(doomed[0])
        for stream in busy:
            stream.wait_for_rounds(5)
        assert all(still_works(ends) for ends in idle)


@pytest.mark.parametrize("version", VERSIONS)
def test_flows_of_before_a_restart_are_judged_by_what_was_kept(lab: Lab, version: int) -> None:
    lab.apply(ALLOW)
    with (
        connection(lab, "x/client", "x/server", version) as allowed,
        connection(lab, "x/near", "x/server", version) as denied,
    ):
        with without_enforcer(lab, "b"):
            assert still_works(allowed)
        lab.apply(ingress(app("client")))
        assert is_gso(denied[0])
        assert still_works(allowed)
        with without_enforcer(lab, "b"):
            lab.apply(ingress(app("near")))
        assert is_gso(allowed[1])


@pytest.mark.parametrize("damage", [b"{", b"\xff\n\n", None], ids=["torn", "garbage", "gone"])
def test_flows_whose_peer_was_forgotten_end_where_the_pod_is_isolated(lab: Lab, damage: bytes | None) -> None:
    with connection(lab, "x/client", "x/server") as ends:
        with without_enforcer(lab, "b") as flows:
            _damage(flows, damage)
        assert still_works(ends)  # nothing isolates the pod
        # An index that the kernel still bears is not given to another: the old flow would be evaluated as that one's.
        with connection(lab, "x/near", "x/server") as near:
            lab.apply(ingress(app("near")))
            assert is_gso(ends[1])
            assert still_works(near)
    lab.apply(ALLOW)
    with connection(lab, "x/client", "x/server") as ends:
        with without_enforcer(lab, "b") as flows:
            _damage(flows, damage)
        assert is_gso(ends[1])
    assert outcome(lab, "x/client", "x/server", HTTP.number) is Outcome.CONNECTED


def _damage(flows: Path, content: bytes | None) -> None:
    for file in flows.iterdir():
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)


def test_a_policy_that_is_bad_after_a_restart_still_denies(lab: Lab) -> None:
    lab.apply(DENY)
    assert outcome(lab, "x/client", "x/server", HTTP.number).is_denied
    broken = policy("access", "server", ingress=[{"ports": [{"port": 90, "endPort": 80}]}])
    damages: tuple[Callable[[], object], ...] = (lambda: lab.node("b").put(broken), lambda: _damage_policy(lab))
    for damage in damages:
        with without_enforcer(lab, "b"):
            damage()
        assert outcome(lab, "x/client", "x/server", HTTP.number).is_denied
        snapshot = lab.node("b").status()["snapshot"]
        assert isinstance(snapshot, dict)
        (problem,) = snapshot["problems"]
        assert "in force as before the restart: NetworkPolicy x/access" in problem
    with without_enforcer(lab, "b"):
        lab.node("b").remove(object_ref(DENY))
    assert outcome(lab, "x/client", "x/server", HTTP.number) is Outcome.CONNECTED


def _damage_policy(lab: Lab) -> None:
    (lab.node("b").directories.policy / object_ref(DENY).file_name).write_text("kind: [")
