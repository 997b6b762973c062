# SPDX-License-Identifier: Apache-2.0
"""Whether an identity fits the handshake's packets of a pod's interface."""

from __future__ import annotations

from enforcer_daemon.dataplane.queue import MAX_COPIED_BYTES
from enforcer_daemon.errors import IdentityTooLargeError
from enforcer_daemon.handshake.frames import SYN_ACK_OVERHEAD
from enforcer_daemon.handshake.local import LocalToken
from enforcer_daemon.packet.tcp import overhead

_LARGEST_LABELS = 3
"""Labels that are named when an identity is too large."""


def require_room(token: LocalToken, mtu: int) -> tuple[int, int]:
    """Return the size of the larger handshake payload and the room that the interface has for it, in bytes."""
    identity = token.identity
    size = SYN_ACK_OVERHEAD + len(token.block)
    budget = mtu - max(overhead(ip.packed) for ip in identity.ips)
    if size > budget:
        labels = {**identity.namespace_labels, **identity.labels}
        largest = sorted(labels.items(), key=lambda label: -len(label[0]) - len(label[1]))[:_LARGEST_LABELS]
        named = ", ".join(f"{key} ({len(key) + len(value)} bytes)" for key, value in largest)
        place = f"its interface (MTU {mtu})" if mtu < MAX_COPIED_BYTES else f"the packet queue ({mtu} bytes)"
        raise IdentityTooLargeError(
            f"identity of {identity.pod} takes {size} bytes in a handshake packet, {place} has room "
            f"for {budget}; its largest labels: {named}"
        )
    return size, budget
