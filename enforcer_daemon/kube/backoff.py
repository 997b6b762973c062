# SPDX-License-Identifier: Apache-2.0
"""How long to wait before the API server is asked again. Pure."""

from __future__ import annotations

FIRST_S = 0.25
"""Before the first repetition, at most; each further one waits up to twice as long."""
_DOUBLINGS = 32
"""Beyond any sensible bound; a power of two must not overflow after a week of failures."""


def backoff_s(failures: int, roll: float, most_s: float) -> float:
    """Return the seconds to wait after so many failures in a row (from 1), for a random `roll` from 0 to 1.

    The nodes of a cluster lose their API server at one moment, so the upper half of each wait is random.
    """
    wait_s = min(most_s, FIRST_S * 2.0 ** min(failures - 1, _DOUBLINGS))
    return wait_s * (0.5 + roll / 2)
