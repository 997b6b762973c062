# SPDX-License-Identifier: Apache-2.0
"""A new pod with a dead pod's address gets its peer's enforcer to reply, and then sends plain datagrams.

A marked datagram passes the guard, and the peer's enforcer asks for a handshake: a message on the flow's own ports,
which the node's conntrack takes for a reply. The flow counts as established then, and the peer's kernel still has the
release.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack

import pytest

from enforcer_daemon.handshake.datagrams import STANDALONE_EXID
from enforcer_daemon.handshake.frames import TYPE_OFFER, SynFrame, decode_syn, encode_syn
from enforcer_daemon.handshake.leaseframes import LEASE_PORT
from enforcer_daemon.packet.udp import UDP_HEADER, build_udp, encode_option
from tests.attacks.test_leases import _offers
from tests.attacks.test_stale_flows import DatagramFlow, _drain, _pod, _served, lab, marked
from tests.e2e.operation_world import FAMILIES, policy
from tests.e2e.raw_pod import RawPod
from trireme_lab import Lab

pytestmark = pytest.mark.kernel
versions = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
__all__ = ["lab"]


@versions
@pytest.mark.parametrize("node", ["a", "b"], ids=["one-node", "two-nodes"])
@pytest.mark.parametrize("newcomer", ["free", "caged"])
def test_a_new_pod_marks_first_and_then_does_not(lab: Lab, version: int, port: int, node: str, newcomer: str) -> None:
    with _pod(lab, "old", node, "old") as old, ExitStack() as stack:
        sock, listener = stack.enter_context(_served(lab, old, "x/server", version, port))
        flow = DatagramFlow(lab, port, "x/server", port, version, listener.received)
        assert flow.arrives_raw(old)
        sock.close()
        lab.remove_pod(old)
        with _pod(lab, "new", node, newcomer) as new:
            assert not flow.arrives_raw(new)
            assert not flow.arrives_raw(new, disguise=marked)
            assert not flow.arrives_raw(new), "plain data of a new pod, after a marked datagram"


@versions
@pytest.mark.parametrize("newcomer", ["free", "shut"])
def test_the_same_by_the_address_of_a_dead_server(lab: Lab, version: int, port: int, newcomer: str) -> None:
    """The client's enforcer answers a marked datagram by an offer. If a policy of its own lets the newcomer's enforcer
    refuse that in silence, the client's release stays, and the newcomer's node has seen a reply."""
    lab.apply(policy("shut", "shut", ingress=[]))
    with _pod(lab, "old", "b", "old") as old, ExitStack() as stack:
        sock, _ = stack.enter_context(_served(lab, "x/client", old, version, port))
        flow = DatagramFlow(lab, port, "x/client", port, version, lambda: _drain(sock))
        assert flow.arrives_raw(old)
        lab.remove_pod(old)
        with _pod(lab, "new", "b", newcomer) as new:
            assert not flow.arrives_raw(new, disguise=marked)
            assert not flow.arrives_raw(new), "plain data of a new pod, after a marked datagram"


@versions
def test_a_denied_offer_is_answered_where_no_lease_message_came_through_yet(lab: Lab, version: int, port: int) -> None:
    """A pair of which no lease message has come through is not probed, so a denied newcomer's offer is answered: the
    answer makes the flow established and told for its own node."""
    family = "iptables" if version == 4 else "ip6tables"
    block = ("-t", "raw", "-I", "PREROUTING", "-p", "udp", "--dport", str(LEASE_PORT), "-j", "DROP")
    unblock = ("-t", "raw", "-D", *block[3:])
    with _pod(lab, "old", "b", "old") as old, ExitStack() as stack:
        for node in ("node:a", "node:b"):
            lab.run(node, family, *block)
            stack.callback(lab.run, node, family, *unblock)
        sock, listener = stack.enter_context(_served(lab, old, "x/server", version, port))
        flow = DatagramFlow(lab, port, "x/server", port, version, listener.received)
        assert flow.arrives_raw(old)
        sock.close()
        lab.remove_pod(old)
        with _pod(lab, "new", "b", "free") as new:
            with lab.capture("x/server") as capture, lab.open_socket(new, FAMILIES[version], socket.SOCK_DGRAM) as mine:
                mine.sendto(b"x", (flow.target[0], 9))
                time.sleep(0.5)
            identity = decode_syn(_offers(capture.close())[0], TYPE_OFFER).block
            own, far = (lab.place(place).address(version).packed for place in (new, "x/server"))
            with RawPod(lab, new) as raw:
                surplus = encode_option(
                    UDP_HEADER, STANDALONE_EXID, encode_syn(SynFrame(os.urandom(16), identity), TYPE_OFFER)
                )
                frame = flow.frames(new, b"x", None)[0][:14] + build_udp(own, far, (port, port), b"", surplus)
                raw.send_frame(frame)
                time.sleep(0.5)
            assert not flow.arrives_raw(new), "plain data of a denied pod, after an offer"
