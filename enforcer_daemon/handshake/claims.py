# SPDX-License-Identifier: Apache-2.0
"""What tokens say of their pods' places, and what the cluster says of that. Values alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from enforcer_daemon.model import PodRef


class Answer(Enum):
    """What the cluster says of a claim."""

    HERE = "here"
    ELSEWHERE = "elsewhere"
    """The very pod is on another node, or on none yet."""
    ABSENT = "absent"
    """There is no such pod, or another one of that name."""
    UNKNOWN = "unknown"
    """The cluster could not be asked."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a token says of its pod's place."""

    node: str
    pod: PodRef
    uid: str
    """Empty where the token states none."""


@dataclass(frozen=True, slots=True)
class Denial:
    """Why a node, or one claim, is believed no longer, and until when (monotonic seconds)."""

    why: str
    until: float
