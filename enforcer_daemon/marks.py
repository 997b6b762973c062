# SPDX-License-Identifier: Apache-2.0
"""The bits of packet and conntrack marks that are ours, inside a pod's network namespace.

The low twelve bits belong to others (Istio marks with 0x539 and 0x111/0xfff); every save, restore and match is masked.
A packet's bits are cleared as it enters or leaves (raw table), so that no process in the pod can set them; a
connection's are written only by our rules.

    31 RELEASED  the flow was evaluated and goes on in the kernel
    30 NODE      the flow was opened by the pod's own node and accepted by a kernel rule
    29 FORGET    on a repeated packet only: accept, and take all our bits from the connection; with NODE: see CONSUME
    28-12        index of what the flow was evaluated by; 0: nothing to evaluate again
"""

OWN_MASK = 0xFFFF_F000
RELEASED = 0x8000_0000
NODE = 0x4000_0000
FORGET = 0x2000_0000
CONSUME = FORGET | NODE
"""On a repeated packet: save its other bits to the connection, and drop it."""
REPLY = FORGET
"""On a datagram or an arriving SYN that comes to the queue: it goes against the direction in which its flow was
opened."""
UNTRACKED = RELEASED | NODE | FORGET
"""On a packet of the enforcer's own as it leaves: conntrack takes no notice of it. Whoever else sets it gains nothing:
what is untracked has no released connection, so it is queued and evaluated."""
CHECKSUM_PARTIAL, GSO = 1, 2
"""Beside our bits of a packet's mark, where it is evaluated: its checksum is not made yet (offload); the kernel is
going to cut it into several (GSO), so that it passes as it is or not at all. Numbered as
linux/netfilter/nfnetlink_queue.h does (NFQA_SKB_CSUMNOTREADY, NFQA_SKB_GSO)."""
INDEX_MASK = 0x1FFF_F000
INDEX_SHIFT = 12
MAX_INDEX = INDEX_MASK >> INDEX_SHIFT


def released_mark(index: int) -> int:
    """Mark of a released flow that was evaluated by entry `index` (0 to MAX_INDEX) of the endpoint's flow index."""
    return RELEASED | (index << INDEX_SHIFT)
