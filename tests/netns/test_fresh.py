# SPDX-License-Identifier: Apache-2.0
"""What the guard lets a fresh address send, what it tells of it, and the entries of the node's conntrack."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import TypeVar

import pytest

from enforcer_daemon.dataplane import guard as guard_module
from enforcer_daemon.dataplane import nodeflows
from enforcer_daemon.dataplane.droplog import DropLog, Notice
from enforcer_daemon.dataplane.guard import Guard
from enforcer_daemon.dataplane.guard_fresh import STRAY
from enforcer_daemon.dataplane.guard_rules import ALLOWS_ALL, LOGGED_PER_S, GuardedEndpoint
from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.dataplane.nodeflows import SentTuple, remove_flows, remove_of
from enforcer_daemon.dataplane.tools import run_in
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.handshake.datagrams import STANDALONE_EXID
from enforcer_daemon.handshake.frames import (
    MARKER_ID,
    PROOF_MARKER_ID,
    TYPE_ANSWER,
    TYPE_CHALLENGE,
    TYPE_OFFER,
    TYPE_PROOF,
    TYPE_REHANDSHAKE,
    SynFrame,
    encode_syn,
)
from enforcer_daemon.model import AttachmentId
from enforcer_daemon.packet.tcp import ACK, PSH, build
from enforcer_daemon.packet.udp import UDP_HEADER, build_udp, decode_udp, encode_option, is_marked, with_marker
from tests.netns.lab import FAMILIES, NODE_OUTSIDE, PATIENCE_S, POD, REMOTE, Lab, open_lab

pytestmark = [pytest.mark.kernel, pytest.mark.stock_kernel]

T = TypeVar("T")
NETWORKS = [ip_network("10.88.0.0/24"), ip_network("fd88::/64"), ip_network("10.77.0.0/24"), ip_network("fd77::/64")]
POD_SIDE = GuardedEndpoint(
    AttachmentId("c1", "eth0"), (ip_address(POD[4]), ip_address(POD[6])), ALLOWS_ALL, by_identity=True, life="web-1"
)
PORTS = 4444, 5353


@pytest.fixture(params=(4, 6), ids=("ipv4", "ipv6"))
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with open_lab() as lab:
        yield lab


@pytest.fixture
def guard(lab: Lab) -> Guard:
    guard = Guard(NETWORKS)
    on_node(lab, lambda: guard.replace([POD_SIDE]))
    assert guard.problem == ""
    return guard


def on_node(lab: Lab, work: Callable[[], T]) -> T:
    return open_in(lab.node, work)


def grow_old(lab: Lab) -> None:
    """Let the time of all fresh addresses be over."""
    for name in ("fresh_tcp4", "fresh_tcp6", "fresh_udp4", "fresh_udp6"):
        run_in(lab.node, ("nft", "flush", "set", "inet", "trireme_guard", name))


class Wire:
    """Raw packets of the pod or the remote, and what comes to it. A context manager."""

    def __init__(self, lab: Lab, place: int, version: int) -> None:
        self.version = version
        here, there = (POD, REMOTE) if place == lab.pod else (REMOTE, POD)
        self.ends = ip_address(here[version]).packed, ip_address(there[version]).packed
        self.target = there[version]
        family = FAMILIES[version]
        self._out = open_in(place, lambda: socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW))
        protocol = socket.htons(0x0800 if version == 4 else 0x86DD)
        self._in = open_in(place, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, protocol))

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        self._in.close()

    def datagram(self, payload: bytes = b"", surplus: bytes = b"", ports: tuple[int, int] = PORTS) -> bytes:
        return build_udp(*self.ends, ports, payload, surplus)

    def message(self, kind: int, ports: tuple[int, int] = PORTS) -> bytes:
        content = encode_syn(SynFrame(bytes(16), b""), kind)
        return self.datagram(b"", encode_option(UDP_HEADER, STANDALONE_EXID, content), ports)

    def send(self, packet: bytes) -> None:
        self._out.sendto(packet, (self.target, 0))

    def find(self, wanted: bytes, timeout_s: float) -> bytes | None:
        """Return the packet with these bytes, if it comes in time."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            self._in.settimeout(left)
            try:
                packet = self._in.recv(2048)
            except TimeoutError:
                return None
            if wanted in packet and packet[12 if self.version == 4 else 8 :].startswith(self.ends[1]):
                return packet
        return None


