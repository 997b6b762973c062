# SPDX-License-Identifier: Apache-2.0
"""The target of UDP's handshakes: an input is a script of what two kernels, a bad wire and an attacker do.

The world and what must hold in it are those of tests/unit/datapath/udp_pair.py. Each script is played in both
families, once where the client's datagrams wait for the answer, and once where the offer rides on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from enforcer_daemon.marks import CHECKSUM_PARTIAL, GSO
from tests.fuzz.exchange import ADDRESSES, NODES, Script, renew
from tests.unit.datapath.udp_pair import DatagramWorld

Choice = TypeVar("Choice")
MAX_STEPS = 48
_PORTS = (40_000, 40_001)
_PAYLOADS = (b"", b"query", b"other", b"large " * 190)
_OFFLOADS = (0, CHECKSUM_PARTIAL, CHECKSUM_PARTIAL | GSO)
_WAITS_S = (0.01, 0.15, 0.5, 1.5, 4.0)


class Play:
    """One script in one world."""

    def __init__(self, script: Script, addresses: tuple[str, str], is_free: bool) -> None:
        for seed, node in enumerate(NODES):
            renew(node, seed)
        self.script = script
        self.world = DatagramWorld(NODES, addresses, is_free)

    def run(self) -> None:
        script, world = self.script, self.world
        steps: tuple[Callable[[], None], ...] = (
            lambda: world.orderly(self.port(), 1 + script.number(6)),
            lambda: world.query(self.port(), self.one_of(_PAYLOADS), self.one_of(_OFFLOADS)),
            lambda: world.reply(self.port()),
            lambda: world.deliver(script.number(256)),
            lambda: world.repeat(script.number(256)),
            lambda: world.lose(script.number(256)),
            world.send_own_packets,
            lambda: world.time_passes(self.one_of(_WAITS_S)),
            lambda: world.policy_changes(self.is_so()),
            lambda: world.lose_state(self.port()),
            lambda: world.forget(self.is_so()),
            lambda: world.replay(script.number(256), self.is_so()),
            lambda: world.change_a_byte(script.number(256), script.number(4_096, 2), script.number(256), self.is_so()),
            lambda: world.cross(script.number(256), script.number(256), self.port(), self.is_so(), self.is_so()),
            lambda: world.forge(script.number(256), self.port(), self.is_so(), self.is_so()),
            self.tamper,
            self.attack,
            self.raw,
            lambda: world.tamper_with_an_answer(self.port(), script.number(4_096, 2), 1 + script.number(255)),
        )
        for _ in range(MAX_STEPS):
            if script.is_over:
                break
            steps[script.number(len(steps))]()
            world.check_bounds()
        world.end()

    def port(self) -> int:
        return self.one_of(_PORTS)

    def is_so(self) -> bool:
        return bool(self.script.number(2))

    def one_of(self, choices: tuple[Choice, ...]) -> Choice:
        return choices[self.script.number(len(choices))]

    def tamper(self) -> None:
        """Change a byte of a message that was seen, and its checksum with it."""
        pick, at, change = self.script.number(256), self.script.number(4_096, 2), 1 + self.script.number(255)
        self.world.tamper(pick, at, change, self.port(), self.is_so())

    def attack(self) -> None:
        """Send a message of any bytes, in an envelope that holds."""
        message = self.script.take(self.script.number(96))
        self.world.attack(message, self.port(), self.is_so(), self.is_so())

    def raw(self) -> None:
        endpoint = self.world.server if self.is_so() else self.world.client
        self.world.arrive(endpoint, self.script.take(self.script.number(96)))


def datagrams(content: bytes) -> None:
    """Play the script, in each family and by each kind of policy."""
    for addresses in ADDRESSES:
        for is_free in (False, True):
            Play(Script(content), addresses, is_free).run()
