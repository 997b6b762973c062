# SPDX-License-Identifier: Apache-2.0
"""The nft rendering against real packets, also where the kernel lacks the queue expression.

In its place stands a jump to a chain of the test, and a table of the test marks packets as a repeated verdict would.
With a kernel that has the expression, the last tests are of the backend itself.
"""

from __future__ import annotations

import dataclasses
import re
import socket
import time
from collections.abc import Iterator

import pytest

from enforcer_daemon import marks
from enforcer_daemon.dataplane.inject import Injector
from enforcer_daemon.dataplane.overflow import overflow_number
from enforcer_daemon.dataplane.ratelimits import QueueLimits
from enforcer_daemon.dataplane.rules_nft import render_nft
from enforcer_daemon.dataplane.tools import run_in
from enforcer_daemon.model import Direction
from enforcer_daemon.verdict import ACCEPT, Action, Verdict
from tests.netns.lab import (
    ACK,
    LIMITS,
    NODE,
    POD,
    QUEUE,
    REMOTE,
    SYN,
    Lab,
    make_backend,
    open_lab,
    serve,
    tcp_flags,
    tcp_packet,
    wait_until,
)

pytestmark = [pytest.mark.kernel, pytest.mark.stock_kernel]

RELEASED_BY_5 = marks.released_mark(5)
REPEATING = f"""
add table inet repeat
add chain inet repeat in {{ type filter hook prerouting priority -155; }}
add chain inet repeat out {{ type filter hook postrouting priority -155; }}
add rule inet repeat in iifname eth0 tcp dport 8080 tcp flags & syn == syn meta mark set {marks.FORGET:#x}
add rule inet repeat in iifname eth0 tcp dport 8080 tcp flags & syn == 0 ct mark 0x539 meta mark set {RELEASED_BY_5:#x}
add rule inet repeat in iifname eth0 tcp dport 8081 tcp flags & syn == 0 ct mark 0 meta mark set {RELEASED_BY_5:#x}
add rule inet repeat out oifname eth0 tcp flags & syn == syn meta mark set {marks.FORGET:#x}
"""
OTHERS = """
add chain inet repeat others { type filter hook postrouting priority -154; }
add rule inet repeat others tcp sport 8080 ct mark 0 ct mark set 0x539
"""


def install(lab: Lab, evaluated: str = "counter drop", limits: QueueLimits = LIMITS) -> None:
    """Apply the rules twice, with a chain of the test in place of the queue."""
    text = render_nft(dataclasses.replace(lab.rules(), limits=limits)).replace("priority -152", "priority -160")
    text = text.replace(f"queue num {QUEUE}", "goto evaluated").replace(f"queue num {overflow_number(QUEUE)}", "drop")
    text = (
        f"add table inet trireme\nadd chain inet trireme evaluated\n{text}add rule inet trireme evaluated {evaluated}\n"
    )
    for _ in range(2):
        run_in(lab.pod, ("nft", "-f", "-"), text)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with open_lab() as lab:
        install(lab)
        yield lab


@pytest.fixture(params=(4, 6), ids=("ipv4", "ipv6"))
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def judged_packets(lab: Lab) -> int:
    listing = run_in(lab.pod, ("nft", "list", "chain", "inet", "trireme", "evaluated"))
    return sum(map(int, re.findall(r"packets (\d+)", listing)))


@pytest.mark.parametrize(
    "limits", [QueueLimits(1_000, 1_000_000), QueueLimits(1_000_000, 1_000)], ids=["source", "all"]
)
@pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"], indirect=True)
def test_what_comes_too_fast_is_not_judged(lab: Lab, version: int, limits: QueueLimits) -> None:
    install(lab, limits=limits)
    started = time.monotonic()
    with lab.open_socket(lab.remote, version, socket.SOCK_DGRAM) as client:
        for _ in range(10_000):
            client.sendto(b"x", (POD[version], 53))
    took_s = time.monotonic() - started
    assert 0 < judged_packets(lab) <= 3_000 * (1 + took_s) + 100


