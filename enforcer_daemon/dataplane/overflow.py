# SPDX-License-Identifier: Apache-2.0
"""A queue that has no room: what the rules send there, since it comes too fast, the kernel drops and counts.

A rule that drops would be counted in as many places as there are kinds of rules, and read by starting a program for
each pod; the counters of queues are one small file. Nothing of the packet is copied. Where nobody has bound the queue
the kernel drops as well, and does not count. Source: net/netfilter/nfnetlink_queue.c, __nfqnl_enqueue_packet.
"""

from __future__ import annotations

from netfilterqueue import COPY_META, NetfilterQueue, Packet

from enforcer_daemon.dataplane.netns import open_in


def overflow_number(queue_number: int) -> int:
    """Return the number of the queue that takes what another queue shall not see."""
    return queue_number + 1


class Overflow:
    """The queue without room, of one pod."""

    __slots__ = ("_queue",)

    def __init__(self, netns_fd: int, queue_number: int) -> None:
        """Bind it beside the pod's queue; raise OSError if another process has it."""
        self._queue: NetfilterQueue = open_in(netns_fd, NetfilterQueue)
        self._queue.bind(overflow_number(queue_number), _refuse, max_len=0, mode=COPY_META)

    def close(self) -> None:
        """Unbind it; call it once."""
        self._queue.unbind()


def _refuse(packet: Packet) -> None:
    """Never asked, since nothing waits here."""
    packet.drop()
