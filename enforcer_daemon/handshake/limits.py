# SPDX-License-Identifier: Apache-2.0
"""The limits of the handshake: what a pod and a node remember, how long, and how much work a peer can cause.

Constants with one exception: the clocks' leeway is a setting. Code and tests construct other values; no operator can
choose them better, since they follow from the protocol and from the cost of a packet. What happens at each limit, and
the test that shows it: docs/threat-model.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HandshakeLimits:
    """Limits of one endpoint unless a field says that they are the node's."""

    clock_leeway_s: float = 30.0
    """How far the clocks of two nodes may differ, seconds; credentials.clockLeewaySeconds."""
    timeout_s: float = 75.0
    """How long a handshake may stay half-open, seconds. A kernel retries its SYN-ACK for 63 s (tcp_synack_retries 5:
    1 + 2 + 4 + 8 + 16 + 32, tcp(7)); the answer to the last one must still find it."""
    max_half_open_flows: int = 16_384
    """Half-open flows of each direction. Beyond it the oldest flow of the peer that has most is evicted. Four times
    connections that an enforcer makes in a second."""
    max_half_open_flows_per_source: int = 2_048
    """Half-open flows with one peer's address; beyond it the oldest of them is evicted. At 2,048 connections a second
    each has a second to complete."""
    max_held_packets: int = 64
    """Packets of one flow that wait for its proof. A Linux client's initial window is 10 segments (RFC 6928)."""
    max_held_packets_per_source: int = 256
    """Packets of one peer that wait for proofs; beyond it the oldest is dropped. A sixteenth of the kernel's queue."""
    max_held_packets_per_pod: int = 1_024
    """Packets of the endpoint that wait for proofs; beyond it the oldest one of the peer with most is dropped. A
    quarter of the kernel's queue, which holds them (dataplane/queue.py)."""
    max_settled_flows: int = 4_096
    """Established flows of each direction that are remembered for a while, to answer for a lost proof. One second's
    worth of connections."""
    max_cached_peers: int = 16_384
    """Verified tokens that the node remembers: the pods of 148 full nodes (110 each, the kubelet's default)."""
    max_cached_credentials: int = 16_384
    """Verified credentials of other nodes that the node remembers. Kubernetes supports 5,000 nodes, with two
    credentials each while one is renewed."""
    max_refused_identities: int = 4_096
    """Identity blocks that the node remembers as refused, and as many credentials."""
    max_verification_sources: int = 4_096
    """Sources of each rank whose token bucket for signature checks the node remembers."""
    max_nonces: int = 65_536
    """Nonces that the node remembers against replays: 16 s of the connections that an enforcer makes."""
    max_rehandshakes_per_s: float = 64.0
    """UDP flows per second for which the endpoint requests a re-handshake, and as many that it begins on request
    (burst: one second's worth). A flow needs one after a loss of state only."""
    max_own_packets: int = 4_096
    """The enforcer's own packets on their way through the endpoint's queue; the oldest of more is not recognized again
    and does not leave. As many as a full queue has answers."""
    max_reports: int = 1_024
    """Decisions that wait to be logged; those beyond it are counted only. Twice what comes
    between two collections (a tenth of a second) at 4,000 connections a second."""
    max_verifications_per_s: float = 200.0
    """Signature checks per second that one source address can cause (burst: one second's worth). A pod costs one
    at its first contact and one for each renewed token."""
    max_total_verifications_per_s: float = 1_000.0
    """Signature checks of the node per second (burst: one second's worth), about a third of a core
    (docs/performance.md). Half is reserved for peers of known nodes or from known addresses, half of that for peers of
    both."""
