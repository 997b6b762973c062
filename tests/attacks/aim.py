# SPDX-License-Identifier: Apache-2.0
"""One attempt of an attacker, before it has a form. Pure."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.attacks import packets


@dataclass(frozen=True, slots=True)
class Aim:
    """One attempt: from where to where, and what the attacker knows."""

    version: int
    addresses: tuple[bytes, bytes]
    ports: tuple[int, int]
    marker: bytes
    """8 bytes."""
    rng: random.Random
    own_block: bytes
    """Identity block of the attacking pod itself: no secret to it."""
    copied_block: bytes
    """Identity block of another pod."""

    @property
    def numbers(self) -> tuple[int, int]:
        seq, ack = struct.unpack("!II", self.marker)
        return seq, ack

    @property
    def data(self) -> bytes:
        return self.marker + self.rng.randbytes(self.rng.choice((0, 1, 7, 24, 200)))

    def wrap(self, protocol: int, payload: bytes, identification: int = 0) -> bytes:
        """Put an IP header before it, of an ordinary kind."""
        if self.version == 4:
            return packets.ipv4(self.addresses, protocol, payload, identification=identification)
        return packets.ipv6(self.addresses, protocol, payload)

    def segment(self, flags: int, payload: bytes = b"", options: bytes = b"") -> bytes:
        return packets.tcp(self.addresses, self.ports, self.numbers, flags, payload, options)

    def datagram(self, payload: bytes, surplus: bytes = b"") -> bytes:
        return packets.udp(self.addresses, self.ports, payload, surplus)


Form = Callable[[Aim], Sequence[bytes]]
"""From an aim to the packets of one attempt."""
