# SPDX-License-Identifier: Apache-2.0
"""A pod that goes past its own rules by packet socket meets the guard on its node; nobody else notices it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.model import PodRef, Protocol
from tests.e2e import raw_pod
from tests.e2e.operation_world import FAMILIES, HTTP, NODES, RESET, app, block, connection, endpoint, pod, policy
from tests.e2e.raw_pod import Attack, RawPod, Scene, arrives, fresh_marker, hearing, is_heard
from trireme_lab import HostSpec, Lab, LabSpec, PortSpec, ServicePort, ServiceSpec, Tools
from trireme_lab.manifests import object_ref

pytestmark = pytest.mark.kernel

UDP = PortSpec(5353, Protocol.UDP)
FRIEND = HostSpec("friend", (ip_address("203.0.113.7"), ip_address("2001:db8::7")), (HTTP, UDP))
STRANGER = HostSpec("stranger", (ip_address("198.51.100.8"), ip_address("2001:db8:bad::8")), (HTTP, UDP))
WEB = ServiceSpec(
    "x",
    "web",
    (ip_address("10.96.0.10"), ip_address("fd00:10:96::10")),
    (PodRef("x", "web"),),
    (ServicePort(80, HTTP.number),),
)
MANIFESTS = (
    policy(
        "caged",
        "caged",
        egress=[
            {"to": [app("web"), app("far-web")]},
            {"to": block("203.0.113.0/24", "2001:db8::/64", "192.168.60.0/24", "fd00:60::/64")},
        ],
    ),
    policy("silent", "silent", ingress=[], egress=[]),
)
PODS = (
    pod("caged", "a", HTTP, UDP),
    pod("free", "a", HTTP, UDP),
    pod("web", "a", HTTP, UDP),
    pod("near", "a", HTTP, UDP),
    pod("far", "b", HTTP, UDP),
    pod("far-web", "b", HTTP, UDP),
    pod("silent", "a"),
)
versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
bypasses = pytest.mark.parametrize("bypasses_qdisc", [False, True], ids=["", "qdisc-bypass"])

FORBIDDEN: list[tuple[Attack, str]] = [
    *((attack, "host:stranger") for attack in (raw_pod.plain_syn, raw_pod.syn_with_other_data, raw_pod.framed_syn)),
    (raw_pod.data_of_no_connection, "host:stranger"),
    (raw_pod.datagram, "host:stranger"),
    (raw_pod.another_protocol, "host:stranger"),
    (raw_pod.plain_syn, "x/near"),
    (raw_pod.syn_with_other_data, "x/near"),
    (raw_pod.data_of_no_connection, "x/near"),
    (raw_pod.datagram, "x/near"),
    (raw_pod.plain_syn, "x/far"),
    (raw_pod.syn_with_other_data, "x/far"),
    (raw_pod.datagram, "x/far"),
    (raw_pod.another_protocol, "x/far"),
    (raw_pod.plain_syn, "x/web"),  # allowed to the pod, by identity: not without one
]
SPOOFED: list[tuple[Attack, str]] = [
    (attack, target)
    for attack in (
        raw_pod.under_a_neighbours_address,
        raw_pod.under_the_nodes_address,
        raw_pod.syn_under_the_nodes_address,
    )
    for target in ("x/near", "x/far", "host:stranger")
]
LINK: list[tuple[Attack, int]] = [
    (raw_pod.arp_for_a_neighbour, 4),
    (raw_pod.tagged, 4),
    (raw_pod.tagged, 6),
    (raw_pod.another_link_protocol, 4),
    (raw_pod.advertisement_for_a_neighbour, 6),
    (raw_pod.solicitation_for_a_neighbours_address, 6),
    (raw_pod.router_advertisement, 6),
    (raw_pod.under_anothers_link_local_address, 6),
]


def _names(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    world = LabSpec(NODES, {"x": {}}, PODS, (FRIEND, STRANGER), (WEB,), MANIFESTS, RESET)
    with Lab(world, Tools(plugin=plugin)) as lab:
        yield lab


_TRIES, _TRY_S = 10, 2.0


def _succeeds(
    lab: Lab, attack: Attack, attacker: str, target: str, version: int, *, bypasses_qdisc: bool = False
) -> bool:
    """Attack; tell whether it came to the target."""
    marker = fresh_marker()
    scene = Scene(lab, attacker, target, "x/web", "node:a", version)
    with hearing(lab, target) as heard, RawPod(lab, attacker, bypasses_qdisc=bypasses_qdisc) as raw:
        raw.send(target, attack(scene, marker))
        return arrives(lab, heard, _visible(attack, marker, version), ("node:a", target))


def _comes_through(
    lab: Lab, attack: Attack, attacker: str, target: str, version: int, *, without_guard: bool = False
) -> bool:
    """Attack where nothing stands in the way; wait until it comes to the target.

    The enforcer puts back what is taken away, within a second: each try takes it away anew.
    """
    marker = fresh_marker()
    scene = Scene(lab, attacker, target, "x/web", "node:a", version)
    packets = attack(scene, marker)
    with hearing(lab, target) as heard, RawPod(lab, attacker) as raw:
        for _ in range(_TRIES):
            if without_guard:
                _take_guard_away(lab)
            raw.send(target, packets)
            if is_heard(heard, _visible(attack, marker, version), _TRY_S):
                return True
    return False


def _take_guard_away(lab: Lab) -> None:
    for family in ("inet", "netdev"):
        table = f"table {family} trireme_guard"
        lab.run("node:a", "nft", f"add {table}; delete {table}")


def _visible(attack: Attack, marker: bytes, version: int) -> bytes:
    """Return what every packet of an attack shows of its marker."""
    return marker[:4] if version == 6 and attack is raw_pod.router_advertisement else marker[:6]


@bypasses
@versions
@pytest.mark.parametrize(("attack", "target"), FORBIDDEN, ids=_names)
def test_what_policy_forbids(lab: Lab, attack: Attack, target: str, version: int, bypasses_qdisc: bool) -> None:
    assert not _succeeds(lab, attack, "x/caged", target, version, bypasses_qdisc=bypasses_qdisc)


@bypasses
@versions
@pytest.mark.parametrize(("attack", "target"), SPOOFED, ids=_names)
@pytest.mark.parametrize("attacker", ["x/free", "x/caged"])
def test_a_senders_address(
    lab: Lab, attacker: str, attack: Attack, target: str, version: int, bypasses_qdisc: bool
) -> None:
    assert not _succeeds(lab, attack, attacker, target, version, bypasses_qdisc=bypasses_qdisc)


@bypasses
@pytest.mark.parametrize(("attack", "version"), LINK, ids=_names)
def test_on_the_link(lab: Lab, attack: Attack, version: int, bypasses_qdisc: bool) -> None:
    assert not _succeeds(lab, attack, "x/free", "x/near", version, bypasses_qdisc=bypasses_qdisc)


@pytest.mark.parametrize("target", ["x/near", "x/far", "host:stranger"])
def test_a_syn_in_fragments(lab: Lab, target: str) -> None:
    assert not _succeeds(lab, raw_pod.fragmented_syn, "x/caged", target, 4)


BRIDGED: list[tuple[Attack, int]] = [
    (raw_pod.plain_syn, 4),
    (raw_pod.plain_syn, 6),
    (raw_pod.fragmented_syn, 4),
    (raw_pod.syn_in_fragments_behind_options, 6),
]


@pytest.mark.parametrize(("attack", "version"), BRIDGED, ids=_names)
def test_a_syn_to_a_neighbour_on_a_bridge_that_netfilter_does_not_see(lab: Lab, attack: Attack, version: int) -> None:
    with _hidden_bridge(lab):
        assert not _succeeds(lab, attack, "x/caged", "x/near", version)
        assert _comes_through(lab, attack, "x/free", "x/near", version)


@contextmanager
def _hidden_bridge(lab: Lab) -> Iterator[None]:
    """Have the node's bridge switch between two pods without a look at any rule."""
    settings = [f"net.bridge.bridge-nf-call-{tool}" for tool in ("iptables", "ip6tables")]
    before = [lab.run("node:a", "sysctl", "-n", name).strip() for name in settings]
    try:
        lab.run("node:a", "sysctl", "-qw", *(f"{name}=0" for name in settings))
        yield
    finally:
        lab.run("node:a", "sysctl", "-qw", *(f"{name}={value}" for name, value in zip(settings, before, strict=True)))


