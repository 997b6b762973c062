# SPDX-License-Identifier: Apache-2.0
"""SYN-ACKs whose proof has not come: each is repeated once, well before the pod's kernel would repeat it.

A kernel waits one second for the ACK of its first SYN-ACK (RFC 6298, section 2), since it knows nothing of the path.
The enforcer does: it has seen how long the same peer took before. So a lost SYN-ACK, and a lost proof where the
responder is to speak first, are made good within a few round trips, as RACK-TLP (RFC 8985, section 7) does for data.
"""

from __future__ import annotations

from heapq import heappop, heappush

from enforcer_daemon.handshake.flows import ResponderFlow
from enforcer_daemon.handshake.machine import State

MIN_WAIT_S = 0.025
"""Before a SYN-ACK is repeated, seconds: a local network needs less than one, and so do two enforcers."""
MAX_WAIT_S = 0.5
"""Where two round trips take longer, the kernel's own repetition is soon enough."""
LAGS = 2
"""How many times as long as the SYN-ACK its proof may have to wait in the queue: one that is behind gets longer."""
MAX_LAG_S = 0.2
"""A queue that is further behind is not waited for any longer: the kernel's own repetition is near."""
_ROUND_TRIPS = 2
_UNPROVEN = (State.ANSWERED, State.PROVEN)


class Unproven:
    """Answers of one endpoint, by the time at which to repeat them; bounded by the flows that may be unfinished."""

    __slots__ = ("_bound", "_count", "_due")

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._count = 0
        self._due: list[tuple[float, int, ResponderFlow]] = []

    def add(self, flow: ResponderFlow, now: float, lag_s: float) -> None:
        """Note that a flow's SYN-ACK has left, after waiting so long in the pod's queue, where its proof waits too.

        Whoever repeated it sooner would add to a queue that is behind already, and gain nothing.
        """
        wait_s = max(MIN_WAIT_S, _ROUND_TRIPS * flow.peer.round_trip_s)
        if wait_s <= MAX_WAIT_S and len(self._due) < self._bound:
            self._count += 1  # Flows have no order among themselves.
            heappush(self._due, (now + wait_s + LAGS * min(lag_s, MAX_LAG_S), self._count, flow))

    @property
    def due_at(self) -> float | None:
        """When the next one is due; None where no proof is awaited."""
        while self._due:
            due_at, _, flow = self._due[0]
            if flow.state in _UNPROVEN:
                return due_at
            heappop(self._due)
        return None

    def take(self, now: float) -> list[ResponderFlow]:
        """Take out and give the flows that are due."""
        flows = []
        while (due_at := self.due_at) is not None and due_at <= now:
            flows.append(heappop(self._due)[2])
        return flows
