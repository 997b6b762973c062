# SPDX-License-Identifier: Apache-2.0
"""What binds a verified token to the address that its packet came from, or that was dialled; for TCP and UDP."""

from __future__ import annotations

from enforcer_daemon.datapath.context import EndpointContext
from enforcer_daemon.datapath.judging import Destination
from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.frames import SynAckFrame
from enforcer_daemon.handshake.peers import Peer
from enforcer_daemon.model import Protocol
from enforcer_daemon.reasons import Reason

End = tuple[bytes, int]
"""Packed address and port."""


def require_source(context: EndpointContext, protocol: int, source: End, destination: End, peer: Peer) -> bytes:
    """Give the address to judge: the source, where it is the token's pod or a known masquerade of it.

    The pod's own token is at home only where the node's own NAT brought it back: a hairpin through a Service.
    """
    address, is_own = source[0], context.judge.is_own(peer)
    if address in peer.addresses and not is_own:
        return address
    true_source, _ = context.node.trace(protocol, source, destination)
    if true_source != address and true_source in peer.addresses:
        return true_source
    if true_source == address and not is_own and address in context.node.networks.masquerade:
        same_family = [known for known in peer.addresses if len(known) == len(address)]
        return min(same_family, default=address)
    if is_own:
        raise PeerError(Reason.OWN_IDENTITY)
    raise PeerError(Reason.SOURCE_MISMATCH, f"the token is of {peer.identity.pod}")


def require_dialled(
    context: EndpointContext, answer: SynAckFrame, peer: Peer, dialled: End, protocol: Protocol = Protocol.TCP
) -> None:
    """The pod that answers must be at the address it states, and that must be the dialled one, unless virtual."""
    if answer.address not in peer.addresses:
        raise PeerError(Reason.RESPONDER_MISMATCH, f"{peer.identity.pod} answers for an address not its own")
    is_virtual = context.node.networks.destination(*dialled, protocol) is Destination.VIRTUAL
    if (answer.address, answer.port) != dialled and not is_virtual:
        raise PeerError(Reason.RESPONDER_MISMATCH, f"{peer.identity.pod} answers for another address")
