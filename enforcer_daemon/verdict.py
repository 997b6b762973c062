# SPDX-License-Identifier: Apache-2.0
"""What the datapath wants done with a packet: values that the dataplane applies."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from enforcer_daemon.enums import with_plain_members


@with_plain_members
class Action(IntEnum):
    """What becomes of the queued packet itself."""

    ACCEPT = 0
    """It goes on, as `payload` if there is one; the flow's next packet is queued again. A `mark` only says that the
    flow has come about."""
    DROP = 1
    RELEASE = 2
    """Repeat the hook with `mark`: the packet goes on and the whole flow with it, in the kernel."""
    FORGET = 3
    """Repeat the hook with the FORGET mark: it goes on, and an earlier release of its flow is taken back."""
    HOLD = 4
    """It stays in the kernel's queue under `hold_id` until an effect settles it."""
    CONSUME = 5
    """Repeat the hook: the packet ends there. Its flow is released with `mark`; 0 takes an earlier release back."""
    TAKE = 6
    """It ends here, since it was meant for the enforcer: nothing was refused."""


class Verdict(NamedTuple):
    """The answer to one packet."""

    action: Action
    payload: bytes | None = None
    mark: int = 0
    hold_id: int = 0
    when_drained: bool = False
    """Whether `mark` is set only if no more packets wait in the queue: some may be of the same flow, and what comes
    after the mark would overtake them."""


class Settle(NamedTuple):
    """Give a held packet its verdict (never HOLD)."""

    hold_id: int
    verdict: Verdict


class Inject(NamedTuple):
    """Send a whole IP packet from the pod's network namespace by raw socket."""

    packet: bytes
    is_untracked: bool = False
    """Whether it is kept out of the pod's conntrack."""


Effect = Settle | Inject
ACCEPT = Verdict(Action.ACCEPT)
DROP = Verdict(Action.DROP)
TAKEN = Verdict(Action.TAKE)
