# SPDX-License-Identifier: Apache-2.0
"""The queue of one pod's packets: from the kernel to the evaluator, and the verdict back.

Built on the NetfilterQueue package. A connection takes this path six times, so it is short: bytes in, a verdict out.
A socket of netlink keeps its namespace alive; `close` leaves nothing behind. Source: linux/netfilter/nfnetlink_queue.h.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, cast

from netfilterqueue import NetfilterQueue, Packet

from enforcer_daemon.dataplane.inject import Injector
from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.dataplane.overflow import Overflow
from enforcer_daemon.dataplane.queuecounters import LostPackets, QueueCounters
from enforcer_daemon.dataplane.queuemessages import encode_uncut, offloads
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.marks import CONSUME, FORGET, GSO, OWN_MASK, RELEASED
from enforcer_daemon.model import Direction
from enforcer_daemon.verdict import Action, Effect, Inject, Verdict

MAX_COPIED_BYTES = 4_016
"""What NetfilterQueue gives of a packet: the end of a jumbo frame, or of a send that is not cut yet, is missing."""
_MESSAGE_BYTES = MAX_COPIED_BYTES + 512
"""Room for that and for what stands before it, which is more than NetfilterQueue asks for."""


class Answer(Protocol):
    """What is to be done with a packet, and beside it."""

    @property
    def verdict(self) -> Verdict: ...

    @property
    def effects(self) -> Sequence[Effect]: ...


Evaluate = Callable[[bytes, Direction, int], Answer]
"""Evaluates a packet: its bytes (MAX_COPIED_BYTES at most), its direction, and our bits of
its mark: of a packet with SYN, or of a datagram with a handshake's message, what its connection was released with
before; of a datagram, or a SYN that arrives, also REPLY; else 0. Of any packet CHECKSUM_PARTIAL and GSO."""

_OTHERS_MASK = OWN_MASK ^ 0xFFFF_FFFF
_SOL_NETLINK, _NETLINK_NO_ENOBUFS = 270, 5  # linux/netlink.h
_BACKLOG_DIVISOR = 8
"""How much shorter the turns of a queue are that had much more waiting at the end of its last one."""
_WAITING_BYTES = 2_560
"""What a packet that waits takes of the socket's buffer, at most, where it is no large send."""
_SO_MEMINFO, _MEMINFO_BYTES = 55, 4  # asm-generic/socket.h; the first number, SK_MEMINFO_RMEM_ALLOC
WINDOW = 64
"""Packets after which it is looked at anew what became of them."""
_PRODUCTIVE_DIVISOR = 16
"""Of how many packets one at least releases its flow, where connections come about: it is every third or fourth."""
_PREROUTING = 0  # linux/netfilter.h: NF_INET_PRE_ROUTING; the other hook is NF_INET_POST_ROUTING


class _Turn:
    """What NetfilterQueue.run_socket takes for a socket: it ends after so many packets."""

    __slots__ = ("_sock", "left", "message")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.left = 0
        self.message = b""
        """The last one: that of the packet which is evaluated."""

    def recv(self, size: int) -> bytes:
        if self.left <= 0:
            raise BlockingIOError(errno.EAGAIN, "the turn is over")
        self.message = self._sock.recv(max(size, _MESSAGE_BYTES), socket.MSG_DONTWAIT)
        self.left -= 1
        return self.message


@dataclass(frozen=True, slots=True)
class QueueSizes:
    """How much of one pod's packets waits where. Code and tests construct other values."""

    length: int = 4_096
    """Packets that wait in the kernel's queue; beyond it the kernel drops and counts. One second's worth of SYNs."""
    receive_buffer_bytes: int = 4 * 1024 * 1024
    """Socket buffer of the queue; beyond it the kernel drops and counts. As large as a full queue of small packets."""
    batch: int = 16
    """Packets of one pod before the next pod is served; an eighth of it while more wait all the time. At 16 the system
    calls cost little, and a pod waits less than a millisecond for another (docs/adr/0011-uvloop.md)."""


