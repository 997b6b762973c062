# SPDX-License-Identifier: Apache-2.0
"""The kernel and we find the same protocol in a packet of IPv6, whatever headers it begins with."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator

import pytest

from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.dataplane.tools import run_in
from enforcer_daemon.errors import PacketError
from enforcer_daemon.packet.ip import decode_ip
from tests.netns.lab import NODE_OUTSIDE, REMOTE, SYN, Lab, open_lab, tcp_packet, wait_until

pytestmark = [pytest.mark.kernel, pytest.mark.stock_kernel]

_AUTHENTICATION = 51
CHAINS: list[tuple[int, ...]] = [
    *((kind,) for kind in range(256)),
    *((first, second) for first in (0, 43, 44, 60) for second in (0, 43, 44, 50, 59, 60, 135, 139, 140, 253, 254)),
]
"""Headers before the TCP header."""
_MARKS = range(2, 250)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with open_lab() as lab:
        yield lab


def _packet(chain: tuple[int, ...], mark: int) -> bytes:
    """Build a packet whose hop limit tells it from others; each header is of eight bytes, and says what follows."""
    whole = tcp_packet((REMOTE[6], 4_000), (NODE_OUTSIDE[6], 5_000), SYN)
    headers = b"".join(bytes((following,)) + bytes(7) for following in (*chain[1:], 6))
    length = struct.pack("!H", len(headers) + len(whole) - 40)
    return whole[:4] + length + bytes((chain[0], mark)) + whole[8:40] + headers + whole[40:]


def test_the_kernel_walks_past_the_same_headers(lab: Lab) -> None:
    match = f"ip6 saddr {REMOTE[6]} ip6 daddr {NODE_OUTSIDE[6]} meta l4proto != ipv6-icmp"
    lines = (
        "add table inet walk",
        "add set inet walk seen { typeof ip6 hoplimit . meta l4proto; size 65535; flags dynamic; }",
        "add chain inet walk first { type filter hook prerouting priority -450; }",  # before fragments are put together
        f"add rule inet walk first {match} update @seen {{ ip6 hoplimit . meta l4proto }}",
    )
    found: dict[tuple[int, ...], int] = {}
    with open_in(lab.remote, lambda: socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)) as sender:
        for start in range(0, len(CHAINS), len(_MARKS)):
            run_in(lab.node, ("nft", "-f", "-"), "\n".join(lines))
            batch = dict(zip(_MARKS, CHAINS[start : start + len(_MARKS)], strict=False))
            for mark, chain in batch.items():
                sender.sendto(_packet(chain, mark), (NODE_OUTSIDE[6], 0))
            seen: dict[int, int] = {}

            def is_whole(seen: dict[int, int] = seen, batch: dict[int, tuple[int, ...]] = batch) -> bool:
                listing = run_in(lab.node, ("nft", "-n", "list", "set", "inet", "walk", "seen"))
                seen.update((int(mark), int(kind)) for mark, kind in re.findall(r"(\d+) \. (\d+)", listing))
                return len(seen) >= len([chain for chain in batch.values() if chain != (58,)])

            wait_until(is_whole)
            run_in(lab.node, ("nft", "delete", "table", "inet", "walk"))
            found |= {batch[mark]: kind for mark, kind in seen.items()}
    differing = {}
    for chain, kind in found.items():
        try:
            ours = decode_ip(_packet(chain, 64)).protocol
        except PacketError:
            continue  # It is dropped.
        if ours != kind:
            differing[chain] = (ours, kind)
    # nft stops there; see enforcer_daemon/packet/ip.py.
    assert set(differing) == {chain for chain in found if _AUTHENTICATION in chain}
    assert len(found) >= len(CHAINS) - 2
