# SPDX-License-Identifier: Apache-2.0
"""The daemon's own netlink against pyroute2, for the same requests in one namespace: why each of the two is used where.

The namespace has 250 pairs of interfaces, a conntrack table of 100,000 entries of which one in a hundred is released,
and connections over its loopback interface. Each figure is the median of several runs. ADR 26 draws the conclusions.
"""

from __future__ import annotations

import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import count

from pyroute2 import IPRoute, NFCTSocket
from pyroute2.netlink import NETLINK_SOCK_DIAG, NLM_F_ACK, NLM_F_REQUEST
from pyroute2.netlink.diag import SOCK_DESTROY, SOCK_DIAG_BY_FAMILY, inet_diag_msg, inet_diag_req
from pyroute2.netlink.marshal import Marshal
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple
from pyroute2.netlink.nlsocket import NetlinkSocket

from enforcer_daemon.dataplane import netlink
from enforcer_daemon.dataplane.addresses import node_addresses
from enforcer_daemon.dataplane.conntrack import Conntrack
from enforcer_daemon.dataplane.established import list_released
from enforcer_daemon.dataplane.netns import new_netns, open_in
from enforcer_daemon.dataplane.nodeflows import SentTuple, decode_entry, encode_filter, remove_flows
from enforcer_daemon.dataplane.rtnetlink import RouteReader, read_routes
from enforcer_daemon.marks import NODE, RELEASED
from enforcer_daemon.model import IPAddress, Protocol

