# SPDX-License-Identifier: Apache-2.0
"""Sends that the kernel cuts into datagrams for the queue (UDP_SEGMENT), and what it drops of them.

All datagrams of such a send share one entry of conntrack, which is not in its table yet. Where another datagram of the
flow is let go before, that entry never gets there, and kernels since 6.12 drop whatever shares it when it leaves the
queue: all but the first, which does not count as shared, and the last, which does no longer (net/netfilter/
nfnetlink_queue.c, nf_ct_drop_unconfirmed). The queue does not tell which datagrams are cut. They are alike in length,
but for the last, which may be shorter; what looks like that is dropped by us and sent anew, by raw socket.
"""

from __future__ import annotations

from collections.abc import Sequence

from enforcer_daemon.packet.udp import UDPDatagram

_LEAST = 4
"""One datagram before a send, and the three of one that has a middle."""


def may_be_cut(datagram: UDPDatagram, before: int, last_bytes: int) -> bool:
    """Tell whether a datagram can be in the middle of a send, after so many others, of which the last was so long.

    Two of a length are what a resolver sends.
    """
    return before > 1 and datagram.tail == last_bytes


def first_cut(datagrams: Sequence[UDPDatagram], mtu: int) -> int:
    """Give the place from which on waiting datagrams must be sent anew, to keep their order; their number for none.

    Only what is at hand and fits a packet of the interface can be sent anew. What has a message beside it has come here
    by itself.
    """
    if len(datagrams) >= _LEAST:
        for n in range(2, len(datagrams) - 1):
            before, this, after = (datagram.end for datagram in datagrams[n - 1 : n + 2])
            if (
                before == this >= after
                and not datagrams[n].has_surplus
                and all(d.end <= min(mtu, len(d.packet)) for d in datagrams[n:])
            ):
                return n
    return len(datagrams)