class PacketQueue:
    """One endpoint's queue, bound inside its network namespace. For the event loop's thread alone."""

    __slots__ = (
        "_counters",
        "_evaluate",
        "_held",
        "_injector",
        "_is_backlogged",
        "_looked_at",
        "_on_error",
        "_overflow",
        "_packets_per_turn",
        "_productive",
        "_queue",
        "_refused",
        "_sock",
        "_turn",
        "errors",
        "is_mostly_refused",
        "is_unproductive",
        "lost",
    )  # fmt: skip

    def __init__(
        self,
        queue: NetfilterQueue,
        injector: Injector,
        evaluate: Evaluate,
        on_error: Callable[[Exception], None],
        packets_per_turn: int,
    ) -> None:
        """Use `open`."""
        self._queue: NetfilterQueue | None = queue
        self._sock = socket.socket(fileno=os.dup(queue.get_fd()))
        self._turn = _Turn(self._sock)
        self._injector = injector
        self._evaluate = evaluate
        self._on_error = on_error
        self._packets_per_turn = packets_per_turn
        self._is_backlogged = False
        self._looked_at = self._refused = self._productive = 0
        self.is_mostly_refused = False
        """Whether most of the last packets were dropped."""
        self.is_unproductive = False
        """Whether hardly any of the last packets released a flow."""
        self._held: dict[int, Packet] = {}
        self._counters: QueueCounters | None = None
        self._overflow: Overflow | None = None
        self.lost = LostPackets()
        """What the kernel dropped before it could be evaluated, as of the last `count_lost`."""
        self.errors = 0

    @classmethod
    def open(
        cls,
        netns_fd: int,
        number: int,
        sizes: QueueSizes,
        evaluate: Evaluate,
        *,
        on_error: Callable[[Exception], None],
        ifindex: int = 0,
    ) -> PacketQueue:
        """Bind the queue inside the namespace; raise DataplaneError if another process has it.

        `on_error` is told what the evaluator raised; the packet is then dropped. `ifindex` is the interface for packets
        to link-local addresses.
        """
        injector = Injector(netns_fd, ifindex)
        try:
            # The library's netlink socket belongs to the namespace in which it is made, wherever it is used.
            queue = open_in(netns_fd, NetfilterQueue)
            self = cls(queue, injector, evaluate, on_error, sizes.batch)
        except OSError as err:
            injector.close()
            raise DataplaneError(f"queue {number}: {err}") from err
        except BaseException:
            injector.close()
            raise
        try:
            # A full buffer is no error of the socket: it would end the event loop's interest in it, and with
            # NETLINK_S_CONGESTED also lose all that comes before the buffer is empty again. The kernel counts.
            self._sock.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
            self._counters = QueueCounters(netns_fd, number)
            self._overflow = Overflow(netns_fd, number)
            queue.bind(
                number,
                self._on_packet,
                max_len=sizes.length,
                range=0xFFFF,
                sock_len=sizes.receive_buffer_bytes,
            )
            self._sock.send(encode_uncut(number))
        except OSError as err:
            self.close()
            raise DataplaneError(f"queue {number}: {err}; does another enforcer run here?") from err
        except BaseException:
            self.close()
            raise
        return self

    def count_lost(self) -> LostPackets:
        """Ask the kernel what it dropped of this queue so far."""
        if self._counters is not None:
            self.lost = self._counters.read()
        return self.lost

    @property
    def injection_errors(self) -> int:
        """How many packets of our own the kernel refused."""
        return self._injector.errors

    @property
    def held_packets(self) -> int:
        """How many packets wait in the kernel for an effect that settles them."""
        return len(self._held)

    @property
    def has_more(self) -> bool:
        """Whether the last turn ended at its limit, so that more packets may wait."""
        return self._turn.left <= 0

    def fileno(self) -> int:
        """Return the descriptor that is readable when packets wait; -1 after `close`."""
        return self._sock.fileno()

    def read_batch(self) -> int:
        """Evaluate the packets that wait, up to the bound of a turn; return how many were read.

        Where that is the bound, more may wait: the loop calls again when the descriptor is readable. A queue in which
        more than another turn waits has short turns, so that one pod's load costs the others little. If all have a
        backlog, they are equal again.
        """
        if self._queue is None:
            return 0
        turn = self._turn
        bound = self._packets_per_turn
        if self._is_backlogged:
            bound = max(1, bound // _BACKLOG_DIVISOR)
        turn.left = bound
        self._queue.run_socket(cast(socket.socket, turn))
        # Whether any packet waits tells nothing: of a few connections at once some packet always does.
        self._is_backlogged = turn.left <= 0 and self._waiting_bytes() > self._packets_per_turn * _WAITING_BYTES
        self._looked_at += bound - turn.left
        if self._looked_at >= WINDOW:
            self.is_mostly_refused = 2 * self._refused > self._looked_at
            self.is_unproductive = _PRODUCTIVE_DIVISOR * self._productive < self._looked_at
            self._looked_at = self._refused = self._productive = 0
        return bound - turn.left

    def _waiting_bytes(self) -> int:
        return int.from_bytes(self._sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO_BYTES), sys.byteorder)

    def apply(self, effects: Sequence[Effect]) -> None:
        """Apply effects in order: of a packet after its own verdict, of a timer, or of a change."""
        for effect in effects:
            if isinstance(effect, Inject):
                self._injector.send(
                    effect.packet, is_untracked=effect.is_untracked
                )  # Our rules queue it too; the datapath knows its own packets.
            else:
                packet = self._held.pop(effect.hold_id, None)
                if packet is not None:
                    self._answer(packet, effect.verdict)

    def close(self) -> None:
        """Unbind and close everything; the kernel drops what waits. A second time does nothing."""
        queue, self._queue = self._queue, None
        self._held.clear()  # each held packet keeps the queue's socket, and so the namespace
        if queue is not None:
            queue.unbind()
        self._sock.close()
        self._injector.close()
        for part in (self._counters, self._overflow):
            if part is not None:
                part.close()
        self._counters = self._overflow = None

    def _on_packet(self, packet: Packet) -> None:
        try:
            payload = packet.get_payload()
            left_to_do = offloads(self._turn.message)
            mark = packet.mark & OWN_MASK | left_to_do
            if packet.hook == _PREROUTING:
                output = self._evaluate(payload, Direction.INGRESS, mark)
            else:
                output = self._evaluate(payload, Direction.EGRESS, mark)
            verdict = output.verdict
            if left_to_do & GSO and verdict.payload is not None:
                raise DataplaneError("a send that is not cut yet cannot be rewritten")
            self._answer(packet, verdict)
            if verdict.action is Action.DROP:
                self._refused += 1
            if output.effects:
                self.apply(output.effects)
        except Exception as err:  # noqa: BLE001 - the boundary: whatever goes wrong, this packet does not pass
            self._fail(packet, err)

    def _answer(self, packet: Packet, verdict: Verdict) -> None:
        action, payload, mark, hold_id, when_drained = verdict
        self._productive += _is_established(mark, packet.mark)
        if when_drained and self._has_more():
            action = Action.TAKE if action is Action.CONSUME else Action.ACCEPT
        if action is Action.DROP or action is Action.TAKE:
            packet.drop()
            return
        if action is Action.HOLD:
            if hold_id in self._held:
                raise DataplaneError(f"hold_id {hold_id}: another packet is held under it")
            self._held[hold_id] = packet
            return
        if payload is not None:
            packet.set_payload(payload)
        if action is Action.ACCEPT:
            if packet.mark & OWN_MASK:
                packet.set_mark(packet.mark & _OTHERS_MASK)
            packet.accept()
        elif action is Action.RELEASE:
            packet.set_mark(packet.mark & _OTHERS_MASK | mark)
            packet.repeat()
        elif action is Action.CONSUME:
            packet.set_mark(packet.mark & _OTHERS_MASK | mark | CONSUME)
            packet.repeat()
        else:
            packet.set_mark(packet.mark & _OTHERS_MASK | FORGET)
            packet.repeat()

    def _has_more(self) -> bool:
        try:
            self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True

    def _fail(self, packet: Packet, err: Exception) -> None:
        self.errors += 1
        self._refused += 1
        self._held = {hold_id: held for hold_id, held in self._held.items() if held is not packet}
        with suppress(RuntimeError):  # it has its verdict, and an effect failed
            packet.drop()
        self._on_error(err)


def _is_established(mark: int, earlier_mark: int) -> bool:
    """Return whether a packet's verdict releases its flow; one more of a flow that was released before is none.

    Nor is a message that ended here: an attacker with an identity can send the same one as often as he likes. A release
    that waits for an empty queue counts: in that of a busy server of datagrams more always waits.
    """
    return bool(mark & RELEASED) and not earlier_mark & RELEASED
