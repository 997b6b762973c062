# SPDX-License-Identifier: Apache-2.0
"""How the protocols that carry a handshake differ, as data. The engine has no other differences."""

from __future__ import annotations

import math
from typing import NamedTuple

from enforcer_daemon.handshake.frames import TYPE_ANSWER, TYPE_CHALLENGE, TYPE_OFFER, TYPE_SYN, TYPE_SYN_ACK
from enforcer_daemon.handshake.proofs import TCP_LABELS, UDP_LABELS, ProofLabels
from enforcer_daemon.model import Protocol
from enforcer_daemon.reasons import Reason


class CarrierFacts(NamedTuple):
    """What distinguishes one protocol's handshakes from another's."""

    protocol: Protocol
    offer_type: int
    answer_type: int
    challenge_type: int | None
    """Type of the answer to a denied offer on a released flow; None: the protocol has none."""
    labels: ProofLabels
    has_kernel_state: bool
    """Whether the responder's kernel takes the offer's packet at once, retransmits, and chooses between two handshakes
    of the same ports. If not, the enforcers do: they hold packets, retransmit, and a proof decides."""
    has_numbers: bool
    """Whether initial sequence numbers tell handshakes of the same ports apart, and are part of the proofs."""
    is_opened_by_both: bool
    """Whether a flow that both ends open at once is one flow."""
    unfinished_s: float | None
    """How long a handshake may stay unfinished, seconds; None: as long as the settings say."""
    remembered_s: float
    """How long a released flow answers for a lost proof, seconds. After that conntrack alone knows it."""
    drain_s: float
    """How long after its release a flow may stay in the queue, seconds: its first burst passes in order, one without
    end goes to the kernel all the same."""
    unheard: Reason
    """Why what waits in the initiator's queue is dropped in the end."""


TCP = CarrierFacts(
    Protocol.TCP, TYPE_SYN, TYPE_SYN_ACK, None, TCP_LABELS, has_kernel_state=True, has_numbers=True,
    is_opened_by_both=True, unfinished_s=None, remembered_s=math.inf, drain_s=0.0, unheard=Reason.PROOF_MISSING,
)  # fmt: skip
UDP = CarrierFacts(
    Protocol.UDP, TYPE_OFFER, TYPE_ANSWER, TYPE_CHALLENGE, UDP_LABELS, has_kernel_state=False, has_numbers=False,
    is_opened_by_both=False, unfinished_s=3.0, remembered_s=2.0, drain_s=0.05, unheard=Reason.HANDSHAKE_TIMEOUT,
)  # fmt: skip