@pytest.fixture
def pod(lab: Lab, version: int) -> Iterator[Wire]:
    with Wire(lab, lab.pod, version) as wire:
        yield wire


@pytest.fixture
def remote(lab: Lab, version: int) -> Iterator[Wire]:
    with Wire(lab, lab.remote, version) as wire:
        yield wire


def notices(log: DropLog) -> list[Notice]:
    deadline = time.monotonic() + 3
    while not (found := log.read(64)):
        assert time.monotonic() < deadline, "nothing is told"
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("size", [8, 1_200])
def test_a_datagram_without_a_message_is_marked(lab: Lab, guard: Guard, pod: Wire, remote: Wire, size: int) -> None:
    """Whatever it opens: a large one has no room for a message, and its peer may be one without an enforcer."""
    port = iter(range(4444, 4600))

    def passed(text: bytes) -> bytes:
        pod.send(pod.datagram(text.ljust(size), ports=(next(port), 5353)))
        found = remote.find(text, PATIENCE_S)
        assert found is not None
        assert decode_udp(found).payload == text.ljust(size)
        return found

    with on_node(lab, DropLog) as log:
        assert is_marked(passed(b"plain-1"), MARKER_ID)
        assert [each.prefix for each in notices(log)] == [STRAY]
        assert on_node(lab, guard.drops).get("unknown-flow", 0) == 0

        grow_old(lab)
        assert not is_marked(passed(b"plain-2"), MARKER_ID)
        on_node(lab, lambda: guard.freshen([ip_address(POD[pod.version]), ip_address("10.9.9.9")]))
        assert is_marked(passed(b"plain-3"), MARKER_ID)


def test_a_message_passes_as_it_is(lab: Lab, guard: Guard, pod: Wire, remote: Wire) -> None:
    with on_node(lab, DropLog) as log:
        for marker in (MARKER_ID, PROOF_MARKER_ID):
            pod.send(with_marker(decode_udp(pod.datagram(b"marked")), marker))
            found = remote.find(b"marked", PATIENCE_S)
            assert found is not None
            assert is_marked(found, marker)
        pod.send(pod.message(TYPE_OFFER, (4445, 5353)))
        standalone = remote.find(b"\xd3TRI", PATIENCE_S)
        assert standalone is not None
        assert not is_marked(standalone, MARKER_ID)
        assert log.read(64) == []


def test_the_daemon_hears_of_a_flood_no_more_often_than_it_may(lab: Lab, guard: Guard, pod: Wire) -> None:
    with on_node(lab, DropLog) as log:
        for _ in range(20 * LOGGED_PER_S):
            pod.send(pod.datagram(b"flood"))
        told, deadline = notices(log), time.monotonic() + 0.5
        while time.monotonic() < deadline:
            told += log.read(64)
            time.sleep(0.05)
        assert LOGGED_PER_S <= len(told) <= 4 * LOGGED_PER_S


def test_only_one_program_hears_of_drops(lab: Lab, guard: Guard) -> None:
    with on_node(lab, DropLog), pytest.raises(DataplaneError, match="log of the guard"):
        on_node(lab, DropLog)


def test_what_answers_a_peer_that_showed_no_message_is_marked(lab: Lab, guard: Guard, pod: Wire, remote: Wire) -> None:
    remote.send(remote.datagram(b"stale?", ports=PORTS[::-1]))
    assert pod.find(b"stale?", PATIENCE_S) is not None
    pod.send(pod.datagram(b"answer-1"))
    answer = remote.find(b"answer-1", PATIENCE_S)
    assert answer is not None
    assert is_marked(answer, MARKER_ID)
    assert decode_udp(answer).payload == b"answer-1"


