# SPDX-License-Identifier: Apache-2.0
"""The token bucket, by which everything here is limited that has a rate.

Tokens come at a steady rate up to a burst; each use takes one. Source: J. Turner, "New directions in communications"
(IEEE Communications Magazine, October 1986).
"""

from __future__ import annotations


class RateLimiter:
    """One token bucket, full at first. Times are monotonic seconds; a time that goes back adds nothing."""

    __slots__ = ("_rate", "_since", "burst", "level")

    def __init__(self, rate: float, burst: float | None = None, now: float = 0.0) -> None:
        """Take tokens per second, and how many at once; by default one second's worth, and at least one."""
        self._rate = rate
        self.burst = max(1.0, rate) if burst is None else burst
        self.level = self.burst
        """Tokens that are left, as of the last call; below 0 after more was spent than there was."""
        self._since = now

    def refill(self, now: float) -> float:
        """Return how many tokens there are now."""
        self.level = min(self.burst, self.level + max(0.0, now - self._since) * self._rate)
        self._since = now
        return self.level

    def take(self, now: float, reserve: float = 0.0) -> bool:
        """Take one token and return True, unless fewer than `reserve` would be left."""
        if self.refill(now) - 1.0 < reserve:
            return False
        self.level -= 1.0
        return True

    def give_back(self) -> None:
        """Put back a token that was taken and not used."""
        self.level = min(self.burst, self.level + 1.0)

    def spend(self, now: float, tokens: float) -> None:
        """Take so many whether they are there or not: what cost more than there was has to be waited for."""
        self.refill(now)
        self.level -= tokens

    def wait_s(self, now: float) -> float:
        """Return how long it takes until nothing is owed, seconds."""
        return max(0.0, -self.refill(now) / self._rate)
