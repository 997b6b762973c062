# SPDX-License-Identifier: Apache-2.0
"""The queue against real packets: verdicts, held packets, our own packets, limits, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import uvloop

from enforcer_daemon.datapath.endpoint import Output
from enforcer_daemon.dataplane.inject import Injector
from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.dataplane.queue import MAX_COPIED_BYTES, WINDOW, PacketQueue
from enforcer_daemon.dataplane.queuecounters import LostPackets
from enforcer_daemon.dataplane.ratelimits import QueueLimits
from enforcer_daemon.dataplane.tools import run_in
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.marks import CHECKSUM_PARTIAL, GSO, OWN_MASK, released_mark
from enforcer_daemon.model import Direction
from enforcer_daemon.packet.udp import decode_udp
from enforcer_daemon.verdict import ACCEPT, DROP, TAKEN, Action, Inject, Settle, Verdict
from tests.netns.lab import (
    ACK,
    BACKENDS,
    EVERY_BACKEND,
    POD,
    QUEUE,
    REMOTE,
    RST,
    SIZES,
    SYN,
    Lab,
    Recorder,
    is_syn,
    make_backend,
    open_lab,
    serve,
    tcp_packet,
    wait_until,
)

pytestmark = [pytest.mark.kernel, pytest.mark.stock_kernel]

UDP_SEGMENT = 103
"""linux/udp.h: size of the datagrams that one send is cut into."""
HEADERS = {4: 28, 6: 48}
"""Bytes of IP and UDP header."""
LOW_RATE = 10
"""SYNs a second that a source may send, so few that a flood of any machine exceeds it."""
DATAGRAMS = 3
"""Datagrams of no known flow that a source may send for each SYN (ratelimits.py)."""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with open_lab() as lab:
        BACKENDS["iptables-nft"]().apply(lab.pod, lab.rules())
        yield lab


@pytest.fixture(params=(4, 6), ids=("ipv4", "ipv6"))
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def silent(err: Exception) -> None:
    raise AssertionError from err


def test_accept_and_drop(lab: Lab, version: int) -> None:
    evaluate = Recorder()
    with serve(lab, evaluate), lab.listen(lab.pod, version):
        assert lab.connects(lab.remote, (POD[version], 8080))
        evaluate.answer = lambda *_: DROP
        assert not lab.connects(lab.remote, (POD[version], 8080), 0.3)
    directions = [direction for _, direction, _ in evaluate.seen[:3]]
    assert directions == [Direction.INGRESS, Direction.EGRESS, Direction.INGRESS]


def test_a_payload_of_the_judge_takes_the_packets_place(lab: Lab) -> None:
    def shout(packet: bytes, *_: object) -> Verdict:
        return Verdict(Action.ACCEPT, payload=packet[:26] + b"\0\0" + packet[28:].upper())

    with (
        serve(lab, shout),
        lab.open_socket(lab.pod, 4, socket.SOCK_DGRAM) as service,
        lab.open_socket(lab.remote, 4, socket.SOCK_DGRAM) as client,
    ):
        service.bind((POD[4], 53))
        client.sendto(b"whisper", (POD[4], 53))
        assert service.recv(16) == b"WHISPER"


def test_held_packets_are_settled_in_the_order_of_the_effects(lab: Lab) -> None:
    def hold_until_three(packet: bytes, *_: object) -> Verdict | Output:
        number = packet[28] - ord("0")
        if number < 3:
            return Verdict(Action.HOLD, hold_id=number)
        return Output(effects=(Settle(2, ACCEPT), Settle(1, ACCEPT), Settle(9, ACCEPT)))

    with (
        serve(lab, hold_until_three) as queue,
        lab.open_socket(lab.pod, 4, socket.SOCK_DGRAM) as service,
        lab.open_socket(lab.remote, 4, socket.SOCK_DGRAM) as client,
    ):
        service.bind((POD[4], 53))
        for text in (b"1", b"2", b"3"):
            client.sendto(text, (POD[4], 53))
        assert [service.recv(16), service.recv(16)] == [b"2", b"1"]
        assert queue.held_packets == 0


def test_a_flow_is_released_when_nothing_more_waits(lab: Lab) -> None:
    """So that what comes after the release overtakes nothing that came before it."""
    released = Verdict(Action.RELEASE, mark=released_mark(0), when_drained=True)
    one_a_turn = dataclasses.replace(SIZES, batch=1)
    queue = PacketQueue.open(lab.pod, QUEUE, one_a_turn, Recorder(lambda *_: released), on_error=silent)
    try:
        with (
            lab.open_socket(lab.pod, 4, socket.SOCK_DGRAM) as service,
            lab.open_socket(lab.remote, 4, socket.SOCK_DGRAM) as client,
        ):
            service.bind((POD[4], 53))
            client.connect((POD[4], 53))
            client.send(b"1")
            client.send(b"2")
            assert wait_until(lambda: waiting(lab) == 2)
            assert queue.read_batch() == 1
            client.send(b"3")
            assert wait_until(lambda: waiting(lab) == 2)
            assert [queue.read_batch(), queue.read_batch()] == [1, 1]
            client.send(b"4")
            assert [service.recv(16) for _ in range(4)] == [b"1", b"2", b"3", b"4"]
            assert queue.read_batch() == 0
    finally:
        queue.close()


def test_a_send_that_the_kernel_will_cut_comes_whole_and_nothing_of_it_is_lost(lab: Lab, version: int) -> None:
    """Of three before conntrack knows the flow, the kernel would drop most of what it had cut for the queue."""
    evaluate = Recorder(lambda *_: Verdict(Action.HOLD, hold_id=len(evaluate.seen)))
    queue = PacketQueue.open(lab.pod, QUEUE, SIZES, evaluate, on_error=silent)
    sends = [[bytes((65 + send, 65 + n)) * 50 for n in range(4)] for send in range(3)]
    try:
        with (
            lab.open_socket(lab.remote, version, socket.SOCK_DGRAM) as service,
            lab.open_socket(lab.pod, version, socket.SOCK_DGRAM) as client,
        ):
            service.bind((REMOTE[version], 53))
            client.connect((REMOTE[version], 53))
            client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 100)
            for send in sends:
                client.send(b"".join(send))
            assert wait_until(lambda: bool(queue.read_batch()) and len(evaluate.seen) == 3)
            assert [(decode_udp(packet).payload, mark) for packet, _, mark in evaluate.seen] == [
                (b"".join(send), CHECKSUM_PARTIAL | GSO) for send in sends
            ]
            queue.apply(tuple(Settle(hold_id, ACCEPT) for hold_id in (1, 2, 3)))
            assert sorted(service.recv(1_000) for _ in range(12)) == sorted(part for send in sends for part in send)
    finally:
        queue.close()


def test_a_send_that_the_kernel_will_cut_is_never_rewritten(lab: Lab) -> None:
    errors: list[Exception] = []
    evaluate = Recorder(lambda packet, *_: Verdict(Action.ACCEPT, packet))
    queue = PacketQueue.open(lab.pod, QUEUE, SIZES, evaluate, on_error=errors.append)
    try:
        with lab.open_socket(lab.pod, 4, socket.SOCK_DGRAM) as client:
            client.connect((REMOTE[4], 53))
            client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 100)
            client.send(bytes(400))
            assert wait_until(lambda: queue.read_batch() == 1)
        assert [str(err) for err in errors] == ["a send that is not cut yet cannot be rewritten"]
        assert (queue.errors, queue.held_packets) == (1, 0)
    finally:
        queue.close()


@pytest.mark.parametrize("length", [4_000, 9_000, 60_000])
def test_a_send_that_is_longer_than_the_copy_of_it_passes(lab: Lab, version: int, length: int) -> None:
    evaluate = Recorder()
    with (
        serve(lab, evaluate),
        lab.open_socket(lab.pod, version, socket.SOCK_DGRAM) as service,
        lab.open_socket(lab.remote, version, socket.SOCK_DGRAM) as client,
    ):
        service.bind((POD[version], 53))
        client.connect((POD[version], 53))
        client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1_000)
        client.send(bytes(length))
        assert [len(service.recv(2_000)) for _ in range(length // 1_000)] == [1_000] * (length // 1_000)
    assert {len(packet) for packet, _, _ in evaluate.seen} == {min(length + HEADERS[version], MAX_COPIED_BYTES)}


def test_a_judge_that_fails_lets_nothing_pass(lab: Lab) -> None:
    errors: list[Exception] = []

    def fail(*_: object) -> Output:
        raise ValueError("a bug")

    queue = PacketQueue.open(lab.pod, QUEUE, SIZES, fail, on_error=errors.append)
    try:
        with lab.listen(lab.pod, 4):
            assert not lab.connects(lab.remote, (POD[4], 8080), 0.3)
            assert wait_until(lambda: queue.read_batch() >= 1)
        assert queue.errors == len(errors) >= 1
        assert str(errors[0]) == "a bug"
    finally:
        queue.close()


def test_an_effect_that_fails_is_reported(lab: Lab) -> None:
    errors: list[Exception] = []
    hold = Verdict(Action.HOLD, hold_id=1)
    queue = PacketQueue.open(lab.pod, QUEUE, SIZES, Recorder(lambda *_: hold), on_error=errors.append)
    try:
        with lab.open_socket(lab.remote, 4, socket.SOCK_DGRAM) as client:
            for _ in range(2):
                client.sendto(b"x", (POD[4], 53))
            assert wait_until(lambda: queue.read_batch() == 0 and queue.errors == 1)
        assert "hold_id 1" in str(errors[0])
        assert queue.held_packets == 1
    finally:
        queue.close()


CONSUMED = Verdict(Action.CONSUME, mark=released_mark(1))
RELEASED = Verdict(Action.RELEASE, mark=released_mark(1))


def test_a_turn_is_bounded_and_shorter_while_there_is_a_backlog(lab: Lab) -> None:
    """More than another turn has to wait: of some connections at once a packet always does, and that is no backlog."""
    sizes = dataclasses.replace(SIZES, batch=16)
    queue = PacketQueue.open(lab.pod, QUEUE, sizes, Recorder(lambda *_: DROP), on_error=silent)
    try:
        send_datagrams(lab, 21, 10)
        assert wait_until(lambda: waiting(lab) == 21)
        assert [queue.read_batch() for _ in range(3)] == [16, 5, 0]
        send_datagrams(lab, 200, 10)
        assert wait_until(lambda: waiting(lab) == 200)
        turns = [queue.read_batch() for _ in range(120)]
        shorter = turns.count(2)
        assert shorter > 16
        assert turns[: shorter + 1] == [16, *[2] * shorter]
        assert set(turns[shorter + 1 :]) <= {16, (200 - 16 - 2 * shorter) % 16, 0}
        assert sum(turns) == 200
    finally:
        queue.close()


@pytest.mark.parametrize(
    ("verdict", "is_refused", "is_unproductive"),
    [
        (DROP, True, True),
        (TAKEN, False, True),
        (ACCEPT, False, True),
        (Verdict(Action.CONSUME), False, True),
        (CONSUMED, False, False),
        (RELEASED, False, False),
        (CONSUMED._replace(when_drained=True), False, False),
        (RELEASED._replace(when_drained=True), False, False),
        (Verdict(Action.ACCEPT, mark=released_mark(1)), False, False),
    ],
    ids=[
        "dropped",
        "taken",
        "accepted",
        "taken back",
        "released by a message",
        "released",
        "released by a message behind which others wait",
        "released when the others have passed",
        "answered",
    ],
)
def test_what_is_of_no_use_is_told_from_honest_load(
    lab: Lab, verdict: Verdict, *, is_refused: bool, is_unproductive: bool
) -> None:
    queue = PacketQueue.open(lab.pod, QUEUE, SIZES, Recorder(lambda *_: verdict), on_error=silent)
    try:
        send_datagrams(lab, WINDOW - 1, 10)
        assert wait_until(lambda: waiting(lab) == WINDOW - 1)
        drain(queue)
        assert (queue.is_mostly_refused, queue.is_unproductive) == (False, False)
        send_datagrams(lab, 1)
        assert wait_until(lambda: bool(queue.read_batch()))
        assert (queue.is_mostly_refused, queue.is_unproductive) == (is_refused, is_unproductive)
    finally:
        queue.close()


def test_a_queue_is_looked_at_anew(lab: Lab) -> None:
    """One connection in sixteen packets is enough."""
    evaluate = Recorder(lambda *_: DROP)
    queue = PacketQueue.open(lab.pod, QUEUE, SIZES, evaluate, on_error=silent)
    try:
        send_datagrams(lab, WINDOW, 10)
        assert wait_until(lambda: waiting(lab) == WINDOW)
        drain(queue)
        assert queue.is_unproductive
        evaluate.answer = lambda *_: CONSUMED if len(evaluate.seen) % 16 == 0 else ACCEPT
        send_datagrams(lab, WINDOW, 10)
        assert wait_until(lambda: waiting(lab) == WINDOW)
        drain(queue)
        assert not queue.is_mostly_refused
        assert not queue.is_unproductive
    finally:
        queue.close()


def test_what_is_released_again_is_of_no_use(lab: Lab) -> None:
    """As by one packet of a handshake, sent without end."""
    evaluate = Recorder(lambda *_: RELEASED)
    queue = PacketQueue.open(lab.pod, QUEUE, SIZES, evaluate, on_error=silent)
    injector = Injector(lab.remote)
    try:
        with lab.listen(lab.pod, 4):
            for count in (1, WINDOW - 1):
                for _ in range(count):
                    assert injector.send(tcp_packet(("10.88.0.99", 4_000), (POD[4], 8080), SYN))
                assert wait_until(partial(has_waiting, lab, count))
                drain(queue)
        first, *others = (mark & OWN_MASK for _, _, mark in evaluate.seen)
        assert (first, set(others)) == (0, {RELEASED.mark})
        assert queue.is_unproductive
    finally:
        injector.close()
        queue.close()


def drain(queue: PacketQueue) -> None:
    while queue.read_batch():
        pass


def has_waiting(lab: Lab, count: int) -> bool:
    return waiting(lab) >= count


def waiting(lab: Lab) -> int:
    """Return how many packets wait for a verdict, by the kernel's count."""
    path = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")
    lines = open_in(lab.pod, lambda: path.read_text(encoding="ascii")).splitlines()
    return sum(int(line.split()[2]) for line in lines)