@pytest.mark.parametrize("kind", [TYPE_ANSWER, TYPE_PROOF, TYPE_OFFER, TYPE_REHANDSHAKE, TYPE_CHALLENGE])
def test_what_follows_an_answer_of_the_peers_enforcer_is_not_marked(
    lab: Lab, guard: Guard, pod: Wire, remote: Wire, kind: int
) -> None:
    """Another message of it may be had by asking, and says nothing."""
    pod.send(pod.message(TYPE_OFFER))
    assert remote.find(b"\xd3TRI", PATIENCE_S) is not None
    remote.send(remote.message(kind, PORTS[::-1]))
    assert pod.find(b"\xd3TRI", PATIENCE_S) is not None
    remote.send(remote.datagram(b"reply", ports=PORTS[::-1]))
    assert pod.find(b"reply", PATIENCE_S) is not None
    pod.send(pod.datagram(b"next"))
    found = remote.find(b"next", PATIENCE_S)
    assert found is not None
    assert is_marked(found, MARKER_ID) is (kind not in (TYPE_ANSWER, TYPE_PROOF))


@pytest.mark.parametrize("marker", [PROOF_MARKER_ID, MARKER_ID])
def test_a_proof_beside_the_peers_datagram_is_told_by_its_marker(
    lab: Lab, guard: Guard, pod: Wire, remote: Wire, marker: int
) -> None:
    """An offer that an unproven request gets has another one."""
    remote.send(with_marker(decode_udp(remote.datagram(b"opened", ports=PORTS[::-1])), marker))
    assert pod.find(b"opened", PATIENCE_S) is not None
    pod.send(pod.datagram(b"reply"))
    found = remote.find(b"reply", PATIENCE_S)
    assert found is not None
    assert is_marked(found, MARKER_ID) is (marker != PROOF_MARKER_ID)


def test_a_connection_needs_a_handshake(lab: Lab, guard: Guard, pod: Wire, remote: Wire, version: int) -> None:
    def data(ports: tuple[int, int]) -> bytes:
        return build(*pod.ends, ports, (1_000, 2_000), ACK | PSH, 500, b"injected")

    pod.send(data((4444, 80)))
    assert remote.find(b"injected", 0.3) is None
    with lab.listen(lab.remote, version, 80) as listener, lab.open_socket(lab.pod, version) as client:
        client.connect((REMOTE[version], 80))
        server, _ = listener.accept()
        with server:
            client.sendall(b"by right")
            assert server.recv(8) == b"by right"
            server.sendall(b"answer")
            assert client.recv(6) == b"answer"
    grow_old(lab)
    pod.send(data((4445, 80)))
    assert remote.find(b"injected", PATIENCE_S) is not None


def in_connection(version: int) -> SentTuple:
    """Return the connection of the pod's port 4444 with port 80, by what the pod sends in it."""
    return SentTuple(6, ip_address(POD[version]), 4444, ip_address(REMOTE[version]), 80)


def test_a_stale_segment_is_dropped_and_refused_once_the_daemon_has_looked(
    lab: Lab, guard: Guard, pod: Wire, remote: Wire, version: int
) -> None:
    reset = (4444).to_bytes(2, "big") + (80).to_bytes(2, "big") + (2_000).to_bytes(4, "big")
    for is_looked_at in (False, True):
        remote.send(build(*remote.ends, (80, 4444), (1_000, 2_000), ACK, 500))
        assert (remote.find(reset, PATIENCE_S if is_looked_at else 0.3) is not None) is is_looked_at
        on_node(lab, lambda: guard.vouch([], [in_connection(version)]))
    assert pod.find((80).to_bytes(2, "big") + (4444).to_bytes(2, "big"), 0.2) is None


def test_without_a_log_a_stale_segment_is_refused_at_once(lab: Lab, guard: Guard, remote: Wire) -> None:
    guard._has_log = False
    text = guard._replacement({POD_SIDE.attachment: POD_SIDE})
    run_in(lab.node, ("nft", "-f", "-"), text)
    remote.send(build(*remote.ends, (80, 4444), (1_000, 2_000), ACK, 500))
    reset = (4444).to_bytes(2, "big") + (80).to_bytes(2, "big") + (2_000).to_bytes(4, "big")
    assert remote.find(reset, PATIENCE_S) is not None


