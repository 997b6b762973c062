# SPDX-License-Identifier: Apache-2.0
"""Two kernels' TCP in miniature, two enforcers before them, and a wire with planned faults, on a clock of their own.

Each side says one thing and repeats it until it is acknowledged. Times are those of Linux: SYN and SYN-ACK again after
1 s, data after 0.2 s, each doubled; an ACK that waits for company does so for 0.04 s.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from enforcer_daemon.model import Direction
from enforcer_daemon.packet.tcp import ACK, SYN, SYN_ACK, Segment, build, decode_tcp, with_options_and_payload
from enforcer_daemon.verdict import Action, Effect, Inject, Verdict
from tests.unit.datapath.pair import ENDING, SYN_OPTIONS, Endpoint, Result

WIRE_S = 0.001
_OPENING_S, _DATA_S, _DELAYED_ACK_S, _TIMERS_EVERY_S = 1.0, 0.2, 0.04, 0.1
_CLIENT_PORT, _SERVER_PORT = 40_000, 80
_MARK = 0xFFFF_FFFF

Faults = Mapping[tuple[str, int], tuple[float, ...]]
"""(who sends, number of the packet on the wire) -> after how long each copy of it arrives, besides the wire's own time;
no copy: it is lost."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a connection is used."""

    client_says: bytes
    server_says: bytes
    options: bytes
    """TCP options of all segments after the SYN-ACK."""
    acks_at_once: bool = True
    """Whether the client acknowledges the SYN-ACK without waiting for data to go along."""


class Clock:
    """What happens when."""

    def __init__(self) -> None:
        self.now = 1.0
        self._count = itertools.count()
        self._calls: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, wait_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._calls, (self.now + wait_s, next(self._count), call))

    def run_until(self, is_done: Callable[[], bool], limit_s: float) -> float | None:
        """Give how long it took; None where the limit came first."""
        start = self.now
        while not is_done():
            at, _, call = heapq.heappop(self._calls)
            if at > start + limit_s:
                return None
            self.now = at
            call()
        return self.now - start