def send_datagrams(lab: Lab, count: int, length: int = 1_000) -> None:
    with lab.open_socket(lab.remote, 4, socket.SOCK_DGRAM) as client:
        for _ in range(count):
            client.sendto(bytes(length), (POD[4], 53))


def test_packets_that_the_socket_has_no_room_for_are_counted(lab: Lab) -> None:
    sizes = dataclasses.replace(SIZES, receive_buffer_bytes=8192)
    evaluate = Recorder(lambda *_: DROP)
    queue = PacketQueue.open(lab.pod, QUEUE, sizes, evaluate, on_error=silent)
    try:
        send_datagrams(lab, 1)  # So that none of the others waits for ARP, which has a bound of its own.
        assert wait_until(lambda: queue.read_batch() == 1)
        evaluate.seen.clear()
        send_datagrams(lab, 200)
        assert wait_until(lambda: queue.count_lost().buffer + waiting(lab) == 200)
        assert wait_until(lambda: queue.read_batch() == 0 and waiting(lab) == 0)
        assert 0 < len(evaluate.seen) < 200
        assert queue.count_lost() == queue.lost == LostPackets(buffer=200 - len(evaluate.seen))
    finally:
        queue.close()


def test_packets_that_the_queue_has_no_room_for_are_counted(lab: Lab) -> None:
    sizes = dataclasses.replace(SIZES, length=10)
    evaluate = Recorder(lambda *_: DROP)
    queue = PacketQueue.open(lab.pod, QUEUE, sizes, evaluate, on_error=silent)
    try:
        send_datagrams(lab, 50)
        assert wait_until(lambda: queue.count_lost() == LostPackets(queue=40))
        assert wait_until(lambda: queue.read_batch() == 0 and len(evaluate.seen) == 10)
    finally:
        queue.close()