@pytest.mark.parametrize("direction", ["sent", "reached"])
def test_segments_of_a_connection_that_is_vouched_for_pass(
    lab: Lab, guard: Guard, pod: Wire, remote: Wire, version: int, direction: str
) -> None:
    """As long as nothing of the address ends, and those of no other."""
    one, other, ports = (pod, remote, (4444, 80)) if direction == "sent" else (remote, pod, (80, 4444))

    def passes(timeout_s: float) -> bool:
        run_in(lab.node, ("sh", "-c", f"conntrack -D -p tcp -f ipv{version} 2>&1 || true"))  # No entry is an error.
        one.send(build(*one.ends, ports, (1_000, 2_000), ACK | PSH, 500, b"again"))
        return other.find(b"again", timeout_s) is not None

    assert not passes(0.3)
    on_node(lab, lambda: guard.vouch([in_connection(version)._replace(source_port=4445)], []))
    assert not passes(0.3)
    on_node(lab, lambda: guard.vouch([in_connection(version)], []))
    assert passes(PATIENCE_S)
    on_node(lab, lambda: guard.freshen([ip_address(POD[version])]))
    assert not passes(0.3)


@pytest.mark.parametrize("is_clean", [False, True], ids=["unclean", "clean"])
def test_what_an_unclean_address_sends_in_a_flow_of_before_its_pod(
    lab: Lab, guard: Guard, pod: Wire, remote: Wire, version: int, is_clean: bool
) -> None:
    """A stale peer's segment leaves an entry that a segment of the newcomer would make an established one.

    The guard knows nothing against it where the address passes for clean, which shows that these packets are right.
    """
    grow_old(lab)
    for place in (lab.pod, lab.remote):  # Their kernels know nothing of the connection, and would end it.
        tool = "iptables" if version == 4 else "ip6tables"
        run_in(place, (tool, "-I", "OUTPUT", "-p", "tcp", "--tcp-flags", "RST", "RST", "-j", "DROP"))
    remote.send(build(*remote.ends, (80, 4444), (1_000, 2_000), ACK, 500, b"stale-1"))
    assert pod.find(b"stale-1", PATIENCE_S) is not None
    remote.send(with_marker(decode_udp(remote.datagram(b"stale-2", ports=PORTS[::-1])), PROOF_MARKER_ID))
    assert pod.find(b"stale-2", PATIENCE_S) is not None
    addresses = [ip_address(POD[version])]
    on_node(lab, lambda: guard.freshen(addresses, is_clean=is_clean))
    on_node(lab, lambda: guard.freshen(addresses))  # What its pod does later does not make it clean.
    for n in range(3):
        pod.send(build(*pod.ends, (4444, 80), (2_000 + 8 * n, 1_007), ACK | PSH, 500, b"injected"))
        assert (remote.find(b"injected", 0.3) is not None) is is_clean
    pod.send(pod.datagram(b"plain"))
    plain = remote.find(b"plain", PATIENCE_S)
    assert plain is not None
    assert is_marked(plain, MARKER_ID) is not is_clean
    if not is_clean:
        remote.send(build(*remote.ends, (80, 4444), (1_007, 2_000), ACK, 500, b"stale-3"))
        assert pod.find(b"stale-3", 0.3) is None


