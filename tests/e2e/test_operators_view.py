# SPDX-License-Identifier: Apache-2.0
"""What operators see of a node: pods whose labels nobody tells, what the guard drops, metrics over HTTP."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from enforcer_daemon.model import PodRef
from tests.e2e.operation_world import endpoint
from trireme_lab import Lab, LabError, LabSpec, NodeSpec, PodSpec, Tools

pytestmark = pytest.mark.kernel

PORT = 9475


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    settings = {"registration": {"requireLabels": True}, "metrics": {"listen": f"127.0.0.1:{PORT}"}}
    pods = (PodSpec(PodRef("x", "pod"), "a", labels={"app": "pod"}),)
    world = LabSpec((NodeSpec.numbered("a", 1),), pods=pods, settings=settings)
    with Lab(world, Tools(plugin=plugin)) as lab:
        yield lab


def scraped(lab: Lab, request: bytes = b"GET /metrics") -> str:
    with lab.open_socket("node:a") as client:
        client.settimeout(20)
        client.connect(("127.0.0.1", PORT))
        client.sendall(request + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        return b"".join(iter(lambda: client.recv(65_536), b"")).decode()


def test_a_pod_of_which_no_labels_are_known_is_refused(lab: Lab) -> None:
    with pytest.raises(LabError, match=r"registration\.requireLabels: no labels are known of pod x/bare"):
        lab.add_pod(PodSpec(PodRef("x", "bare"), "a"))
    assert endpoint(lab, "x/pod")["are_labels_known"] is True
    assert lab.node("a").status()["pods_without_labels"] == []


def test_metrics_are_read_over_http_and_nothing_else_is(lab: Lab) -> None:
    answer = scraped(lab)
    assert answer.startswith("HTTP/1.1 200 ")
    assert "\ntrireme_endpoints 1.0\n" in answer
    assert scraped(lab, b"GET /").startswith("HTTP/1.1 404 ")
    assert scraped(lab, b"POST /metrics").startswith("HTTP/1.1 405 ")


def test_what_the_guard_drops_is_among_the_metrics(lab: Lab) -> None:
    lab.run("x/pod", "ip", "address", "add", "203.0.113.9/32", "dev", "lo")
    with lab.open_socket("x/pod", kind=socket.SOCK_DGRAM) as stranger:
        stranger.bind(("203.0.113.9", 0))
        stranger.sendto(b"x", (str(lab.place("node:a").address()), 9))
    # The pod asks for the gateway's MAC under the address, which is dropped: a spoofed neighbor, some times over.
    before = lab.node("a").status()["guard"]["drops"]["spoofed-neighbor"]  # type: ignore[index]
    found = re.search(
        r'^trireme_guard_dropped_packets_total\{reason="spoofed-neighbor"\} (\d+)', scraped(lab), re.MULTILINE
    )
    assert found is not None
    assert 0 < before <= int(found[1])
