# SPDX-License-Identifier: Apache-2.0
"""What stands between two pods, or beside them: small paths, offloads, sidecars, tables that were emptied."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import secrets
import socket
import string
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from scapy.layers.inet import TCP

from enforcer_daemon.dataplane.queue import MAX_COPIED_BYTES
from enforcer_daemon.model import PodRef
from enforcer_daemon.packet.tcp import SYN, TCP_MIN_HEADER, Segment, announced_mss
from tests.e2e.odd_world import (
    RESET_ON_CLOSE,
    VERSIONS,
    carries_words,
    denied,
    odd_world,
    sysctls,
    wait_until,
)
from tests.e2e.operation_world import (
    HTTP,
    NODES,
    connection,
    denials,
    endpoint,
    outcome,
    read_all,
    segments,
    transfer,
)
from tests.e2e.raw_pod import RawPod
from tests.e2e.sidecar import Sidecar
from tests.support.fragments import fragment_segment
from trireme_lab import Lab, LabError, Outcome, PodSpec, Tools
from trireme_lab.capture import Capture
from trireme_lab.chain import load_conflist
from trireme_lab.netns import open_socket, run
from trireme_lab.network import POD_BRIDGE, UPLINK

pytestmark = pytest.mark.kernel

SMALL_PATH_BYTES = 600
"""Less than a SYN with its frame."""
JUMBO_BYTES = 9_000
_SIOCETHTOOL = 0x8946  # linux/sockios.h
OFFLOADS = {
    "rx checksum": (0x14, 0x15),
    "tx checksum": (0x16, 0x17),
    "tso": (0x1E, 0x1F),
    "gso": (0x23, 0x24),
    "gro": (0x2B, 0x2C),
}
"""Commands that read and set each (linux/ethtool.h)."""


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    with odd_world(plugin) as lab:
        yield lab


# Sidecars.


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("where", [("x/client",), ("x/server",), ("x/client", "x/server")], ids="+".join)
def test_a_sidecar_that_redirects(lab: Lab, where: tuple[str, ...], version: int) -> None:
    """The sidecars speak with one another; the enforcers evaluate the ports that were dialed."""
    with ExitStack() as stack:
        for pod in where:
            stack.enter_context(Sidecar(lab, pod, version))
        for _ in range(5):
            with connection(lab, "x/client", "x/server", version) as ends:
                assert carries_words(*ends)
        with connection(lab, "x/client", "x/server", version) as (client, server):
            transfer(client, server, 2)
            transfer(server, client, 2)
            client.shutdown(socket.SHUT_WR)
            assert server.recv(1) == b""
            server.sendall(b"goodbye")
            assert read_all(client, 7) == b"goodbye"
        assert outcome(lab, "host:outside", "x/server", HTTP.number, version, timeout_s=0.3).is_denied
    assert denials(lab, "x/server")[-1] == "unidentified-peer"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_sidecar_that_is_not_there_yet_refuses(lab: Lab, version: int) -> None:
    with Sidecar(lab, "x/server", version, listens=False):
        assert outcome(lab, "x/client", "x/server", HTTP.number, version) is Outcome.REFUSED


def ip(netns: str, arguments: str) -> None:
    run(["ip", "-n", netns, *arguments.split()])


# Fragments.


@contextmanager
def small_path(lab: Lab) -> Iterator[None]:
    """Let the network cut IPv4 packets to the server into pieces, and the client's kernel allow it.

    A kernel forbids it for its SYN-ACK, which by itself is small, whatever its settings.
    """
    fabric = f"{lab.name}-fabric"
    (network,) = (network for network in NODES[1].pod_networks if network.version == 4)
    route = run(["ip", "-n", fabric, "route", "show", str(network)]).strip()
    with sysctls(lab, "x/client", {"net/ipv4/ip_no_pmtu_disc": "1"}):
        ip(fabric, f"route replace {route} mtu lock {SMALL_PATH_BYTES}")
        try:
            yield
        finally:
            ip(fabric, f"route replace {route}")


def test_a_path_that_cuts_handshake_and_data_into_fragments(lab: Lab) -> None:
    with (
        small_path(lab),
        lab.capture("node:b") as capture,
        connection(lab, "x/client", "x/server") as (client, server),
    ):
        assert carries_words(client, server)
        transfer(client, server, 1)
        transfer(server, client, 1)
        arrived = capture.close()
    source = lab.place("x/client").address(4).packed
    first_pieces = [p for p in arrived if p[12:16] == source and p[6] & 0x20 and not (p[6] & 0x1F or p[7])]
    assert any(piece[33] & SYN for piece in first_pieces)
    assert len(first_pieces) > 100


NARROW_BYTES = 1_280
"""As IPv6 demands of every path; less than a handshake packet of pods with many labels."""


@contextmanager
def narrow_path(lab: Lab) -> Iterator[None]:
    """Let the network take no more than `NARROW_BYTES` of IPv4 at once, both ways, and leave all else as it is."""
    fabric = f"{lab.name}-fabric"
    networks = [network for node in NODES for network in node.pod_networks if network.version == 4]
    routes = [run(["ip", "-n", fabric, "route", "show", str(network)]).strip() for network in networks]
    for route in routes:
        ip(fabric, f"route replace {route} mtu lock {NARROW_BYTES}")
    try:
        yield
    finally:
        for route in routes:
            ip(fabric, f"route replace {route}")


def test_a_path_that_is_narrower_than_a_handshake_packet(lab: Lab) -> None:
    """Both kernels forbid routers to cut their packets, which by themselves would fit."""
    for name, node, role in (("wide-client", "a", "client"), ("wide-server", "b", "server")):
        described = _many_labels(name, 6)
        lab.add_pod(replace(described, node=node, labels={**described.labels, "app": role}))
        assert int(str(endpoint(lab, f"x/{name}")["identity_bytes"])) > NARROW_BYTES - TCP_MIN_HEADER
    with (
        narrow_path(lab),
        lab.capture("node:b") as capture,
        connection(lab, "x/wide-client", "x/wide-server") as (client, server),
    ):
        assert carries_words(client, server)
        transfer(client, server, 1)
        transfer(server, client, 1)
        seen = capture.close()
    pieces = [packet for packet in seen if packet[0] >> 4 == 4 and packet[6] & 0x20 and packet[33] & SYN]
    assert any(piece[33] == SYN for piece in pieces)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_syn_in_fragments_is_judged_as_a_whole(lab: Lab, version: int) -> None:
    source, target = (str(lab.place(place).address(version)) for place in ("host:outside", "x/server"))
    before = denied(lab, "b")
    segment = TCP(sport=4321, dport=HTTP.number, flags="S", seq=77) / os.urandom(1400)
    pieces = fragment_segment((source, target), segment, identification=7)
    assert len(pieces) == 2
    family = {4: socket.AF_INET, 6: socket.AF_INET6}[version]
    with open_socket(lab.place("host:outside").netns, family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        for piece in pieces:
            sock.sendto(bytes(piece), (target, 0))
    wait_until(lambda: denied(lab, "b") > before, "the SYN is denied")
    assert denials(lab, "x/server")[-1] == "unidentified-peer"


def words_of(capture: Capture, port: int) -> list[Segment]:
    """Return the segments with data from a port that were captured so far; a SYN's is a frame."""
    return [s for s in segments(capture.packets(), port) if s.sport == port and s.payload and not s.flags & SYN]


