# SPDX-License-Identifier: Apache-2.0
"""What names a flow, as seen from the pod."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from enforcer_daemon.enums import with_plain_members
from enforcer_daemon.model import Direction


@with_plain_members
class Role(IntEnum):
    """The pod's part in a handshake. (IntEnum: it is part of each key, and integers hash fastest.)"""

    INITIATOR = 1
    """The pod opens the flow."""
    RESPONDER = 2
    """The flow is opened to the pod."""


Ends = tuple[bytes, bytes, int, int]
"""Packed remote and own address, remote and own port."""


class FlowKey(NamedTuple):
    """A flow by its ends, its protocol, and the pod's role in it."""

    remote: bytes
    """Packed address."""
    own: bytes
    remote_port: int
    own_port: int
    protocol: int
    role: Role

    @property
    def ends(self) -> Ends:
        """Return addresses and ports, which both roles have in common."""
        return self.remote, self.own, self.remote_port, self.own_port

    @property
    def direction(self) -> Direction:
        """Return EGRESS if the pod opens the flow."""
        return Direction.EGRESS if self.role is Role.INITIATOR else Direction.INGRESS

    @property
    def port(self) -> int:
        """Return the responder's port."""
        return self.remote_port if self.role is Role.INITIATOR else self.own_port

    def in_role(self, role: Role) -> FlowKey:
        """Return the key of the flow with the same ends, in another role."""
        return FlowKey(self.remote, self.own, self.remote_port, self.own_port, self.protocol, role)
