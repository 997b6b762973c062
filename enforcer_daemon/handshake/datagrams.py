# SPDX-License-Identifier: Apache-2.0
"""The envelope of handshake messages in the surplus area of datagrams (docs/protocol.md, UDP).

offer    as a SYN's frame: who sends, with a nonce     beside the flow's first datagrams, or alone
answer   as a SYN-ACK's frame, with proof_r            alone
proof    proof_i                                       beside a datagram that waited for it, or alone
again    "this flow is not known here, rehandshake"    alone
"""

from __future__ import annotations

from enforcer_daemon.errors import FrameError
from enforcer_daemon.handshake.frames import MAGIC, MARKER_ID, PROOF_MARKER_ID, TYPE_PROOF, frame_type
from enforcer_daemon.packet.udp import UDPDatagram, find_option, is_marked, with_marker, with_option, without_surplus
from enforcer_daemon.reasons import Reason

PIGGYBACKED_EXID = 0x5452
"""ExID of a message beside a datagram of the pod's."""
STANDALONE_EXID = 0x5453
"""ExID of a message in a datagram of the enforcer's own, which the other enforcer consumes."""


def find_message(datagram: UDPDatagram) -> tuple[bytes, bool] | None:
    """Give a handshake's message beside a datagram, and whether it came alone; None where there is none.

    Raise FrameError for one whose envelope does not hold: it must not pass for an ordinary datagram.
    """
    if not datagram.has_surplus:
        return None
    option = find_option(datagram)
    if option is None or option.exid not in (PIGGYBACKED_EXID, STANDALONE_EXID):
        if MAGIC in datagram.packet[datagram.tail :]:
            raise FrameError(Reason.MALFORMED_FRAME, "the option round it does not hold")
        return None
    is_standalone = option.exid == STANDALONE_EXID
    if is_standalone and datagram.payload:
        raise FrameError(Reason.MALFORMED_FRAME, "a message that goes alone has data beside it")
    return option.content, is_standalone


def beside(datagram: UDPDatagram, message: bytes) -> bytes:
    """Write a datagram of the pod's again with a message beside it, and the marker by which rules find it.

    Raise PacketError if only the beginning of the packet is at hand, or it will be cut.
    """
    marker = PROOF_MARKER_ID if frame_type(message) == TYPE_PROOF else MARKER_ID
    return with_option(datagram, PIGGYBACKED_EXID, message, marker)


def marked(datagram: UDPDatagram) -> bytes | None:
    """Write a datagram of the pod's again with the marker; None if it cannot be rewritten."""
    is_whole = datagram.tail <= len(datagram.packet) and datagram.end <= len(datagram.packet)
    return with_marker(datagram, MARKER_ID) if is_whole and not datagram.is_gso else None


def has_marker(packet: bytes) -> bool:
    """Tell whether a packet bears a marker."""
    return is_marked(packet, MARKER_ID) or is_marked(packet, PROOF_MARKER_ID)


def bare(datagram: UDPDatagram) -> bytes:
    """Write a datagram again without the message beside it and without its marker.

    What stood in the marker's place is not known: 0, which is all that an atomic datagram needs (RFC 6864).
    """
    if has_marker(datagram.packet):
        datagram = datagram._replace(packet=with_marker(datagram, 0))
    return without_surplus(datagram)
