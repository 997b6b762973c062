# SPDX-License-Identifier: Apache-2.0
"""What the kernel dropped of one queue before anybody could judge it: it counts exactly, where the socket only hints.

Source: net/netfilter/nfnetlink_queue.c, seq_show. The open file belongs to the namespace, and keeps it alive.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from enforcer_daemon.dataplane.netns import open_in

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


class QueueCounters:
    """The counters of one queue, read again and again."""

    __slots__ = ("_fd", "_number")

    def __init__(self, netns_fd: int, queue_number: int) -> None:
        """Open the counters of a namespace; raise OSError where the kernel has none."""
        self._number = str(queue_number)
        self._fd = open_in(netns_fd, lambda: os.open(_PATH, os.O_RDONLY | os.O_CLOEXEC))

    def read(self) -> LostPackets:
        """Give the present state; nothing lost where the queue is not bound."""
        for line in os.pread(self._fd, _MAX_BYTES, 0).decode("ascii").splitlines():
            fields = line.split()
            if fields[_NUMBER] == self._number:
                return LostPackets(int(fields[_QUEUE_DROPPED]), int(fields[_USER_DROPPED]))
        return LostPackets()

    def close(self) -> None:
        """Let go of the namespace; call it once."""
        os.close(self._fd)
