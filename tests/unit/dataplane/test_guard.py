# SPDX-License-Identifier: Apache-2.0
"""The guard's table as text."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from enforcer_daemon.dataplane.guard import GuardedEndpoint, render_apply, render_remove, render_replace
from enforcer_daemon.model import AttachmentId, Protocol
from enforcer_daemon.policy.evaluate import AddressRule

WEB = GuardedEndpoint(
    AttachmentId("c1", "eth0"),
    (ip_address("10.0.0.5"), ip_address("fd00::5")),
    (
        AddressRule(
            ip_network("10.0.0.0/8"), (ip_network("10.1.0.0/16"), ip_network("10.1.2.0/24")), Protocol.TCP, (80, 90)
        ),
        AddressRule(ip_network("fd00::/8")),
        AddressRule(protocol=Protocol.UDP),
    ),
)


def contents(text: str) -> list[str]:
    """Give what follows the name of the endpoint's chain."""
    return [line.split(" ", 5)[5] for line in text.splitlines() if line.startswith("add rule")]


def test_an_endpoint_ends_with_a_counted_drop() -> None:
    assert contents(render_apply(None, WEB)) == [
        "meta length >= 201 tcp flags & (fin | syn | rst | ack) == syn accept",
        "ct original ip saddr 10.0.0.5 accept",
        "ct original ip6 saddr fd00::5 accept",
        "ct original ip saddr 10.0.0.0/8 ct original ip saddr != { 10.1.0.0/16 } meta l4proto 6 th dport 80-90 accept",
        "ct original ip6 saddr fd00::/8 accept",
        "meta l4proto 17 accept",
        "counter drop",
    ]


def test_only_addresses_that_changed_are_touched() -> None:
    moved = GuardedEndpoint(WEB.attachment, (ip_address("fd00::5"), ip_address("10.0.0.6")), ())
    elements = [line for line in render_apply(WEB, moved).splitlines() if "element" in line]
    assert elements[0] == "delete element inet trireme_guard endpoints4 { 10.0.0.5 }"
    assert elements[1].startswith("add element inet trireme_guard endpoints4 { 10.0.0.6 : goto endpoint_")
    assert len(elements) == 2


def test_remove_takes_the_addresses_before_the_chain_they_lead_to() -> None:
    lines = [line.split()[:2] for line in render_remove(WEB).splitlines()]
    assert lines == [["delete", "element"]] * 2 + [["flush", "chain"], ["delete", "chain"]]


def test_replace_begins_with_nothing() -> None:
    lines = render_replace(()).splitlines()
    assert lines[:3] == [f"{verb} table inet trireme_guard" for verb in ("add", "delete", "add")]
