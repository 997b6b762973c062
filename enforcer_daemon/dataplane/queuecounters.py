# SPDX-License-Identifier: Apache-2.0
"""What the kernel dropped of one queue before anybody could evaluate it: it counts exactly, where the socket only
hints.

Source: net/netfilter/nfnetlink_queue.c, seq_show. The open file belongs to the namespace, and keeps it alive.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.dataplane.overflow import overflow_number

_PATH = "/proc/thread-self/net/netfilter/nfnetlink_queue"
"""By the thread's own namespace: /proc/net would be that of the process's first thread."""
_MAX_BYTES = 4_096
"""Of some thirty queues; there is one but for other programs' in the pod."""
_NUMBER, _QUEUE_DROPPED, _USER_DROPPED = 0, 5, 6


class LostPackets(NamedTuple):
    """Packets that the kernel dropped since the queue was bound."""

    queue: int = 0
    """Because as many as may be waited for a verdict already."""
    buffer: int = 0
    """Because the socket's buffer was full."""
    limit: int = 0
    """Because they came faster than may be queued."""

    def since(self, before: LostPackets) -> LostPackets:
        """Return what came after another count."""
        return LostPackets(*(now - then for now, then in zip(self, before, strict=True)))


class QueueCounters:
    """The counters of one queue and of its overflow, read again and again."""

    __slots__ = ("_fd", "_number", "_overflow")

    def __init__(self, netns_fd: int, queue_number: int) -> None:
        """Open the counters of a namespace; raise OSError if the kernel has none."""
        self._number = str(queue_number)
        self._overflow = str(overflow_number(queue_number))
        self._fd = open_in(netns_fd, lambda: os.open(_PATH, os.O_RDONLY | os.O_CLOEXEC))

    def read(self) -> LostPackets:
        """Return the present state; nothing lost where the queue is not bound."""
        lost = LostPackets()
        for line in os.pread(self._fd, _MAX_BYTES, 0).decode("ascii").splitlines():
            fields = line.split()
            if fields[_NUMBER] == self._number:
                lost = lost._replace(queue=int(fields[_QUEUE_DROPPED]), buffer=int(fields[_USER_DROPPED]))
            elif fields[_NUMBER] == self._overflow:
                lost = lost._replace(limit=int(fields[_QUEUE_DROPPED]))
        return lost

    def close(self) -> None:
        """Let go of the namespace; call it once."""
        os.close(self._fd)
