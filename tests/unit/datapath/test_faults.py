# SPDX-License-Identifier: Apache-2.0
"""Every packet of a conversation lost, late or twice, and every two of them lost: both ends hear all, in bounded time.

In both directions and families, whichever end speaks first, with the proof beside the kernel's ACK or on its own.
"""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from functools import cache

import pytest

from enforcer_daemon.identity.authority import make_authority
from tests.unit.datapath.kernels import Faults, Form, converse
from tests.unit.datapath.pair import TIMESTAMPS, WALL, Endpoint, Node

AUTHORITY = make_authority("cluster.local", datetime.fromtimestamp(WALL, UTC))
ADDRESSES = {4: ("10.1.0.2", "10.2.0.2"), 6: ("fd00::1:2", "fd00::2:2")}
OPTIONS = {"room": TIMESTAMPS, "crowded": TIMESTAMPS * 2}
WORDS = {"client": (b"hello", b""), "server": (b"", b"welcome"), "both": (b"hello", b"welcome")}
POSITIONS = [(sender, number) for sender in ("client", "server") for number in range(1, 6)]
LOST, TWICE, LATE, VERY_LATE = (), (0.0, 0.0), (0.004,), (0.15,)
SYN, ANSWER, PROOF = ("client", 1), ("server", 1), ("client", 2)
OPENING_S, DATA_S = 1.0, 0.2
"""After which a kernel repeats a SYN, and data."""
SOON_S = 0.05

versions = pytest.mark.parametrize("version", ADDRESSES, ids=["ipv4", "ipv6"])
forms = pytest.mark.parametrize(
    "form",
    [
        pytest.param(Form(*words, options, at_once), id=f"{first}-{room}-{'ack' if at_once else 'data'}-first")
        for first, words in WORDS.items()
        for room, options in OPTIONS.items()
        for at_once in (True, False)
    ],
)


@cache
def known_ends(version: int) -> tuple[Endpoint, Endpoint]:
    """Make a client and a server on two nodes; signatures take longer than all else here."""
    client, server = ADDRESSES[version]
    return (
        Node("node-1", AUTHORITY, 1).endpoint("client", client, "client"),
        Node("node-2", AUTHORITY, 2).endpoint("server", server, "server"),
    )


def make_ends(version: int) -> tuple[Endpoint, Endpoint]:
    """Make a client and a server whose enforcers know nothing of one another but their identities."""
    client, server = known_ends(version)
    client.forget_round_trip(server)
    server.forget_round_trip(client)
    return client.begun_anew(), server.begun_anew()


def took(version: int, form: Form, faults: Faults) -> float:
    took_s = converse(*make_ends(version), form, faults)
    assert took_s is not None, f"never, with {faults}"
    return took_s


@versions
@forms
def test_without_faults(version: int, form: Form) -> None:
    assert took(version, form, {}) <= (0.01 if form.acks_at_once or form.client_says else SOON_S)


@versions
@forms
def test_each_packet_lost(version: int, form: Form) -> None:
    # A silent client that does not acknowledge at once first does so when the SYN-ACK was repeated, which is done once.
    slow = (SYN,) if form.acks_at_once or form.client_says else (SYN, PROOF)
    for position in POSITIONS:
        limit_s = OPENING_S + SOON_S if position in slow else DATA_S + 2 * SOON_S
        assert took(version, form, {position: LOST}) <= limit_s, position


@versions
@forms
@pytest.mark.parametrize("fault", [TWICE, LATE, VERY_LATE], ids=["twice", "late", "very late"])
def test_each_packet_late_or_twice(version: int, form: Form, fault: tuple[float, ...]) -> None:
    for position in POSITIONS:
        assert took(version, form, {position: fault}) <= DATA_S + 2 * SOON_S, position


@versions
@forms
def test_every_two_packets_lost(version: int, form: Form) -> None:
    for pair in itertools.combinations(POSITIONS, 2):
        assert took(version, form, dict.fromkeys(pair, LOST)) <= 3 * OPENING_S + DATA_S + SOON_S, pair


@versions
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("lost", [ANSWER, PROOF], ids=["the SYN-ACK", "the proof"])
def test_a_lost_answer_or_proof_is_made_good_soon(
    version: int, words: tuple[bytes, bytes], lost: tuple[str, int]
) -> None:
    assert took(version, Form(*words, TIMESTAMPS), {lost: LOST}) <= SOON_S
