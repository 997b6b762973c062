# SPDX-License-Identifier: Apache-2.0
"""A resolver without an enforcer, allowed by its address: asked at once, by datagrams exactly as the pod sent them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from scapy.layers.dns import DNS, DNSQR
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6

from tests.e2e.dns_world import WIDE, WORLD, Servers, files_for, look_up, name
from tests.e2e.operation_world import FAMILIES, denials
from trireme_lab import Lab, Tools

pytestmark = pytest.mark.kernel

OUTSIDE, ASKING, SILENCED = "host:outside", "x/ask-outside", "x/stranger"
VERSIONS = [4, 6]
LATE_ANSWER_S = 5.0
"""A resolver's own patience, after which it asks again: an answer before that came to the first question."""


@pytest.fixture(scope="module")
def servers(plugin: Path) -> Iterator[Servers]:
    needed = tuple(pod for pod in WORLD.pods if str(pod.pod) in (ASKING, SILENCED))
    with Lab(replace(WORLD, pods=needed, services=()), Tools(plugin=plugin)) as lab:
        servers = Servers(lab)
        servers.start(OUTSIDE)
        yield servers


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_asked_by_whoever_has_a_rule_for_its_address(servers: Servers, version: int) -> None:
    lab = servers.lab
    first, other = name(10 * version), name(10 * version + 1)
    files = files_for(lab, [lab.address_of(OUTSIDE, version)])
    found = look_up(lab, ASKING, files, [first, WIDE])
    assert all(lookup.is_right and lookup.seconds < LATE_ANSWER_S for lookup in found), found
    assert servers.asked(OUTSIDE, first) == 2  # A and AAAA, once each
    impatient = files_for(lab, [lab.address_of(OUTSIDE, version)], "timeout:1 attempts:1")
    (refused,) = look_up(lab, SILENCED, impatient, [other])
    assert refused.error
    assert servers.asked(OUTSIDE, other) == 0
    assert denials(lab, SILENCED)


@pytest.mark.parametrize("version", VERSIONS)
def test_its_datagrams_are_the_pods_own_bytes(servers: Servers, version: int) -> None:
    lab = servers.lab
    source, target = (str(lab.address_of(place, version)) for place in (ASKING, OUTSIDE))
    query = bytes(DNS(id=0x2A00 + version, rd=1, qd=DNSQR(qname=name(500 + version))))
    with lab.capture(OUTSIDE) as capture, lab.open_socket(ASKING, FAMILIES[version], socket.SOCK_DGRAM) as sock:
        sock.settimeout(LATE_ANSWER_S)
        sock.bind((source, 40_000 + version))
        sock.connect((target, 53))
        sock.send(query)
        answer = sock.recv(512)
        packets = [packet for packet in capture.close() if query[:2] in packet]
    layer = IP if version == 4 else IPv6
    asked, answered = (layer(packet) for packet in packets)  # two packets, and no others
    expected = layer(bytes(layer(src=source, dst=target) / UDP(sport=40_000 + version, dport=53) / query))
    asked[UDP].chksum = expected[UDP].chksum  # Left to the link, as without an enforcer; the answer shows that it held.
    assert bytes(asked[UDP]) == bytes(expected[UDP])
    assert len(bytes(asked)) == len(bytes(expected))  # nothing beyond the datagram
    assert bytes(answered[UDP].payload) == answer