def test_a_datagram_with_a_wrong_checksum(lab: Lab) -> None:
    with _tolerant_path(lab):
        assert _comes_through(lab, raw_pod.datagram_with_a_wrong_checksum, "x/free", "host:stranger", 4)
        assert not _succeeds(lab, raw_pod.datagram_with_a_wrong_checksum, "x/caged", "host:stranger", 4)


@contextmanager
def _tolerant_path(lab: Lab) -> Iterator[None]:
    """Have the node forward what conntrack calls invalid, as most primary plugins do."""
    lab.run("node:a", "nft", "insert", "rule", "inet", "lab", "forward", "accept")
    try:
        yield
    finally:
        listing = lab.run("node:a", "nft", "-a", "list", "chain", "inet", "lab", "forward")
        (handle,) = [line.split()[-1] for line in listing.splitlines() if line.strip().startswith("accept")]
        lab.run("node:a", "nft", "delete", "rule", "inet", "lab", "forward", "handle", handle)


# Everybody else.


@versions
@pytest.mark.parametrize(
    ("source", "target", "port", "protocol"),
    [
        ("x/caged", "host:friend", HTTP.number, Protocol.TCP),
        ("x/caged", "host:friend", UDP.number, Protocol.UDP),
        ("x/caged", "x/web", HTTP.number, Protocol.TCP),
        ("x/caged", "x/far-web", HTTP.number, Protocol.TCP),
        ("x/caged", "service:x/web", 80, Protocol.TCP),
        ("x/free", "x/caged", HTTP.number, Protocol.TCP),
        ("x/free", "x/caged", UDP.number, Protocol.UDP),
        ("x/far", "x/caged", HTTP.number, Protocol.TCP),
        ("x/far", "x/caged", UDP.number, Protocol.UDP),
        ("x/free", "host:stranger", HTTP.number, Protocol.TCP),
        ("x/free", "host:stranger", UDP.number, Protocol.UDP),
        ("x/free", "x/far", UDP.number, Protocol.UDP),
        ("host:stranger", "x/caged", HTTP.number, Protocol.TCP),
        ("host:stranger", "x/caged", UDP.number, Protocol.UDP),
        ("node:a", "x/caged", HTTP.number, Protocol.TCP),
        ("node:a", "x/silent", HTTP.number, Protocol.TCP),
        ("node:b", "x/caged", HTTP.number, Protocol.TCP),
    ],
)
def test_what_is_allowed(lab: Lab, source: str, target: str, port: int, protocol: Protocol, version: int) -> None:
    assert lab.probe(source, target, port, version, protocol).outcome.is_allowed