@pytest.mark.parametrize("opener", ["pod", "remote"])
def test_an_unclean_address_has_flows_of_its_own(
    lab: Lab, guard: Guard, pod: Wire, remote: Wire, version: int, opener: str
) -> None:
    on_node(lab, lambda: guard.freshen([ip_address(POD[version])], is_clean=False))
    here, there, address = (lab.pod, lab.remote, REMOTE) if opener == "pod" else (lab.remote, lab.pod, POD)
    with lab.listen(there, version, 80) as listener, lab.open_socket(here, version) as client:
        client.settimeout(PATIENCE_S)
        client.connect((address[version], 80))
        server, _ = listener.accept()
        with server:
            server.settimeout(PATIENCE_S)
            client.sendall(b"by right")
            assert server.recv(8) == b"by right"
            server.sendall(b"answer")
            assert client.recv(6) == b"answer"
    pod.send(pod.message(TYPE_OFFER))
    assert remote.find(b"\xd3TRI", PATIENCE_S) is not None
    remote.send(remote.message(TYPE_ANSWER, PORTS[::-1]))
    assert pod.find(b"\xd3TRI", PATIENCE_S) is not None
    pod.send(pod.datagram(b"next"))
    found = remote.find(b"next", PATIENCE_S)
    assert found is not None
    assert not is_marked(found, MARKER_ID)


def test_entries_of_flows_with_a_reply_alone_are_removed(
    lab: Lab, guard: Guard, pod: Wire, remote: Wire, version: int
) -> None:
    grow_old(lab)
    for port in range(4444, 4450):
        remote.send(remote.datagram(b"one", ports=(5353, port)))
    _await(lambda: _count(lab) == 6)
    pod.send(pod.datagram(b"reply", ports=(4449, 5353)))
    assert remote.find(b"reply", PATIENCE_S) is not None
    addresses = [ip_address(POD[version])]
    assert on_node(lab, lambda: remove_of(addresses, is_answered=True)) in (1, 2)  # IPv4 is asked for by each end.
    assert _count(lab) == 5
    assert on_node(lab, lambda: remove_of(addresses, limit=3)) == 3
    assert _count(lab) == 2


def _count(lab: Lab) -> int:
    listings = [run_in(lab.node, ("conntrack", "-L", "-f", family, "-p", "udp")) for family in ("ipv4", "ipv6")]
    return sum("dport=5353" in line for listing in listings for line in str(listing).splitlines())


def test_entries_of_an_address_are_removed_and_no_others(lab: Lab, guard: Guard, pod: Wire, version: int) -> None:
    grow_old(lab)
    addresses = [ip_address(POD[version])]
    for port in range(4444, 4450):
        pod.send(pod.datagram(b"one", ports=(port, 5353)))
    with lab.open_socket(lab.node, version, socket.SOCK_DGRAM) as other:
        other.bind((NODE_OUTSIDE[version], 4444))
        other.sendto(b"another's", (REMOTE[version], 5353))
        _await(lambda: _count(lab) == 7)
        assert on_node(lab, lambda: remove_of(addresses, limit=2)) == 2
        one = SentTuple(17, ip_address(POD[version]), 4449, ip_address(REMOTE[version]), 5353)
        on_node(lab, lambda: remove_flows([one, one]))
        _await(lambda: _count(lab) in (4, 5))
        assert on_node(lab, lambda: remove_of(addresses)) in (3, 4)
        assert _count(lab) == 1
        assert on_node(lab, lambda: remove_of(addresses)) == 0


