# SPDX-License-Identifier: Apache-2.0
"""The sweep: random packets of every form from one attacker to every kind of address, and what became of each."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

from enforcer_daemon.model import IPAddress
from tests.attacks import packets
from tests.attacks import world as places
from tests.attacks.aim import Aim
from tests.attacks.forms import FORMS
from tests.attacks.links import LINK_FORMS, LinkAim
from tests.attacks.origins import Origin, Target
from tests.attacks.witness import ETHERNET_BYTES, TAG_BYTES, UNNUMBERED, Witness
from tests.attacks.world import AttackWorld
from trireme_lab.netns import in_netns, open_socket

OPENING = ("tcp-syn-framed-own", "udp-offer-own", "udp-offer-marked", "udp-standalone-offer-own")
"""Forms that another enforcer may answer."""
CONTROL = 0xFFFF_0000
"""Numbers from here on are of packets that must arrive, so that silence means something."""
_BATCH = 128
_DISCARD = 9
"""The port of control packets."""
_PATIENCE_S = 20.0
_GRACE_S = 1.5
"""For what an enforcer holds until it stops waiting for a proof (1 s), seconds."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One numbered attempt of a sweep."""

    number: int
    form: str
    target: str
    version: int
    source: IPAddress | None
    frames: tuple[bytes, ...]
    ports: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return f"#{self.number} {self.form} IPv{self.version} from {self.source} to {self.target}"


@dataclass(frozen=True, slots=True)
class Arrival:
    """What was read at a place, and the attempt that it comes from."""

    place: str
    attempt: Attempt
    packets: tuple[bytes, ...]

    def __str__(self) -> str:
        return f"{self.attempt} arrived at {self.place} as {self.packets[0][:64].hex()}"


@dataclass(slots=True)
class Outcome:
    """What became of a sweep."""

    packets: int = 0
    refused_by_link: int = 0
    """Packets that the attacker's own interface would not send."""
    arrivals: list[Arrival] = field(default_factory=list)
    """By place and attempt, each once."""


UNKNOWN = Attempt(UNNUMBERED, "unknown", "unknown", 0, None, ())
"""Whose number was cut off behind the tag."""


class Sweep:
    """Makes numbered attempts and sends them from an origin."""

    def __init__(
        self, world: AttackWorld, origin: Origin, aims: Sequence[Target], tag: bytes, seed: int, first: int = 0
    ) -> None:
        self._world, self._origin, self._targets = world, origin, aims
        self._tag, self._rng = tag, random.Random(seed)
        self._number = first

    def random_attempt(self, spoofing: float = 0.25, link_share: float = 0.06) -> Attempt:
        """Make an attempt of a random form to a random destination, a part of them under addresses of others."""
        rng = self._rng
        if rng.random() < link_share:
            return self.link_attempt(rng.choice(list(LINK_FORMS)))
        target = rng.choice(self._targets)
        version = rng.choice(list(target.addresses))
        form = rng.choice(list(FORMS[version]))
        source = None if rng.random() >= spoofing else rng.choice(self._origin.spoofed[version])
        return self.attempt(form, target, version, source)

    def follower(self, attempt: Attempt, form: str) -> Attempt:
        """Make an attempt of another form in the flow that an earlier one may have opened."""
        target = next(target for target in self._targets if target.kind == attempt.target)
        return self.attempt(form, target, attempt.version, attempt.source, attempt.ports)

    def attempt(
        self,
        form: str,
        target: Target,
        version: int,
        source: IPAddress | None = None,
        ports: tuple[int, int] | None = None,
    ) -> Attempt:
        """Make an attempt of one form; `source` None: under the origin's own address."""
        rng, stated = self._rng, source or self._origin.own[version]
        ports = ports or (rng.randrange(20_000, 30_000), rng.choice(target.ports))
        own = self._world.own_blocks.get(self._origin.place, b"")
        aim = Aim(
            version,
            (stated.packed, target.addresses[version].packed),
            ports,
            self._marker(),
            rng,
            own,
            self._world.copied_block if own != self._world.copied_block else self._world.own_blocks[places.CAGED],
        )
        macs = rng.choice(target.macs), self._origin.mac
        frames = tuple(packets.ethernet(macs, packets.ETHERTYPES[version], p) for p in FORMS[version][form](aim))
        return Attempt(self._number, form, target.kind, version, stated, frames, ports)

    def link_attempt(self, form: str) -> Attempt:
        """Make an attempt of a form that ends on the pod's own link."""
        world, origin = self._world, self._origin
        aim = LinkAim(
            self._marker(),
            self._rng,
            origin.mac,
            world.macs[places.NEAR],
            {version: origin.own[version].packed for version in (4, 6)},
            {version: world.address(places.NEAR, version).packed for version in (4, 6)},
            {version: world.address(places.ISOLATED, version).packed for version in (4, 6)},
        )
        version = 6 if form.startswith("nd-") else 4
        return Attempt(self._number, form, "link", version, None, LINK_FORMS[form](aim))

    def _marker(self) -> bytes:
        self._number += 1
        return self._tag + self._number.to_bytes(4, "big")