@pytest.mark.parametrize("version", VERSIONS)
def test_data_in_fragments_of_an_established_connection(lab: Lab, version: int) -> None:
    payload = os.urandom(2_000)
    with (
        lab.capture("x/server") as capture,
        connection(lab, "x/client", "x/server", version) as (client, server),
        RawPod(lab, "x/client") as raw,
    ):
        for end in (client, server):
            end.setsockopt(*RESET_ON_CLOSE)  # What follows is news to the client's own kernel.
        assert carries_words(client, server)
        (source, sport), (target, dport) = client.getsockname()[:2], server.getsockname()[:2]
        wait_until(lambda: words_of(capture, sport) != [], "the capture has the client's words")
        said = words_of(capture, sport)[-1]
        seq, ack = said.seq + len(said.payload), said.ack
        segment = TCP(sport=sport, dport=dport, flags="PA", seq=seq & 0xFFFF_FFFF, ack=ack) / payload
        pieces = fragment_segment((source, target), segment, identification=8)
        assert len(pieces) > 1
        raw.send("x/server", pieces)
        assert read_all(server, len(payload)) == payload


# Offloads.


@contextmanager
def offloads(lab: Lab, changed: Mapping[str, bool]) -> Iterator[None]:
    """Set offloads at both ends of both pods' links for the block."""
    with ExitStack() as stack:
        for place, node in (("x/client", "node:a"), ("x/server", "node:b")):
            listed = lab.run(node, "ip", "-br", "link", "show", "master", POD_BRIDGE)
            host_ends = [line.split("@")[0] for line in listed.splitlines()]
            for where, ifname in ((place, "eth0"), *((node, name) for name in host_ends)):
                netns = lab.place(where).netns
                before = {name: _offload(netns, ifname, name) for name in OFFLOADS}
                for name, value in changed.items():
                    _offload(netns, ifname, name, value)
                    assert _offload(netns, ifname, name) is value
                for name in reversed(OFFLOADS):
                    stack.callback(_offload, netns, ifname, name, before[name])
        yield