@versions
def test_a_pod_reaches_its_node_by_a_rule_by_address(lab: Lab, version: int) -> None:
    lab.listen("node:a", PortSpec(9000 + version), lab.place("node:a").address(version))
    assert lab.probe("x/caged", "node:a", 9000 + version, version).outcome.is_allowed


@versions
def test_neighbours_are_found_anew(lab: Lab, version: int) -> None:
    for place in ("x/caged", "x/web", "node:a"):
        lab.run(place, "ip", f"-{version}", "neigh", "flush", "all")
    assert lab.probe("x/caged", "x/web", HTTP.number, version).outcome.is_allowed
    assert lab.probe("x/caged", "host:friend", HTTP.number, version).outcome.is_allowed


def test_an_address_is_checked_for_duplicates(lab: Lab) -> None:
    """The kernel's own solicitation from :: passes: another with the address would hear of it."""
    lab.add_pod(pod("careful", "a"))
    own = str(lab.place("x/careful").address(6))
    with hearing(lab, "x/near") as heard:
        heard.settimeout(5)
        lab.run("x/careful", "sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=1")
        for verb in ("del", "add"):
            lab.run("x/careful", "ip", "-6", "addr", verb, f"{own}/64", "dev", "eth0")
        while not _is_solicitation(heard.recv(2048), ip_address(own).packed):
            pass
    lab.remove_pod("x/careful")


def _is_solicitation(frame: bytes, wanted: bytes) -> bool:
    return frame[12:14] == b"\x86\xdd" and frame[22:38] == bytes(16) and frame[62:78] == wanted


