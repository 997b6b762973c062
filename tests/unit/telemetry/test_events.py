# SPDX-License-Identifier: Apache-2.0
"""What becomes an Event and when: series, their counts, and the limits of all."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from enforcer_daemon.datapath.context import FlowReport
from enforcer_daemon.model import Direction, Identity, PodRef, RuleRef
from enforcer_daemon.reasons import Reason
from enforcer_daemon.telemetry.events import (
    END_S,
    MAX_SERIES,
    MAX_SERIES_PER_SUBJECT,
    EventBook,
    EventKind,
    EventLimits,
    Notice,
    Subject,
    denial_note,
    note_denial,
)

PEER = Identity(PodRef("shop", "web"), (), {}, {}, "node-1")
WIDE = EventLimits(max_per_minute=60_000.0, max_per_minute_per_object=60_000.0, update_interval_s=60.0)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def subject(number: int = 0, namespace: str = "shop") -> Subject:
    return Subject("v1", "Pod", namespace, f"db-{number}", f"u-{number}")


def note(book: EventBook, what: object = "this", number: int = 0, namespace: str = "shop") -> None:
    who = subject(number, namespace)
    book.note(who, what, lambda: Notice(who, EventKind.FLOW_DENIED, "text"))


def book_with(limits: EventLimits = WIDE) -> tuple[EventBook, Clock]:
    clock = Clock()
    return EventBook(limits, clock), clock


def test_the_same_again_is_one_series_whose_count_is_told_every_so_often() -> None:
    book, clock = book_with()
    note(book)
    (first,) = book.take_due()
    assert (first.count, first.first_at) == (1, 1000.0)
    for _ in range(4):
        note(book)
    assert book.take_due() == []
    clock.now += WIDE.update_interval_s
    assert [series.count for series in book.take_due()] == [5]
    clock.now += WIDE.update_interval_s
    assert book.take_due() == []


def test_a_series_ends_after_a_silence_and_the_next_is_another() -> None:
    book, clock = book_with()
    note(book)
    (first,) = book.take_due()
    clock.now += END_S
    assert book.take_due() == []
    assert len(book) == 0
    note(book)
    (second,) = book.take_due()
    assert second is not first
    assert second.count == 1


def test_a_state_is_no_repetition_and_does_not_end_while_it_lasts() -> None:
    book, clock = book_with()
    who = subject()
    for _ in range(10):
        book.note_state(who, "this", lambda: Notice(who, EventKind.IDENTITY_TOO_LARGE, "text"))
        book.take_due()
        clock.now += END_S - 1
    assert [series.count for series in book._series] == [1]


def test_one_object_and_all_of_them_have_so_many_series() -> None:
    book, _ = book_with()
    for what in range(MAX_SERIES_PER_SUBJECT + 3):
        note(book, what)
    assert (len(book), book.limited) == (MAX_SERIES_PER_SUBJECT, 3)
    for number in range(1, 200):
        for what in range(MAX_SERIES_PER_SUBJECT):
            note(book, what, number)
    assert len(book) == MAX_SERIES
    composed: list[int] = []
    book.note(subject(999), "this", lambda: composed.append(1) or Notice(subject(999), EventKind.FLOW_DENIED, ""))  # type: ignore[func-returns-value]
    assert composed == []  # What finds no room costs no more than a look.


def test_an_objects_allowance_leaves_others_theirs() -> None:
    book, clock = book_with(EventLimits(max_per_minute=6.0, max_per_minute_per_object=2.0, update_interval_s=1.0))
    for what in range(10):
        note(book, what)
    note(book, number=1)
    due = book.take_due()
    assert [series.notice.subject.name for series in due] == ["db-0", "db-0", "db-1"]
    clock.now += 30.0
    assert len(book.take_due()) == 1  # Half a minute's share of two.


def test_the_nodes_allowance_bounds_all() -> None:
    book, clock = book_with(EventLimits(max_per_minute=6.0, max_per_minute_per_object=2.0, update_interval_s=1.0))
    for number in range(20):
        note(book, number=number)
    assert len(book.take_due()) == 6
    clock.now += 10.0
    assert len(book.take_due()) == 1
    clock.now += 3 * END_S
    assert book.limited == 0
    due = book.take_due()
    assert (len(due), len(book), book.limited) == (0, 0, 13)  # Never told, and counted as that.


def test_the_rate_limiters_of_objects_go_with_their_series() -> None:
    book, clock = book_with()
    for number in range(50):
        note(book, number=number)
    book.take_due()
    clock.now += END_S
    book.take_due()
    assert (book._by_subject, book._counts) == ({}, {})


def report(remote: bytes = b"\x0a\0\0\1", peer: Identity | None = PEER, port: int | None = 80) -> FlowReport:
    rules = (RuleRef("shop", "deny", None), RuleRef("shop", "deny", 1), RuleRef("shop", "more", 0))
    return FlowReport(False, Reason.INGRESS_DENIED, Direction.INGRESS, 6, remote, port, peer, rules, "why")


def test_denials_of_one_peer_for_one_reason_are_one_series() -> None:
    book, _ = book_with()
    note_denial(book, subject(), report())
    note_denial(book, subject(), report(port=81))
    note_denial(book, subject(), report(remote=b"\x0a\0\0\2"))
    note_denial(book, subject(), report(peer=None))
    note_denial(book, subject(), report()._replace(direction=Direction.EGRESS))
    note_denial(book, subject(), report()._replace(reason=Reason.PROOF_INVALID))
    assert [series.count for series in book.take_due()] == [3, 1, 1, 1]


@pytest.mark.parametrize(
    ("denied", "text"),
    [
        (
            report()._replace(detail=""),
            "ingress-denied: ingress from shop/web (10.0.0.1), TCP port 80, denied; decided by shop/deny, shop/more",
        ),
        (
            report(peer=None, port=None)._replace(protocol=1, direction=Direction.EGRESS, rules=(), detail=""),
            "ingress-denied: egress to 10.0.0.1, ICMP, denied",
        ),
        (
            report(remote=b"", peer=None)._replace(protocol=47, rules=(), detail=""),
            "ingress-denied: ingress from an unreadable address, protocol 47 port 80, denied",
        ),
    ],
)
def test_a_note_names_peer_port_protocol_policies_and_reason(denied: FlowReport, text: str) -> None:
    assert denial_note(denied) == text


def test_a_note_names_not_more_policies_than_have_room() -> None:
    many = report()._replace(rules=tuple(RuleRef("x", f"p{number}") for number in range(30)), detail="")
    assert denial_note(many).endswith("x/p9 and 20 more")


def test_a_note_ends_with_what_else_is_known() -> None:
    assert denial_note(report()).endswith("; why")


def test_a_namespace_that_fills_the_table_makes_room_for_another() -> None:
    book, clock = book_with(EventLimits(max_per_minute=60.0, max_per_minute_per_object=60.0, update_interval_s=1.0))
    for number in range(MAX_SERIES):
        note(book, number=number, namespace="tenant")
    for number in range(8):
        note(book, number=number, namespace="shop")
    assert len(book) == MAX_SERIES
    assert book.limited == 8
    namespaces = [series.notice.subject.namespace for series in book.take_due()]
    assert namespaces.count("shop") == 8
    note(book, number=MAX_SERIES, namespace="tenant")  # It still has most, so nothing gives way to it.
    assert book.limited == 9
    assert sum(book._counts.values()) == MAX_SERIES
    clock.now += 2 * END_S
    book.take_due()
    assert (len(book), book._counts, book._told_at) == (0, {}, {})


def test_namespaces_take_turns_in_what_is_told() -> None:
    book, clock = book_with(EventLimits(max_per_minute=6.0, max_per_minute_per_object=6.0, update_interval_s=1.0))
    for number in range(40):
        note(book, number=number, namespace="tenant")
    assert len(book.take_due()) == 6
    note(book, namespace="shop")
    note(book, namespace="web")
    clock.now += 20.0  # Two more may be told.
    assert [series.notice.subject.namespace for series in book.take_due()] == ["shop", "web"]
