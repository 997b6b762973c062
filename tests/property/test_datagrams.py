# SPDX-License-Identifier: Apache-2.0
"""Flows of datagrams under whatever wire and attacker Hypothesis thinks of (tests/unit/datapath/udp_pair.py).

The client's egress and the server's ingress are isolated by labels in one half of the runs; in the other the client may
send to any address, so that offers ride.
"""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from enforcer_daemon.identity.authority import make_authority
from enforcer_daemon.marks import CHECKSUM_PARTIAL, GSO
from tests.unit.datapath.pair import WALL, Node
from tests.unit.datapath.udp_pair import MAX_HALF_OPEN, MAX_HELD, DatagramWorld

AUTHORITY = make_authority("cluster.local", datetime.fromtimestamp(WALL, UTC))
PORTS = st.sampled_from([40_000, 40_001])
PICK = st.integers(0, 10_000)
LARGE = b"large " * 190
"""Has no room for an offer beside it."""


class Datagrams(RuleBasedStateMachine):
    """The steps, and what they are taken with."""

    @initialize(is_free=st.booleans())
    def begin(self, is_free: bool) -> None:
        limits = {"max_half_open_flows": MAX_HALF_OPEN, "max_held_packets": MAX_HELD}
        nodes = Node("node-1", AUTHORITY, 1, **limits), Node("node-2", AUTHORITY, 2, **limits)
        self.world = DatagramWorld(nodes, ("10.1.0.2", "10.2.0.2"), is_free)

    @rule(
        port=PORTS,
        payload=st.sampled_from([b"", b"query", b"other", LARGE]),
        offloads=st.sampled_from([0, CHECKSUM_PARTIAL, CHECKSUM_PARTIAL | GSO]),
    )
    def query(self, port: int, payload: bytes, offloads: int) -> None:
        self.world.query(port, payload, offloads)

    @rule(port=PORTS)
    def reply(self, port: int) -> None:
        self.world.reply(port)

    @rule(port=PORTS, steps=st.integers(1, 6))
    def orderly(self, port: int, steps: int) -> None:
        self.world.orderly(port, steps)

    @rule(pick=PICK)
    def deliver(self, pick: int) -> None:
        self.world.deliver(pick)

    @rule(pick=PICK)
    def repeat(self, pick: int) -> None:
        self.world.repeat(pick)

    @rule(pick=PICK)
    def lose(self, pick: int) -> None:
        self.world.lose(pick)

    @rule()
    def send_own_packets(self) -> None:
        self.world.send_own_packets()

    @rule(seconds=st.sampled_from([0.01, 0.15, 0.5, 1.5, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.time_passes(seconds)

    @rule(is_server=st.booleans())
    def policy_changes(self, is_server: bool) -> None:
        self.world.policy_changes(is_server)

    @rule(port=PORTS)
    def lose_state(self, port: int) -> None:
        self.world.lose_state(port)

    @rule(is_server=st.booleans())
    def forget(self, is_server: bool) -> None:
        self.world.forget(is_server)

    @rule(pick=PICK, at_server=st.booleans())
    def replay(self, pick: int, at_server: bool) -> None:
        self.world.replay(pick, at_server)

    @rule(pick=PICK, at=PICK, value=st.integers(0, 255), at_server=st.booleans())
    def change_a_byte(self, pick: int, at: int, value: int, at_server: bool) -> None:
        self.world.change_a_byte(pick, at, value, at_server)

    @rule(pick=PICK, from_pick=PICK, port=PORTS, is_standalone=st.booleans(), at_server=st.booleans())
    def cross(self, pick: int, from_pick: int, port: int, is_standalone: bool, at_server: bool) -> None:
        self.world.cross(pick, from_pick, port, is_standalone, at_server)

    @rule(pick=PICK, port=PORTS, is_standalone=st.booleans(), is_proof=st.booleans())
    def forge(self, pick: int, port: int, is_standalone: bool, is_proof: bool) -> None:
        self.world.forge(pick, port, is_standalone, is_proof)

    @rule(pick=PICK, at=PICK, change=st.integers(1, 255), port=PORTS, at_server=st.booleans())
    def tamper(self, pick: int, at: int, change: int, port: int, at_server: bool) -> None:
        self.world.tamper(pick, at, change, port, at_server)

    @rule(port=PORTS, at=PICK, change=st.integers(1, 255))
    def tamper_with_an_answer(self, port: int, at: int, change: int) -> None:
        self.world.tamper_with_an_answer(port, at, change)

    @invariant()
    def tables_are_bounded(self) -> None:
        if hasattr(self, "world"):
            self.world.check_bounds()

    def teardown(self) -> None:
        """When all has come to its end, nothing is left."""
        if hasattr(self, "world"):
            event(f"delivered to the server's kernel: {min(self.world.delivered, 3)}")
            self.world.end()


TestDatagrams = pytest.mark.slow(Datagrams.TestCase)
TestDatagrams.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