@versions
@pytest.mark.parametrize(("source", "target"), [("x/caged", "host:friend"), ("host:stranger", "x/caged")])
def test_errors_come_back(lab: Lab, source: str, target: str, version: int) -> None:
    with lab.open_socket(source, FAMILIES[version], socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        sock.connect((str(lab.place(target).address(version)), 9))
        sock.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(1)


# With the daemon gone, back, and with other policies.


@versions
def test_while_the_daemon_is_dead_and_after(lab: Lab, version: int) -> None:
    node = lab.node("a")
    with connection(lab, "x/caged", "x/far-web", version) as (client, server):
        node.kill()
        try:
            assert not _succeeds(lab, raw_pod.datagram, "x/caged", "host:stranger", version)
            assert not _succeeds(lab, raw_pod.under_the_nodes_address, "x/caged", "x/near", version)
            client.send(b"while dead")
            assert server.recv(10) == b"while dead"
        finally:
            node.start()
            node.wait_ready()
        server.send(b"afterwards")
        assert client.recv(10) == b"afterwards"
        assert not _succeeds(lab, raw_pod.datagram, "x/caged", "host:stranger", version)
        assert not _succeeds(lab, raw_pod.under_the_nodes_address, "x/caged", "x/near", version)
    assert lab.probe("x/caged", "host:friend", HTTP.number, version).outcome.is_allowed


def test_no_packet_finds_a_gap(lab: Lab) -> None:
    """A flood of spoofed and forbidden datagrams, while the daemon is restarted and policies change."""
    markers = fresh_marker(), fresh_marker()
    scenes = Scene(lab, "x/caged", "x/near", "x/web", "node:a", 4), Scene(lab, "x/caged", "host:stranger", "", "", 4)
    attacks = raw_pod.under_the_nodes_address(scenes[0], markers[0]), raw_pod.datagram(scenes[1], markers[1])
    stop, sent = threading.Event(), 0

    with hearing(lab, "x/near") as near, hearing(lab, "host:stranger") as far, RawPod(lab, "x/caged") as raw:
        frames = [raw.frames(scene.target, packets)[0] for scene, packets in zip(scenes, attacks, strict=True)]

        def flood() -> None:
            nonlocal sent
            while not stop.wait(0.0002):
                for frame in frames:
                    raw.send_frame(frame)
                sent += 1

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            lab.node("a").restart()
            more = policy("more", "caged", egress=[{"to": block("192.0.2.0/24")}])
            for _ in range(3):
                assert lab.apply(more)
                assert lab.remove(object_ref(more))
            lab.node("a").kill()
            lab.node("a").start()
            lab.node("a").wait_ready()
        finally:
            stop.set()
            thread.join()
        assert sent > 1_000
        assert not arrives(lab, near, markers[0], ("node:a", "x/near"))
        assert not arrives(lab, far, markers[1], ("node:a", "host:stranger"))


def test_a_policy_change_reaches_the_guard(lab: Lab) -> None:
    allowed = policy("stranger", "caged", egress=[{"to": block("198.51.100.0/24")}])
    assert lab.apply(allowed)
    assert _comes_through(lab, raw_pod.datagram, "x/caged", "host:stranger", 4)
    assert lab.remove(object_ref(allowed))
    assert not _succeeds(lab, raw_pod.datagram, "x/caged", "host:stranger", 4)


def test_a_pod_that_comes_later_and_goes(lab: Lab) -> None:
    lab.add_pod(pod("late", "a"))
    assert not _succeeds(lab, raw_pod.under_a_neighbours_address, "x/late", "x/near", 4)
    lab.remove_pod("x/late")
    chains = lab.run("node:a", "nft", "list", "table", "netdev", "trireme_guard")
    assert chains.count("chain link_") == len([spec for spec in PODS if spec.node == "a"])


def test_operators_see_it(lab: Lab) -> None:
    _succeeds(lab, raw_pod.under_a_neighbours_address, "x/free", "x/near", 4)
    guard = lab.node("a").status()["guard"]
    assert isinstance(guard, dict)
    assert guard["problem"] == ""
    assert guard["drops"]["spoofed-source"] > 0
    assert endpoint(lab, "x/free")["guard"] == ""


def test_what_comes_before_the_guard_is_reported(lab: Lab) -> None:
    peer = json.loads(lab.run("x/free", "ip", "-j", "link", "show", "eth0"))[0]["link_index"]
    links = json.loads(lab.run("node:a", "ip", "-j", "link"))
    (end,) = [link["ifname"] for link in links if link["ifindex"] == peer]
    lab.run("node:a", "tc", "qdisc", "add", "dev", end, "clsact")
    try:
        reported = f"tc filters at the ingress of {end} see packets first, and may send them past the guard"
        assert endpoint(lab, "x/free")["guard"] == reported
        assert endpoint(lab, "x/caged")["guard"] == ""
    finally:
        lab.run("node:a", "tc", "qdisc", "del", "dev", end, "clsact")


@pytest.mark.stock_kernel
def test_without_the_guard_they_come_through(lab: Lab) -> None:
    """The control of all of these tests; and what is established when the guard is put in place goes on."""
    node = lab.node("a")
    try:
        for attack, target in FORBIDDEN:
            assert _comes_through(lab, attack, "x/caged", target, 4, without_guard=True), (attack, target)
        for attack, target in SPOOFED:
            if target == "x/near":
                assert _comes_through(lab, attack, "x/free", target, 6, without_guard=True), (attack, target)
        for attack, version in LINK:
            assert _comes_through(lab, attack, "x/free", "x/near", version, without_guard=True), attack
        _take_guard_away(lab)
        with connection(lab, "x/caged", "x/web") as (client, server):
            node.restart()
            client.send(b"still here")
            assert server.recv(10) == b"still here"
            server.send(b"and here")
            assert client.recv(8) == b"and here"
    finally:
        node.restart()
    assert not _succeeds(lab, raw_pod.datagram, "x/caged", "host:stranger", 4)
