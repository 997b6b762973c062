# SPDX-License-Identifier: Apache-2.0
"""What the guard on the node tells of a pod's packets: denials for operators, and releases that the node has lost.

A pod's kernel lets a released UDP flow go on without a look. If the node's conntrack loses the flow meanwhile, as when
kube-proxy deletes the entries of a backend that is gone, the guard sees a datagram that opens a flow without a message.
The release is then taken back, so that the pod's next datagram goes to its enforcer, and the handshake is done again
with whatever is behind the address now. A TCP connection that the pod still has is vouched for (daemon/vouching.py).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from ipaddress import ip_address

from enforcer_daemon.daemon.endpoint import Endpoint
from enforcer_daemon.daemon.vouching import Vouching
from enforcer_daemon.datapath.context import FlowReport
from enforcer_daemon.dataplane.droplog import DropLog, Notice
from enforcer_daemon.dataplane.guard_fresh import STRAY
from enforcer_daemon.dataplane.nodeflows import SentTuple
from enforcer_daemon.errors import DataplaneError, NetnsError, PacketError
from enforcer_daemon.model import Direction, Protocol
from enforcer_daemon.packet.ip import decode_ip
from enforcer_daemon.packet.tcp import SYN
from enforcer_daemon.reasons import Reason
from enforcer_daemon.telemetry.logs import Logger

MAX_AT_ONCE = 64
"""Notices that are handled in one turn; the rest waits in the socket, or is lost there."""
PACE_S = 0.05
"""Between two turns, seconds. So at most 1,280 notices a second cost the enforcer time, from all pods together."""
_PORT_BYTES = 4
_FLAGS_OFFSET = 13
"""Of a TCP header."""
_SEGMENTS = frozenset({Reason.UNKNOWN_FLOW.value, Reason.EGRESS_DENIED.value})
"""Why segments of a connection are dropped that the node's conntrack lost."""


class Notices:
    """Reads the guard's log. For the event loop's thread alone."""

    def __init__(self, endpoints: Callable[[], Iterable[Endpoint]], vouching: Vouching, log: Logger) -> None:
        self._endpoints = endpoints
        self._vouching = vouching
        self._log = log

    async def run(self) -> None:
        """Handle what the guard tells, for good; return where the kernel does not log."""
        try:
            drops = DropLog()
        except DataplaneError as err:
            self._log.warning("drops of the guard are not reported", error=str(err))
            return
        loop, is_readable = asyncio.get_running_loop(), asyncio.Event()
        with drops:
            while True:
                loop.add_reader(drops.fileno(), is_readable.set)
                try:
                    await is_readable.wait()
                finally:
                    loop.remove_reader(drops.fileno())
                is_readable.clear()
                try:
                    await self.handle(drops.read(MAX_AT_ONCE))
                except DataplaneError as err:
                    self._log.error("log of the guard not read", error=str(err))
                await asyncio.sleep(PACE_S)

    async def handle(self, notices: Iterable[Notice]) -> None:
        """Report what was dropped; vouch for connections that the node lost, take back the releases of UDP flows."""
        by_address = {ip.packed: endpoint for endpoint in self._endpoints() for ip in endpoint.identity.ips}
        sent: defaultdict[Endpoint, dict[SentTuple, None]] = defaultdict(dict)
        asked: defaultdict[Endpoint, dict[SentTuple, Direction]] = defaultdict(dict)
        for notice in notices:
            flow = sent_tuple(notice.packet)
            if flow is None:
                continue
            ends = _ends(flow, by_address)
            for endpoint, direction in ends[:1]:
                _report(endpoint, direction, flow, notice.prefix)
                if direction is Direction.EGRESS and flow.protocol == Protocol.UDP:
                    sent[endpoint][flow] = None
            if notice.prefix in _SEGMENTS and is_in_connection(notice.packet):
                for endpoint, direction in ends:  # Either may be the one that is fresh.
                    asked[endpoint][flow if direction is Direction.EGRESS else _reversed(flow)] = direction
        for endpoint, segments in asked.items():
            await self._vouching.look(endpoint, segments)
        for endpoint, flows in sent.items():
            await self._take_back(endpoint, flows)

    async def _take_back(self, endpoint: Endpoint, flows: Iterable[SentTuple]) -> None:
        if not endpoint.is_open:
            return
        pod = str(endpoint.identity.pod)
        try:
            taken = await endpoint.take_back(flows)
        except (DataplaneError, NetnsError) as err:
            self._log.error("releases of lost flows not taken back", pod=pod, error=str(err))
            return
        if taken:
            self._log.info("releases of flows taken back that the node has lost", pod=pod, flows=len(taken))


def is_in_connection(packet: bytes) -> bool:
    """Return whether a packet, of which only the beginning is at hand, is a TCP segment that opens nothing."""
    try:
        header = decode_ip(packet)
    except PacketError:
        return False
    flags = packet[header.offset + _FLAGS_OFFSET : header.offset + _FLAGS_OFFSET + 1]
    return header.protocol == Protocol.TCP and len(flags) == 1 and not flags[0] & SYN


def _ends(flow: SentTuple, by_address: Mapping[bytes, Endpoint]) -> list[tuple[Endpoint, Direction]]:
    """Return the pods of this node that have a flow, its sender first."""
    ways = (flow.source, Direction.EGRESS), (flow.destination, Direction.INGRESS)
    return [(endpoint, way) for ip, way in ways if (endpoint := by_address.get(ip.packed)) is not None]


def _reversed(flow: SentTuple) -> SentTuple:
    return SentTuple(flow.protocol, *flow[3:], *flow[1:3])


def sent_tuple(packet: bytes) -> SentTuple | None:
    """Return the flow of a packet, of which only the beginning is at hand; None if it has no ports that are."""
    try:
        header = decode_ip(packet)
    except PacketError:
        return None
    ports = packet[header.offset : header.offset + _PORT_BYTES]
    if header.protocol not in (Protocol.TCP, Protocol.UDP, Protocol.SCTP) or len(ports) < _PORT_BYTES:
        return None
    source_port, destination_port = int.from_bytes(ports[:2], "big"), int.from_bytes(ports[2:], "big")
    return SentTuple(header.protocol, ip_address(header.src), source_port, ip_address(header.dst), destination_port)


def _report(endpoint: Endpoint, direction: Direction, flow: SentTuple, prefix: str) -> None:
    if prefix == STRAY:
        return
    remote = flow.destination if direction is Direction.EGRESS else flow.source
    side = endpoint.policy.direction(direction)
    rules = (
        side.evaluate(None, remote, flow.destination_port, Protocol(flow.protocol)).rules if side.is_isolated else ()
    )
    reason = Reason(prefix)
    detail = "dropped by the guard on the node"
    endpoint.flow_log.take(
        [FlowReport(False, reason, direction, flow.protocol, remote.packed, flow.destination_port, None, rules, detail)]
    )
