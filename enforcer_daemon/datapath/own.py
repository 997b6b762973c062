# SPDX-License-Identifier: Apache-2.0
"""Packets of the enforcer's own, from where they are made to where they pass the pod's queue like any other."""

from __future__ import annotations

from collections.abc import Hashable

from enforcer_daemon.handshake.fairtable import Limit, LimitHits


class OwnPackets:
    """What was sent and has not passed yet; each is known again as often as it was sent, and no more."""

    __slots__ = ("_bound", "_hits", "_sent")

    def __init__(self, bound: int, hits: LimitHits) -> None:
        self._bound = bound
        self._hits = hits
        self._sent: dict[int, int] = {}
        """How often, by a hash that nobody outside this process can foresee: it is smaller than what was sent."""

    def add(self, packet: Hashable) -> None:
        """Remember what was sent, by what tells it from others; beyond the bound the oldest is forgotten."""
        key = hash(packet)
        count = self._sent.get(key, 0)
        if not count and len(self._sent) >= self._bound:
            self._hits[Limit.OWN_PACKETS] += 1
            del self._sent[next(iter(self._sent))]
        self._sent[key] = count + 1

    def take(self, packet: Hashable) -> bool:
        """Tell whether this packet was sent, and count it as passed."""
        if not self._sent:
            return False
        key = hash(packet)
        count = self._sent.pop(key, 0)
        if count > 1:
            self._sent[key] = count - 1
        return count > 0