@dataclasses.dataclass(frozen=True)
class Flood:
    """Datagrams from one address, and what became of them: each was either queued or dropped by the rate limiter."""

    sent: int
    queued: int
    dropped: int
    most: int
    """What the token bucket can have let through in the time that the flood took: its burst, and what it filled."""


def flood(lab: Lab, queue: PacketQueue, evaluate: Recorder, rate: int) -> Flood:
    """Send twice what the rate allows in the time that it takes, whatever time this machine takes; count all of it."""
    started, sent = time.monotonic(), 0

    def most() -> int:
        return int(rate * (1 + time.monotonic() - started)) + 1

    with lab.open_socket(lab.remote, 4, socket.SOCK_DGRAM) as client:
        while sent < 2 * most():
            client.sendto(b"flood", (POD[4], 53))
            sent += 1
    assert wait_until(lambda: len(evaluate.seen) + queue.count_lost().limit == sent)
    assert queue.count_lost() == LostPackets(limit=sent - len(evaluate.seen))
    return Flood(sent, len(evaluate.seen), queue.count_lost().limit, most())


@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_what_comes_faster_than_its_source_may_send_is_dropped_by_the_kernel_and_counted(name: str) -> None:
    limits = QueueLimits(per_source=LOW_RATE, total=1_000_000)
    evaluate = Recorder(lambda *_: DROP)
    with open_lab() as lab:
        make_backend(name).apply(lab.pod, dataclasses.replace(lab.rules(), limits=limits))
        with serve(lab, evaluate) as queue:
            result = flood(lab, queue, evaluate, LOW_RATE * DATAGRAMS)
            assert LOW_RATE * DATAGRAMS <= result.queued <= result.most
            assert result.dropped > 0
            evaluate.seen.clear()
            with lab.open_socket(lab.remote, 4) as same_source:
                same_source.setblocking(False)
                same_source.connect_ex((POD[4], 8080))
                assert wait_until(lambda: any(is_syn(packet) for packet, _, _ in evaluate.seen))
            with lab.open_socket(lab.remote, 6, socket.SOCK_DGRAM) as other_source:
                other_source.sendto(b"other", (POD[6], 53))
                assert wait_until(lambda: any(packet.endswith(b"other") for packet, _, _ in evaluate.seen))


