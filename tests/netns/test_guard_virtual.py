# SPDX-License-Identifier: Apache-2.0
"""What Services make virtual, in the guard's real tables: elements come and go, no table is made anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

import pytest

from enforcer_daemon.dataplane.guard import Guard
from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.dataplane.tools import run_in
from enforcer_daemon.model import Protocol
from enforcer_daemon.virtual import ServicePort, VirtualChange, VirtualEntries
from tests.netns.lab import Lab, open_lab

pytestmark = pytest.mark.kernel

T = TypeVar("T")
TABLES = ("netdev", "inet")
PORTS = frozenset({(Protocol.TCP, 30080), (Protocol.UDP, 30053)})


def on_80(*texts: str) -> frozenset[ServicePort]:
    return frozenset((ip_address(text).packed, Protocol.TCP, 80) for text in texts)


FIRST = VirtualEntries(
    on_80("203.0.113.1", "203.0.113.2", "2001:db8::1"),
    frozenset(ip_address(text).packed for text in ("192.0.2.1", "2001:db8:1::1")),
    PORTS,
)
SECOND = VirtualEntries(on_80("203.0.113.9"))


@pytest.fixture
def lab() -> Iterator[Lab]:
    with open_lab() as lab:
        yield lab


def act(lab: Lab, change: Callable[[], T]) -> T:
    return open_in(lab.node, change)


def listed(lab: Lab, family: str) -> dict[str, set[str]]:
    """Return the elements of the sets, each as nft shows it."""
    shown = json.loads(run_in(lab.node, ("nft", "-j", "list", "sets", family)))["nftables"]
    return {
        entry["set"]["name"]: {_text(element) for element in entry["set"].get("elem", ())}
        for entry in shown
        if "set" in entry and entry["set"]["table"] == "trireme_guard"
    }


def _text(element: Any) -> str:
    return (
        " . ".join(map(str, element["concat"])) if isinstance(element, dict) and "concat" in element else str(element)
    )


def handles(lab: Lab) -> list[str]:
    shown = json.loads(run_in(lab.node, ("nft", "-j", "list", "tables")))["nftables"]
    return [entry["table"]["handle"] for entry in shown if "table" in entry]


def test_a_change_adds_and_deletes_its_elements_and_nothing_else(lab: Lab) -> None:
    guard = Guard([ip_network("10.0.0.0/8")])
    act(lab, lambda: guard.change_virtual(VirtualChange(FIRST)))
    act(lab, lambda: guard.replace([]))  # The first table has what came before it.
    made = handles(lab)
    for family in TABLES:
        found = listed(lab, family)
        assert found["services4"] == {"203.0.113.1 . tcp . 80", "203.0.113.2 . tcp . 80"}
        assert (found["services6"], found["nodes4"], found["nodes6"]) == (
            {"2001:db8::1 . tcp . 80"},
            {"192.0.2.1"},
            {"2001:db8:1::1"},
        )
        assert found["nodeports"] == {"tcp . 30080", "udp . 30053"}
    act(lab, lambda: guard.change_virtual(VirtualChange(SECOND, FIRST)))
    assert handles(lab) == made
    for family in TABLES:
        found = listed(lab, family)
        assert found["services4"] == {"203.0.113.9 . tcp . 80"}
        assert not (found["services6"] | found["nodes4"] | found["nodes6"] | found["nodeports"])


def test_what_is_there_or_gone_already_is_no_error(lab: Lab) -> None:
    guard = Guard()
    act(lab, lambda: guard.replace([]))
    for _ in range(2):
        act(lab, lambda: guard.change_virtual(VirtualChange(FIRST)))
    made = handles(lab)
    for _ in range(2):
        act(lab, lambda: guard.change_virtual(VirtualChange(removed=FIRST)))
    assert handles(lab) == made
    assert not listed(lab, "netdev")["services4"]


def test_a_change_brings_back_tables_that_somebody_emptied(lab: Lab) -> None:
    guard = Guard()
    act(lab, lambda: guard.replace([]))
    act(lab, lambda: guard.change_virtual(VirtualChange(FIRST)))
    run_in(lab.node, ("nft", "flush", "ruleset"))
    act(lab, lambda: guard.change_virtual(VirtualChange(SECOND)))
    assert listed(lab, "netdev")["services4"] == {f"203.0.113.{number} . tcp . 80" for number in (1, 2, 9)}


def test_very_many_addresses_are_one_transaction(lab: Lab) -> None:
    guard = Guard()
    act(lab, lambda: guard.replace([]))
    many = frozenset(((0xCB00_0000 + number).to_bytes(4, "big"), Protocol.TCP, 80) for number in range(16_384))
    act(lab, lambda: guard.change_virtual(VirtualChange(VirtualEntries(many))))
    act(lab, lambda: guard.change_virtual(VirtualChange(removed=VirtualEntries(frozenset(sorted(many)[:256])))))
    assert len(listed(lab, "netdev")["services4"]) == 16_384 - 256
