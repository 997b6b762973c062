# SPDX-License-Identifier: Apache-2.0
"""Attack: a tenant's pod sends another of its pods offers that prove nothing, each to another port.

An entry of the flow index for each of them would cost memory, and each change of the sender's labels the loop's time.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from enforcer_daemon.handshake.datagrams import STANDALONE_EXID
from enforcer_daemon.handshake.frames import TYPE_OFFER, SynFrame, decode_syn, encode_syn
from enforcer_daemon.packet.udp import UDP_HEADER, build_udp, encode_option
from tests.attacks.test_leases import _offers
from tests.e2e.operation_world import NODES, pod
from tests.e2e.raw_pod import RawPod, mac
from trireme_lab import Lab, LabSpec, Tools

pytestmark = pytest.mark.kernel
PORTS = 2_000


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    pods = (pod("sink", "a", namespace="t"), pod("probe", "a", namespace="t"))
    with Lab(LabSpec(NODES, {"t": {}}, pods), Tools(plugin=plugin)) as lab:
        yield lab


def entries(lab: Lab) -> int:
    return sum(len(file.read_text().splitlines()) for file in lab.directory.glob("a/**/flows/*.jsonl"))


def test_offers_that_prove_nothing_make_no_entries(lab: Lab) -> None:
    own, far = (lab.place(place).address(4) for place in ("t/probe", "t/sink"))
    with lab.capture("t/sink") as capture, lab.open_socket("t/probe", socket.AF_INET, socket.SOCK_DGRAM) as mine:
        mine.sendto(b"x", (str(far), 9))
        deadline = time.monotonic() + 5.0
        while entries(lab) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert entries(lab) == 2, "a flow that is proven has an entry at each end"
    identity = decode_syn(_offers(frames := capture.close())[0], TYPE_OFFER).block
    assert frames
    head = mac(lab, "t/sink") + mac(lab, "t/probe") + b"\x08\x00"
    with lab.capture("t/probe") as capture, RawPod(lab, "t/probe") as raw:
        for n in range(PORTS):
            offer = encode_syn(SynFrame(os.urandom(16), identity), TYPE_OFFER)
            surplus = encode_option(UDP_HEADER, STANDALONE_EXID, offer)
            raw.send_frame(head + build_udp(own.packed, far.packed, (4_000, 1_000 + n), b"", surplus))
            if n % 20 == 0:
                time.sleep(0.01)
        time.sleep(1.0)
    answered = sum(1 for frame in capture.close() if far.packed + own.packed in frame)
    assert answered > PORTS / 10, "the offers hold, so they are answered"
    assert entries(lab) == 2
