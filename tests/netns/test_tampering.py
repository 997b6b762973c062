# SPDX-License-Identifier: Apache-2.0
"""Somebody takes our rules away: it is noticed without comparing them, and what was there comes back."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.dataplane.guard import Guard
from enforcer_daemon.dataplane.guard_rules import GuardedEndpoint
from enforcer_daemon.dataplane.netns import new_netns, open_in
from enforcer_daemon.dataplane.ruleset import EndpointRules
from enforcer_daemon.dataplane.tools import run, run_in
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import AttachmentId
from tests.netns.lab import BACKENDS, LIMITS, QUEUE

pytestmark = [pytest.mark.kernel, pytest.mark.stock_kernel]

ENDPOINT = GuardedEndpoint(AttachmentId("c1", "eth0"), (ip_address("10.77.0.2"), ip_address("fd77::2")), ())
FLUSHES = {"iptables-nft": ("nft", "flush", "ruleset"), "iptables-legacy": ("iptables-legacy", "-t", "mangle", "-F")}


@pytest.fixture
def netns() -> Iterator[int]:
    fd = new_netns()
    yield fd
    os.close(fd)


def listed() -> str:
    """Return the guard's table, without the seconds that a fresh address has left: they pass meanwhile."""
    text = run(("nft", "-s", "list", "table", "inet", "trireme_guard"))
    return re.sub(r"timeout [0-9dhms]+", "timeout LEFT", text)


@pytest.mark.parametrize(
    "command",
    [
        "flush ruleset",
        "delete table inet trireme_guard",
        "delete table netdev trireme_guard",
        "delete table bridge trireme_guard",
        "flush chain inet trireme_guard leaving",
        "flush chain bridge trireme_guard switched",
        "flush table inet trireme_guard",
        "flush table netdev trireme_guard",
        "flush chain inet trireme_guard masqueraded",
    ],
)
def test_a_guard_that_somebody_removed_comes_back(netns: int, command: str) -> None:
    def story() -> None:
        guard = Guard()
        guard.replace([ENDPOINT])
        before = listed()
        assert not guard.restore()
        run(("nft", *command.split()))
        assert guard.restore()
        assert listed() == before
        assert run(("nft", "list", "chain", "netdev", "trireme_guard", "sent"))
        assert not guard.restore()

    open_in(netns, story)


def test_other_peoples_rules_do_not_concern_the_guard(netns: int) -> None:
    def story() -> None:
        guard = Guard()
        assert not guard.restore()  # before it was put in place there is nothing to put back
        guard.replace([ENDPOINT])
        run(("nft", "-f", "-"), "add table inet other\nadd chain inet other c\nadd rule inet other c accept\n")
        assert not guard.restore()
        guard.remove_tables()
        assert not guard.restore()

    open_in(netns, story)


def test_a_guard_that_was_removed_right_after_a_change_comes_back(netns: int) -> None:
    def story() -> None:
        guard = Guard()
        guard.replace([ENDPOINT])
        run(("nft", "flush", "ruleset"))
        guard._note()  # as if the flush had come between our change and our look at it
        assert guard.restore()
        assert "trireme_guard" in listed()

    open_in(netns, story)


@pytest.mark.parametrize("name", FLUSHES)
def test_a_change_of_a_pods_rules_is_noticed(netns: int, name: str) -> None:
    backend, rules = BACKENDS[name](), EndpointRules(("eth0",), QUEUE, frozenset(), LIMITS)
    backend.apply(netns, rules)
    watch = backend.watch(netns)
    try:
        watch.note()
        assert not watch.is_touched()
        run_in(netns, FLUSHES[name])
        assert watch.is_touched()
        assert not backend.is_intact(netns, rules)
        backend.apply(netns, rules)
        watch.note()
        assert not watch.is_touched()
    finally:
        watch.close()


def test_a_watch_does_not_keep_a_descriptor(netns: int) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for name in BACKENDS:
        backend = BACKENDS[name]()
        backend.apply(netns, EndpointRules(("eth0",), QUEUE, frozenset(), LIMITS))
        watch = backend.watch(netns)
        watch.note()
        watch.close()
        with pytest.raises((DataplaneError, OSError)):
            watch.is_touched()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