PAIRS = 250
ENTRIES = 100_000
PER_ADDRESS = 1_000
RELEASED_ONE_IN = 100
CONNECTIONS = 200
_SERVER = ip_address("10.96.0.1")
_FIRST = int(ip_address("10.0.0.0"))
_LOOPBACK = ip_address("127.0.0.1")
_PORT = 8_080
_CREATE = 0x400  # linux/netlink.h: NLM_F_CREATE
_CTA_TIMEOUT, _CTA_PROTOINFO = 7, 4
_STATE_ESTABLISHED = 3  # linux/netfilter/nf_conntrack_tcp.h
_TRACK = "table inet track {\n chain c {\n  type filter hook input priority 0\n  ct state new accept\n }\n}\n"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result, in milliseconds."""

    what: str
    own_ms: float | None
    pyroute2_ms: float

    def __str__(self) -> str:
        if self.own_ms is None:
            return f"| {self.what} | - | {self.pyroute2_ms:.3f} | - |"
        return f"| {self.what} | {self.own_ms:.3f} | {self.pyroute2_ms:.3f} | {self.pyroute2_ms / self.own_ms:.0f} |"


def _median_ms(work: Callable[[], object], runs: int) -> float:
    work()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def _flow(number: int) -> SentTuple:
    source = ip_address(_FIRST + number // PER_ADDRESS)
    return SentTuple(Protocol.TCP, source, 1_024 + 2 * (number % PER_ADDRESS), _SERVER, 80)


def _as_filter(flow: SentTuple) -> NFCTAttrTuple:
    return NFCTAttrTuple(
        saddr=str(flow.source),
        daddr=str(flow.destination),
        proto=int(flow.protocol),
        sport=flow.source_port,
        dport=flow.destination_port,
    )


def _fill() -> None:
    """Make the links and the entries."""
    with IPRoute() as route:
        route.link("set", index=1, state="up")
        for number in range(PAIRS):
            route.link("add", ifname=f"veth{number}", kind="veth", peer=f"pod{number}")
    subprocess.run(("nft", "-f", "-"), input=_TRACK, text=True, check=True)
    state = netlink.encode_nested(
        _CTA_PROTOINFO, netlink.encode_nested(1, netlink.encode_attribute(1, bytes((_STATE_ESTABLISHED,))))
    )
    with netlink.open_netlink(netlink.NETLINK_NETFILTER) as sock:
        for number in range(ENTRIES):
            flow = _flow(number)
            ends = (flow.source, flow.source_port), (flow.destination, flow.destination_port)
            body = netlink.netfilter_head(socket.AF_INET)
            body += netlink.encode_tuple(netlink.CTA_TUPLE_ORIG, flow.protocol, *ends)
            body += netlink.encode_tuple(netlink.CTA_TUPLE_REPLY, flow.protocol, *ends[::-1])
            body += netlink.encode_attribute(_CTA_TIMEOUT, struct.pack("!I", 3_600)) + state
            body += netlink.encode_mark(0 if number % RELEASED_ONE_IN else RELEASED, RELEASED)
            flags = netlink.NLM_F_REQUEST | netlink.NLM_F_ACK | _CREATE
            sock.send(netlink.HEADER.pack(netlink.HEADER.size + len(body), netlink.CT_NEW, flags, 0, 0) + body)
            (answer,) = netlink.decode_messages(sock.recv(4_096))
            assert netlink.error_code(answer.body) == 0


def _route_rows() -> Iterator[Row]:
    def interfaces() -> object:
        return [netlink.decode_attributes(body[16:]) for body in netlink.dump(0, 18, bytes(16))]

    yield Row(
        f"{2 * PAIRS} links",
        _median_ms(interfaces, 5),
        _median_ms(lambda: read_routes(RouteReader.interfaces), 5),
    )
    yield Row(f"the node's addresses, among {2 * PAIRS} links", None, _median_ms(node_addresses, 9))
    yield Row("one link by its index", None, _median_ms(lambda: read_routes(lambda reader: reader.link(2)), 99))


def _conntrack_rows() -> Iterator[Row]:
    flow = _flow(0)
    address, own_numbers, their_numbers = flow.source, count(2_000), count(3_000)
    filtered = encode_filter(address, netlink.CTA_TUPLE_ORIG)
    with Conntrack() as own, NFCTSocket() as theirs:
        yield Row(
            "look-up at a SYN",
            _median_ms(
                lambda: own.original_source(
                    flow.protocol, flow.source, flow.source_port, flow.destination, flow.destination_port
                ),
                999,
            ),
            _median_ms(lambda: theirs.entry("get", tuple_orig=_as_filter(flow)), 199),
        )
        yield Row(
            f"{ENTRIES // RELEASED_ONE_IN:,} entries by their mark",
            _median_ms(list_released, 5),
            _median_ms(lambda: list(theirs.dump(mark=RELEASED, mark_mask=RELEASED | NODE)), 5),
        )
        yield Row(
            f"{PER_ADDRESS:,} entries by their address",
            _median_ms(lambda: [decode_entry(body, address) for body in _entries(filtered, address)], 5),
            _median_ms(lambda: list(theirs.dump(tuple_orig=NFCTAttrTuple(saddr=str(address)))), 5),
        )
        yield Row(
            f"all {ENTRIES:,} entries, for one address of IPv6",
            _median_ms(lambda: _entries(netlink.netfilter_head(socket.AF_INET), address), 3),
            _median_ms(lambda: sum(1 for _ in theirs.dump()), 1),
        )
        yield Row(
            "removal of an entry",
            _median_ms(lambda: remove_flows([_flow(next(own_numbers))]), 499),
            _median_ms(lambda: theirs.entry("del", tuple_orig=_as_filter(_flow(next(their_numbers)))), 499),
        )


def _entries(request: bytes, address: IPAddress) -> list[bytes]:
    return netlink.dump(netlink.NETLINK_NETFILTER, netlink.CT_GET, request, address.packed)


def _destroy_by_own(own: socket.socket, port: int) -> None:
    head = socket.AF_INET, Protocol.TCP, 0, 0, netlink.DIAG_ANY_STATE
    ends = port.to_bytes(2, "big"), _PORT.to_bytes(2, "big"), _LOOPBACK.packed, _LOOPBACK.packed
    wanted = netlink.DIAG_SOCKET.pack(*ends, 0, netlink.DIAG_NO_COOKIE, netlink.DIAG_NO_COOKIE)
    found = netlink.ask(own, netlink.SOCK_DIAG_BY_FAMILY, netlink.DIAG_REQUEST.pack(*head, wanted), 1)
    assert found is not None
    *_, identifier = netlink.DIAG_ANSWER.unpack_from(found)
    netlink.acknowledged(own, netlink.SOCK_DESTROY, netlink.DIAG_REQUEST.pack(*head, identifier))


class _DiagMarshal(Marshal):  # type: ignore[misc]  # pyroute2 has no types.
    """By the type of a message: pyroute2's own goes by the family, of which AF_INET is also the number of errors."""

    msg_map = {SOCK_DIAG_BY_FAMILY: inet_diag_msg}  # noqa: RUF012 - as pyroute2 declares it