@pytest.mark.parametrize("name", EVERY_BACKEND)
def test_all_sources_together_have_a_rate_too(name: str) -> None:
    limits = QueueLimits(per_source=1_000_000, total=LOW_RATE)
    evaluate = Recorder(lambda *_: DROP)
    with open_lab() as lab:
        make_backend(name).apply(lab.pod, dataclasses.replace(lab.rules(), limits=limits))
        with serve(lab, evaluate) as queue:
            result = flood(lab, queue, evaluate, LOW_RATE * DATAGRAMS)
            assert LOW_RATE * DATAGRAMS <= result.queued <= result.most
            assert result.dropped > 0


@pytest.mark.parametrize("loop_factory", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
def test_a_queue_is_served_again_after_its_buffer_was_full(
    lab: Lab, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """libuv gives up a descriptor that shows an error, as a netlink socket does after ENOBUFS."""
    sizes = dataclasses.replace(SIZES, receive_buffer_bytes=8192)
    is_judged = asyncio.Event()

    def evaluate(*_: object) -> Verdict:
        is_judged.set()
        return DROP

    queue = PacketQueue.open(lab.pod, QUEUE, sizes, Recorder(evaluate), on_error=silent)

    async def serve_floods() -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(queue.fileno(), queue.read_batch)
        try:
            for _ in range(3):
                is_judged.clear()
                lost = queue.lost.buffer
                send_datagrams(lab, 200)
                assert wait_until(lambda lost=lost: queue.count_lost().buffer > lost)  # type: ignore[misc]
                async with asyncio.timeout(20):
                    await is_judged.wait()
                while queue.read_batch():
                    pass
        finally:
            loop.remove_reader(queue.fileno())

    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(serve_floods())
        assert queue.count_lost().buffer > 0
    finally:
        queue.close()


def test_our_own_packet_passes_the_queue_like_any_other(lab: Lab, version: int) -> None:
    proof = tcp_packet((POD[version], 8080), (REMOTE[version], 6000), ACK, b"proof")

    def answer(packet: bytes, *_: object) -> Verdict | Output:
        return Output(effects=(Inject(proof),)) if is_syn(packet) else ACCEPT

    evaluate = Recorder(answer)
    kind = socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800 if version == 4 else 0x86DD)
    with serve(lab, evaluate) as queue, _sniff(lab.remote, kind) as wire:
        with lab.open_socket(lab.remote, version) as client:
            client.bind((REMOTE[version], 6000))
            client.setblocking(False)
            client.connect_ex((POD[version], 8080))
            assert wait_until(lambda: _next_packet(wire).endswith(b"proof"))
        assert queue.injection_errors == 0
    # On a slow machine its kernel, which the answer confuses, repeats the SYN before the client is closed.
    syns = [packet for packet, direction, _ in evaluate.seen if direction is Direction.INGRESS and is_syn(packet)]
    sent = [packet for packet, direction, _ in evaluate.seen if direction is Direction.EGRESS]
    assert sent == [proof] * len(syns)


def test_a_reset_of_our_own_reaches_the_pods_process(lab: Lab, version: int) -> None:
    def refuse(packet: bytes, direction: Direction, _: int) -> Verdict | Output:
        if not is_syn(packet):
            return ACCEPT
        offset = 20 if version == 4 else 40
        port = int.from_bytes(packet[offset : offset + 2], "big")
        isn = int.from_bytes(packet[offset + 4 : offset + 8], "big")
        reset = tcp_packet((REMOTE[version], 8080), (POD[version], port), RST | ACK, ack=isn + 1)
        return Output(effects=(Inject(reset),))

    with serve(lab, refuse), lab.open_socket(lab.pod, version) as client, pytest.raises(ConnectionRefusedError):
        client.connect((REMOTE[version], 8080))


def test_a_packet_that_cannot_be_sent_is_counted(lab: Lab) -> None:
    with serve(lab, Recorder()) as queue:
        queue.apply((Inject(b""), Inject(b"\x45"), Inject(b"\x60" + bytes(38))))
        assert queue.injection_errors == 3


def test_a_second_owner_of_the_queue_is_refused_by_name(lab: Lab) -> None:
    with serve(lab, Recorder()), pytest.raises(DataplaneError, match=f"queue {QUEUE}"):
        PacketQueue.open(lab.pod, QUEUE, SIZES, Recorder(), on_error=silent)


def test_close_leaves_no_descriptor_and_no_namespace() -> None:
    before = _descriptors()
    with open_lab() as lab:
        BACKENDS["iptables-nft"]().apply(lab.pod, lab.rules())
        hold = Verdict(Action.HOLD, hold_id=1)
        evaluate = Recorder(lambda *_: hold)
        queue = PacketQueue.open(lab.pod, QUEUE, SIZES, evaluate, on_error=silent)
        with lab.open_socket(lab.remote, 4, socket.SOCK_DGRAM) as client:
            client.sendto(b"x", (POD[4], 53))
        assert wait_until(lambda: queue.read_batch() == 0 and queue.held_packets == 1)
        queue.apply((Inject(tcp_packet((POD[4], 1), (REMOTE[4], 2), SYN)),))
        queue.close()
        queue.close()
        assert (queue.fileno(), queue.read_batch()) == (-1, 0)
        keep = os.dup(lab.node)
    try:
        # The pod's end of the veth goes with its namespace, and so does the node's.
        assert wait_until(lambda: "pod0" not in run_in(keep, ("ip", "link")))
    finally:
        os.close(keep)
    assert _descriptors() == before


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _sniff(place: int, kind: tuple[int, int, int]) -> socket.socket:
    sock = open_in(place, lambda: socket.socket(*kind))
    sock.setblocking(False)
    return sock


def _next_packet(sock: socket.socket) -> bytes:
    try:
        return sock.recv(4096)
    except BlockingIOError:
        return b""
