# SPDX-License-Identifier: Apache-2.0
"""Attack: a pod fills the node's conntrack with flows to an address that a new pod is going to get.

Addresses are given out in order, so the next ones are known. The node forwards datagrams and segments to nobody, and
conntrack keeps an entry for each. ADD of the pod that gets the address would wait until all of them are removed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.daemon.staleflows import MAX_UNANSWERED
from enforcer_daemon.model import PodRef
from enforcer_daemon.packet.tcp import ACK, build
from enforcer_daemon.packet.udp import build_udp
from tests.e2e.operation_world import NODES, connection, pod
from tests.e2e.raw_pod import RawPod, mac
from trireme_lab import Lab, LabSpec, PodSpec, Tools
from trireme_lab.network import POD_BRIDGE

pytestmark = pytest.mark.kernel
FLOWS = 4 * MAX_UNANSWERED
ETHERTYPE = {4: b"\x08\x00", 6: b"\x86\xdd"}
Build = Callable[[bytes, bytes, tuple[int, int]], bytes]


def datagram(source: bytes, destination: bytes, ports: tuple[int, int]) -> bytes:
    return build_udp(source, destination, ports, b"x", b"")


def segment(source: bytes, destination: bytes, ports: tuple[int, int]) -> bytes:
    """Conntrack takes it for one in the middle of a connection."""
    return build(source, destination, ports, (1_000, 2_000), ACK, 500, b"x")


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    with Lab(LabSpec(NODES, {"x": {}, "y": {}}, (pod("raw", "a"),)), Tools(plugin=plugin)) as lab:
        yield lab


@pytest.mark.parametrize(("version", "make", "last"), [(4, datagram, 98), (4, segment, 99), (6, segment, 100)])
def test_a_new_pod_does_not_wait_for_the_flows_that_a_neighbor_made_to_its_address(
    lab: Lab, version: int, make: Build, last: int
) -> None:
    addresses = ip_address(f"10.244.1.{last}"), ip_address(f"fd00:10:244:1::{last}")
    own = lab.place("x/raw").address(version)
    target = addresses[version == 6]
    for name in ("fresh_udp", "fresh_tcp"):  # It is older than 600 s.
        lab.run("node:a", "nft", "flush", "set", "inet", "trireme_guard", f"{name}{version}")
    with RawPod(lab, "x/raw") as raw:
        head = mac(lab, "node:a", POD_BRIDGE) + mac(lab, "x/raw") + ETHERTYPE[version]
        for n in range(FLOWS):
            raw.send_frame(head + make(own.packed, target.packed, (1024 + n % 512, 1024 + n // 512)))
    before = _entries(lab)
    assert before > FLOWS * 3 // 4

    started = time.monotonic()
    spec = PodSpec(PodRef("y", f"new-{last}"), "a", labels={}, addresses=addresses)
    lab.add_pod(spec)
    assert time.monotonic() - started < 1.5  # It includes what the lab does: namespace, links, the plugin's process.
    assert before - _entries(lab) < MAX_UNANSWERED + FLOWS // 16
    unclean = lab.run("node:a", "nft", "list", "set", "inet", "trireme_guard", f"unclean{version}")
    assert re.search(rf"{re.escape(str(target))} timeout", unclean)

    with connection(lab, str(spec.pod), "x/raw") as (client, server):
        client.sendall(b"by right")
        assert server.recv(100) == b"by right"
    with connection(lab, "x/raw", str(spec.pod)) as (client, server):
        server.sendall(b"by right")
        assert client.recv(100) == b"by right"


def _entries(lab: Lab) -> int:
    return int(lab.run("node:a", "cat", "/proc/sys/net/netfilter/nf_conntrack_count"))