def test_only_the_node_reaches_the_pod(lab: Lab, version: int) -> None:
    with lab.listen(lab.pod, version), lab.listen(lab.remote, version):
        assert lab.connects(lab.node, (POD[version], 8080))
        assert judged_packets(lab) == 0
        assert not lab.connects(lab.remote, (POD[version], 8080), 0.3)
        assert not lab.connects(lab.pod, (REMOTE[version], 8080), 0.3)
        assert judged_packets(lab) >= 2
        assert lab.connects(lab.pod, (POD[version], 8080))


def test_a_syn_with_payload_is_judged_also_from_the_node(lab: Lab, version: int) -> None:
    injector = Injector(lab.node)
    injector.send(tcp_packet((NODE[version], 4000), (POD[version], 8080), SYN, b"f" * 300))
    injector.send(tcp_packet((NODE[version], 4001), (POD[version], 8080), ACK, b"d"))
    injector.close()
    assert wait_until(lambda: judged_packets(lab) == 2)


@pytest.mark.parametrize("mark", [marks.RELEASED, marks.FORGET, marks.NODE, marks.OWN_MASK])
def test_a_mark_that_a_process_sets_gains_it_nothing(lab: Lab, version: int, mark: int) -> None:
    with lab.listen(lab.remote, version):
        assert not lab.connects(lab.pod, (REMOTE[version], 8080), 0.3, mark=mark)


@pytest.mark.parametrize("others", [0, 0x539])
def test_release_is_saved_beside_the_bits_of_others_and_shown_to_a_later_syn(
    lab: Lab, version: int, others: int
) -> None:
    install(lab, f"tcp flags & syn == syn meta mark & {marks.OWN_MASK:#x} == {RELEASED_BY_5:#x} counter drop")
    run_in(lab.pod, ("nft", "-f", "-"), REPEATING)
    port = 8081
    if others:
        port = 8080
        run_in(lab.pod, ("nft", "-f", "-"), OTHERS)
    with lab.listen(lab.pod, version, port) as listener, lab.open_socket(lab.remote, version) as client:
        client.bind((REMOTE[version], 5000))
        client.connect((POD[version], port))
        accepted, _ = listener.accept()
        with accepted:
            client.sendall(b"in the kernel")
            assert accepted.recv(16) == b"in the kernel"
            entry = ("conntrack", "-L", "-f", f"ipv{version}", "-p", "tcp")
            assert f"mark={RELEASED_BY_5 | others} " in run_in(lab.pod, entry)
            run_in(lab.pod, ("nft", "delete", "table", "inet", "repeat"))
            injector = Injector(lab.remote)
            injector.send(tcp_packet((REMOTE[version], 5000), (POD[version], port), SYN, seq=9))
            injector.close()
            assert wait_until(lambda: judged_packets(lab) == 1)


DAMAGE = [
    "flush chain inet trireme main_in",
    "delete chain inet trireme egress",
    "add rule inet trireme ingress accept",
    "flush set inet trireme node4",
    "delete table inet trireme",
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen_and_repaired(damage: str) -> None:
    backend = make_backend("nft")
    with open_lab() as lab:
        backend.apply(lab.pod, lab.rules())
        assert backend.is_intact(lab.pod, lab.rules())
        run_in(lab.pod, ("nft", *damage.split()))
        assert not backend.is_intact(lab.pod, lab.rules())
        backend.apply(lab.pod, lab.rules())
        assert backend.is_intact(lab.pod, lab.rules())


def test_remove_leaves_nothing_and_can_be_repeated() -> None:
    backend = make_backend("nft")
    with open_lab() as lab:
        backend.apply(lab.pod, lab.rules())
        for _ in range(2):
            backend.remove(lab.pod)
            assert run_in(lab.pod, ("nft", "list", "ruleset")) == ""


def test_with_the_expression_the_queue_is_served(version: int) -> None:
    backend = make_backend("nft")
    with open_lab() as lab:
        for _ in range(2):
            backend.apply(lab.pod, lab.rules())
        assert backend.is_intact(lab.pod, lab.rules())

        def release_on_ack(packet: bytes, direction: Direction, mark: int) -> Verdict:
            return ACCEPT if tcp_flags(packet) & SYN else Verdict(Action.RELEASE, mark=RELEASED_BY_5)

        with lab.listen(lab.pod, version):
            assert not lab.connects(lab.remote, (POD[version], 8080), 0.3)
            with serve(lab, release_on_ack):
                assert lab.connects(lab.remote, (POD[version], 8080))