class Enforcer:
    """One endpoint's datapath, with what the rules in its namespace do, and the timers of its daemon."""

    def __init__(self, endpoint: Endpoint, clock: Clock, wire: Wire, name: str) -> None:
        self.kernel: Kernel
        self._endpoint, self._clock, self._wire, self._name = endpoint, clock, wire, name
        self._held: dict[int, tuple[bytes, Direction]] = {}
        self.is_released = False
        clock.after(_TIMERS_EVERY_S, self._tend)

    def send(self, packet: bytes) -> None:
        self._pass(packet, Direction.EGRESS)

    def receive(self, packet: bytes) -> None:
        self._pass(packet, Direction.INGRESS)

    def _pass(self, packet: bytes, direction: Direction) -> None:
        if self.is_released and not decode_tcp(packet).flags & SYN:
            self._go_on(packet, direction)
            return
        mark = _MARK if self.is_released else 0
        result = self._endpoint.verdict(packet, direction, self._clock.now, mark)
        self._carry_out(packet, direction, result)
        self._apply(result.effects)
        if self._endpoint.wake_at is not None:
            self._clock.after(self._endpoint.wake_at - self._clock.now, self._run_timers)

    def _carry_out(self, packet: bytes, direction: Direction, verdict: Verdict | Result) -> None:
        if verdict.action is Action.HOLD:
            self._held[verdict.hold_id] = packet, direction
        elif verdict.action not in ENDING:
            self.is_released |= verdict.action is Action.RELEASE
            self._go_on(verdict.payload or packet, direction)

    def _apply(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            if isinstance(effect, Inject):
                self._pass(effect.packet, Direction.EGRESS)
            else:
                self._carry_out(*self._held.pop(effect.hold_id), effect.verdict)

    def _go_on(self, packet: bytes, direction: Direction) -> None:
        if direction is Direction.EGRESS:
            self._wire.carry(self._name, packet)
        else:
            self.kernel.receive(decode_tcp(packet))

    def _run_timers(self) -> None:
        self._apply(self._endpoint.expire(self._clock.now))

    def _tend(self) -> None:
        self._run_timers()
        self._clock.after(_TIMERS_EVERY_S, self._tend)


class Wire:
    """Carries packets, but for the faults that are planned."""

    def __init__(self, clock: Clock, faults: Faults) -> None:
        self.ends: dict[str, Enforcer] = {}
        self.sent = {"client": 0, "server": 0}
        self._clock, self._faults = clock, faults

    def carry(self, sender: str, packet: bytes) -> None:
        self.sent[sender] += 1
        receiver = self.ends["server" if sender == "client" else "client"]
        for late_s in self._faults.get((sender, self.sent[sender]), (0.0,)):
            self._clock.after(WIRE_S + late_s, lambda: receiver.receive(packet))


class Kernel:
    """One end's TCP: opens or answers, says its one thing, and hears."""

    def __init__(self, enforcer: Enforcer, clock: Clock, form: Form, ends: tuple[bytes, bytes]) -> None:
        self._enforcer, self._clock, self._form = enforcer, clock, form
        self._own, self._remote = ends
        self.says = b""
        self.heard = b""
        self.is_open = False
        self._peer_isn = -1
        self._acknowledged = 0
        self._saying = False

    isn = 0
    ports = 0, 0

    def receive(self, segment: Segment) -> None:
        raise NotImplementedError

    def emit(self, flags: int, payload: bytes = b"", options: bytes | None = None) -> None:
        options = self._form.options if options is None else options
        seq = self.isn if flags & SYN else self.isn + 1 + (0 if payload else self._acknowledged)
        ack = self._peer_isn + 1 + len(self.heard) if flags & ACK else 0
        bare = build(self._own, self._remote, self.ports, (seq, ack), flags, 502, options)
        self._enforcer.send(with_options_and_payload(decode_tcp(bare), options, payload))

    def say(self, wait_s: float = _DATA_S) -> None:
        """Send what there is to say, until it is acknowledged."""
        if self._acknowledged < len(self.says):
            self.emit(ACK, self.says)
            self._clock.after(wait_s, lambda: self.say(2 * wait_s))

    def hear(self, segment: Segment) -> None:
        """Take an open connection's segment."""
        self._acknowledged = max(self._acknowledged, segment.ack - self.isn - 1)
        if not self._saying:
            self._saying = True
            self.say()
        payload = segment.payload
        if payload:
            assert segment.seq == self._peer_isn + 1
            self.heard = payload
            self.emit(ACK)


class Client(Kernel):
    """Connects."""

    isn = 1_000
    ports = _CLIENT_PORT, _SERVER_PORT

    def connect(self, wait_s: float = _OPENING_S) -> None:
        if not self.is_open:
            self.emit(SYN, options=SYN_OPTIONS)
            self._clock.after(wait_s, lambda: self.connect(2 * wait_s))

    def receive(self, segment: Segment) -> None:
        if segment.flags & SYN:
            assert segment.options == SYN_OPTIONS
            was_open, self.is_open, self._peer_isn = self.is_open, True, segment.seq
            if was_open or self._form.acks_at_once:
                self.emit(ACK)
            else:
                self._clock.after(_DELAYED_ACK_S, lambda: self.emit(ACK))
        if self.is_open:
            self.hear(segment)


class Server(Kernel):
    """Is connected to."""

    isn = 5_000
    ports = _SERVER_PORT, _CLIENT_PORT

    def answer(self, wait_s: float = _OPENING_S) -> None:
        if not self.is_open:
            self.emit(SYN_ACK, options=SYN_OPTIONS)
            self._clock.after(wait_s, lambda: self.answer(2 * wait_s))

    def receive(self, segment: Segment) -> None:
        if segment.flags & SYN:
            assert not segment.payload
            is_first, self._peer_isn = self._peer_isn < 0, segment.seq
            if is_first:
                self.answer()
            elif not self.is_open:
                self.emit(SYN_ACK, options=SYN_OPTIONS)
        else:
            assert self._enforcer.is_released  # Nothing else comes before the proof.
            self.is_open = True
            self.hear(segment)


def converse(client: Endpoint, server: Endpoint, form: Form, faults: Faults, limit_s: float = 30.0) -> float | None:
    """Connect and let both sides speak; give how long it took until both have heard, None where they never did."""
    clock = Clock()
    wire = Wire(clock, faults)
    wire.ends = {
        "client": Enforcer(client, clock, wire, "client"),
        "server": Enforcer(server, clock, wire, "server"),
    }
    caller = Client(wire.ends["client"], clock, form, (client.address, server.address))
    called = Server(wire.ends["server"], clock, form, (server.address, client.address))
    caller.says, called.says = form.client_says, form.server_says
    wire.ends["client"].kernel, wire.ends["server"].kernel = caller, called
    caller.connect()
    return clock.run_until(
        lambda: called.is_open and (called.heard, caller.heard) == (form.client_says, form.server_says), limit_s
    )