def _destroy(theirs: NetlinkSocket, port: int) -> None:
    def request(cookie: int) -> inet_diag_req:
        wanted = inet_diag_req()
        wanted.update(sdiag_family=socket.AF_INET, sdiag_protocol=Protocol.TCP, idiag_states=0xFFFF_FFFF)
        wanted.update(idiag_sport=port, idiag_dport=_PORT, idiag_cookie=cookie)
        wanted.update(idiag_src=(int(_LOOPBACK), 0, 0, 0), idiag_dst=(int(_LOOPBACK), 0, 0, 0))
        return wanted

    (found,) = theirs.nlm_request(request((1 << 64) - 1), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST)
    for _ in theirs.nlm_request(request(found["idiag_cookie"]), SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK):
        pass


def _socket_rows() -> Iterator[Row]:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((str(_LOOPBACK), _PORT), backlog=CONNECTIONS))
        clients = []
        for _ in range(CONNECTIONS):
            clients.append(stack.enter_context(socket.create_connection((str(_LOOPBACK), _PORT))))
            stack.enter_context(listener.accept()[0])
        ports = iter([client.getsockname()[1] for client in clients])
        theirs = stack.enter_context(NetlinkSocket(NETLINK_SOCK_DIAG))
        theirs.set_marshal(_DiagMarshal())

        own = stack.enter_context(netlink.open_netlink(netlink.NETLINK_SOCK_DIAG))
        rounds = CONNECTIONS // 2 - 2
        yield Row(
            "end of a socket",
            _median_ms(lambda: _destroy_by_own(own, next(ports)), rounds),
            _median_ms(lambda: _destroy(theirs, next(ports)), rounds),
        )


def _import_cost() -> tuple[float, float]:
    """Return what importing pyroute2 adds to the daemon: milliseconds and megabytes."""
    script = (
        "import time, aiohttp, enforcer_daemon.telemetry.metrics\n"
        "def used(): return int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6\n"
        "before, started = used(), time.perf_counter()\n"
        "import pyroute2\n"
        "print((time.perf_counter() - started) * 1e3, used() - before)"
    )
    command = (sys.executable, "-c", script)
    outputs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(9)]
    costs = [tuple(map(float, output.split())) for output in outputs]
    return statistics.median(cost[0] for cost in costs), statistics.median(cost[1] for cost in costs)


def measure() -> list[Row]:
    """Return the comparison; needs root."""
    netns_fd = new_netns()
    try:
        open_in(netns_fd, _fill)
        return open_in(netns_fd, lambda: [*_route_rows(), *_conntrack_rows(), *_socket_rows()])
    finally:
        os.close(netns_fd)


def main() -> None:
    """Print the comparison as a table of milliseconds."""
    rows = measure()
    milliseconds, megabytes = _import_cost()
    print("| request | own, ms | pyroute2, ms | ratio |")
    print("|---|---|---|---|")
    for row in rows:
        print(row)
    print(f"\nimport pyroute2: {milliseconds:.0f} ms, {megabytes:.0f} MB")


if __name__ == "__main__":
    main()