def test_a_kernel_that_does_not_filter_gives_the_same(
    lab: Lab, guard: Guard, pod: Wire, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow_old(lab)
    pod.send(pod.datagram(b"one"))
    _await(lambda: _count(lab) == 1)
    family = b"\x02" if version == 4 else b"\x0a"
    monkeypatch.setattr(nodeflows, "encode_filter", lambda *_: family + bytes(3))
    assert on_node(lab, lambda: remove_of([ip_address("10.1.1.1" if version == 4 else "fd01::1")])) == 0
    assert on_node(lab, lambda: remove_of([ip_address(POD[version])])) >= 1
    assert _count(lab) == 0


def _await(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 3
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def left_of(lab: Lab, name: str) -> dict[str, float]:
    """Return how long the elements of a set last yet, seconds."""
    listing = json.loads(run_in(lab.node, ("nft", "-j", "list", "set", "inet", "trireme_guard", name)))
    elements = next(entry["set"] for entry in listing["nftables"] if "set" in entry).get("elem", [])
    return {each["elem"]["val"]: float(each["elem"]["expires"]) for each in elements}


def shorten(lab: Lab, name: str, address: str, seconds: int) -> None:
    for verb, timeout in (("delete", ""), ("add", f" timeout {seconds}s")):
        command = f"{verb} element inet trireme_guard {name} {{ {address}{timeout} }}"
        run_in(lab.node, ("nft", command))


def test_a_restart_keeps_what_is_left_of_the_fresh_time(lab: Lab, guard: Guard, version: int) -> None:
    """The kernel's elements count, also after a crash: the daemon that comes next asks the tables themselves."""
    shorten(lab, f"fresh_tcp{version}", POD[version], 100)
    run_in(lab.node, ("nft", "flush", "set", "inet", "trireme_guard", f"fresh_udp{version}"))
    other, later = 10 - version, Guard(NETWORKS)
    on_node(lab, lambda: later.replace([POD_SIDE]))
    assert 90 < left_of(lab, f"fresh_tcp{version}")[POD[version]] <= 101
    assert left_of(lab, f"fresh_udp{version}") == {}
    assert left_of(lab, f"fresh_tcp{other}")[POD[other]] > 500
    assert later.fresh_udp_s([ip_address(POD[version])]) == 0.0
    assert 100 < later.fresh_udp_s(POD_SIDE.addresses) <= 120


def test_an_unclean_address_stays_so_over_a_restart(lab: Lab, guard: Guard, version: int) -> None:
    on_node(lab, lambda: guard.freshen([ip_address(POD[version])], is_clean=False))
    on_node(lab, lambda: Guard(NETWORKS).replace([POD_SIDE]))
    assert left_of(lab, f"unclean{version}")[POD[version]] > 500


@pytest.mark.parametrize("life", ["", "another"])
def test_an_address_of_which_the_earlier_tables_do_not_tell_is_fresh(lab: Lab, guard: Guard, life: str) -> None:
    """Another pod has it, its pod has another identity, or an earlier version did not write whose it was."""
    on_node(lab, lambda: guard.apply(replace(POD_SIDE, life="one")))
    if not life:
        command = (
            f"delete element inet trireme_guard own4 {{ {POD[4]} }}; add element inet trireme_guard own4 {{ {POD[4]} }}"
        )
        run_in(lab.node, ("nft", command))
    grow_old(lab)
    on_node(lab, lambda: Guard(NETWORKS).replace([replace(POD_SIDE, life=life or "one")]))
    assert POD[4] in left_of(lab, "fresh_tcp4")
    assert (POD[6] in left_of(lab, "fresh_tcp6")) is bool(life)


def test_tables_that_are_made_anew_keep_the_times(lab: Lab, guard: Guard) -> None:
    later = Guard(NETWORKS)
    shorten(lab, "fresh_tcp4", POD[4], 100)
    on_node(lab, lambda: later.replace([POD_SIDE]))
    run_in(lab.node, ("nft", "flush", "ruleset"))
    assert on_node(lab, later.restore)
    assert 90 < left_of(lab, "fresh_tcp4")[POD[4]] <= 101
    on_node(lab, lambda: later.apply(replace(POD_SIDE, life="another")))
    assert left_of(lab, "fresh_tcp4")[POD[4]] > 500
    on_node(lab, lambda: later.remove(POD_SIDE.attachment))
    assert left_of(lab, "fresh_tcp4") == {}


def test_an_address_is_fresh_without_a_new_program_or_with_it(
    lab: Lab, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow_old(lab)
    addresses = [ip_address(POD[4]), ip_address(POD[6])]
    with monkeypatch.context() as patched:
        patched.setattr(guard_module, "run", lambda *_: pytest.fail("nft is started"))
        on_node(lab, lambda: guard.freshen(addresses))
    for name, address in (("fresh_tcp4", POD[4]), ("fresh_udp6", POD[6])):
        assert left_of(lab, name)[address] > 100
    assert not on_node(lab, guard.restore)  # Nothing was touched but the elements.
    run_in(lab.node, ("nft", "flush", "ruleset"))
    on_node(lab, lambda: guard.freshen(addresses))
    assert left_of(lab, "fresh_tcp6")[POD[6]] > 100