def forms_for(target: Target) -> Iterator[tuple[str, int]]:
    """Yield each form that can be aimed at a destination, with its IP version."""
    for version in target.addresses:
        for form in FORMS[version]:
            yield form, version


Transmit = Callable[[bytes], object]


@contextmanager
def by_packet_socket(world: AttackWorld, origin: Origin) -> Iterator[Transmit]:
    """Yield what sends a frame on the origin's link, past every rule of its own namespace."""
    kind = socket.SOCK_RAW
    with in_netns(world.netns(origin.place), lambda: socket.socket(socket.AF_PACKET, kind, 0)) as sock:
        sock.bind((origin.link, 0))
        yield sock.send


@contextmanager
def by_raw_socket(world: AttackWorld, origin: Origin) -> Iterator[Transmit]:
    """Yield what sends the IP packet of a frame through the origin's own kernel, and so through its rules."""
    families = (socket.AF_INET, socket.AF_INET6)
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(open_socket(world.netns(origin.place), family, socket.SOCK_RAW, socket.IPPROTO_RAW))
            for family in families
        ]
        four, six = sockets
        four.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for sock in sockets:
            sock.settimeout(_PATIENCE_S)  # what waits for the enforcer takes up room

        def transmit(frame: bytes) -> None:
            packet = frame[ETHERNET_BYTES:]
            if packet[0] >> 4 == 4:
                four.sendto(packet, (str(IPv4Address(packet[16:20])), 0))
            else:
                six.sendto(packet, (str(IPv6Address(packet[24:40])), 0, 0, 0))

        yield transmit


def run(
    transmit: Transmit, attempts: Iterable[Attempt], witnesses: Mapping[str, Witness], deadline_s: float = 60.0
) -> tuple[Outcome, dict[int, Attempt]]:
    """Send attempts until they end, or the time does; read the witnesses all the while."""
    outcome, sent = Outcome(), {}
    deadline = time.monotonic() + deadline_s
    for count, attempt in enumerate(attempts):
        sent[attempt.number] = attempt
        for frame in attempt.frames:
            try:
                transmit(frame)
            except PermissionError:  # a rule of the pod's own namespace dropped it
                pass
            except OSError:  # too long or too short for the interface, or refused by the kernel
                outcome.refused_by_link += 1
                continue
            outcome.packets += 1
        if count % _BATCH == 0:
            for witness in witnesses.values():
                witness.drain()
            if time.monotonic() > deadline:
                break
    return outcome, sent


def settle(world: AttackWorld, witnesses: Mapping[str, Witness], tag: bytes, grace_s: float = _GRACE_S) -> None:
    """Wait until packets that must arrive have arrived everywhere after all that was sent, and a while longer.

    The nodes send them: a node always reaches its pods.
    """
    missing = dict.fromkeys(witnesses)
    for index, witness in enumerate(witnesses.values()):
        witness.arrived.pop(CONTROL + index, None)
    deadline = time.monotonic() + _PATIENCE_S
    while missing:
        assert time.monotonic() < deadline, f"no control packet arrived at {list(missing)}"
        for index, place in enumerate(witnesses):
            if place in missing:
                _send_control(world, place, tag + (CONTROL + index).to_bytes(4, "big"))
        time.sleep(0.02)
        for index, (place, witness) in enumerate(witnesses.items()):
            witness.drain()
            if CONTROL + index in witness.arrived:
                missing.pop(place, None)
    end = time.monotonic() + grace_s
    while time.monotonic() < end:
        time.sleep(0.05)
        for witness in witnesses.values():
            witness.drain()


def _send_control(world: AttackWorld, place: str, payload: bytes) -> None:
    if place == places.FABRIC:
        destination, source = "169.254.0.1", places.OUTSIDE
    else:
        destination = str(world.address(place, 4))
        far = place in (places.FAR, places.FAR_ISOLATED)
        source = "node:b" if far or place == "node:a" else "node:a"
    with world.lab.open_socket(source, socket.AF_INET, socket.SOCK_DGRAM) as sock, suppress(ConnectionRefusedError):
        sock.sendto(payload, (destination, _DISCARD))


def gather(outcome: Outcome, sent: Mapping[int, Attempt], witnesses: Mapping[str, Witness]) -> Outcome:
    """Put together what arrived where."""
    for place, witness in witnesses.items():
        for number, found in sorted(witness.arrived.items()):
            if not CONTROL <= number < CONTROL + 0x1_0000:
                outcome.arrivals.append(Arrival(place, sent.get(number, UNKNOWN), tuple(found)))
    return outcome


def fresh_tag() -> bytes:
    """Return a tag that no other run has: no part of an address, of a header or of another tag."""
    return b"\xa7" + os.urandom(TAG_BYTES - 1)