def _offload(netns: str, ifname: str, name: str, value: bool | None = None) -> bool:
    """Read one setting, or set it."""
    read, write = OFFLOADS[name]
    command = ctypes.create_string_buffer(struct.pack("=II", read if value is None else write, bool(value)), 8)
    request = struct.pack("16sP16x", ifname.encode(), ctypes.addressof(command))
    with open_socket(netns, socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCETHTOOL, request)
    return bool(struct.unpack("=II", command.raw)[1])


NONE = dict.fromkeys(OFFLOADS, False)


@pytest.mark.parametrize(
    "changed",
    [NONE, NONE | {"tx checksum": True}, {"tso": False}, {"gso": False}, {"gro": True}, {"rx checksum": False}],
    ids=["none", "checksum alone", "no tso", "no gso", "gro", "no rx checksum"],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_offloads_of_the_pods_links(lab: Lab, changed: Mapping[str, bool], version: int) -> None:
    with offloads(lab, changed), connection(lab, "x/client", "x/server", version) as (client, server):
        assert carries_words(client, server)
        transfer(client, server, 2)
        transfer(server, client, 2)


# Jumbo frames.


def test_jumbo_frames(plugin: Path, tmp_path: Path) -> None:
    conflist = load_conflist(Tools().conflist)
    conflist["plugins"][0]["mtu"] = JUMBO_BYTES
    changed = tmp_path / "jumbo.conflist"
    changed.write_text(json.dumps(conflist))
    with odd_world(plugin, conflist=changed) as lab:
        for node, port in (("node:a", "port0"), ("node:b", "port1")):
            ip(lab.place(node).netns, f"link set {UPLINK} mtu {JUMBO_BYTES}")
            ip(f"{lab.name}-fabric", f"link set {port} mtu {JUMBO_BYTES}")
        for version in VERSIONS:
            with (
                lab.capture("x/server") as capture,
                connection(lab, "x/client", "x/server", version) as (client, server),
            ):
                port = server.getsockname()[1]
                assert carries_words(client, server)
                transfer(client, server, 5)
                transfer(server, client, 5)
                syn = segments(capture.close(), port)[0]
            assert announced_mss(syn.options) == JUMBO_BYTES - TCP_MIN_HEADER - (20 if version == 4 else 40)
        _require_room_for_what_the_queue_shows(lab)


def _require_room_for_what_the_queue_shows(lab: Lab) -> None:
    lab.add_pod(_many_labels("large", 30))
    size = endpoint(lab, "x/large")["identity_bytes"]
    assert isinstance(size, int)
    assert 3_000 < size < MAX_COPIED_BYTES
    assert outcome(lab, "x/large", "x/server", HTTP.number) is Outcome.CONNECTED
    with pytest.raises(LabError, match=f"the packet queue .{MAX_COPIED_BYTES} bytes. has room for"):
        lab.add_pod(_many_labels("larger", 45))


def _many_labels(name: str, count: int) -> PodSpec:
    """Describe a client whose labels do not compress."""
    letters = string.ascii_letters + string.digits
    words = ["".join(secrets.choice(letters) for _ in range(63)) for _ in range(2 * count)]
    return PodSpec(PodRef("x", name), "a", labels={"app": "client", **dict(zip(words[::2], words[1::2], strict=True))})
