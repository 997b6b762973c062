# SPDX-License-Identifier: Apache-2.0
"""Addresses of Services that are not virtual: told for each Service in the log and by Events, until it is resolved."""

from __future__ import annotations

from typing import Any

import structlog
from structlog.testing import capture_logs

from enforcer_daemon.daemon.announcements import Announcements
from enforcer_daemon.kube.ignored import WHOLE, IgnoredAddresses, IgnoredLog
from enforcer_daemon.telemetry.events import EventBook, EventKind, EventLimits

WEB, DB = ("shop", "web"), ("shop", "db")
ADDRESS = b"\xcb\x00\x71\x01"


def log_of(ignored: IgnoredAddresses) -> IgnoredLog:
    return IgnoredLog(ignored, structlog.get_logger(), 0.0)


def lines(captured: list[Any]) -> list[tuple[str, str, str]]:
    return [(line["log_level"], line["service"], line.get("problem", "")) for line in captured]


def test_each_service_is_logged_once_and_when_it_is_resolved() -> None:
    ignored = IgnoredAddresses()
    log = log_of(ignored)
    with capture_logs() as captured:
        ignored.put(WEB, ADDRESS, "why")
        ignored.put(DB, WHOLE, "too many")
        log.follow(0.0)
        log.follow(1.0)
        ignored.put(WEB, ADDRESS, "")
        ignored.put(WEB, ADDRESS, "")
        log.follow(2.0)
        ignored.drop(DB)
        log.follow(3.0)
    assert lines(captured) == [
        ("warning", "shop/web", "203.0.113.1 is not virtual: why"),
        ("warning", "shop/db", "not all is virtual: too many"),
        ("info", "shop/web", ""),
        ("info", "shop/db", ""),
    ]
    assert (len(ignored), ignored.of(WEB), ignored.told(9)) == (0, "", {})


def test_a_tenant_that_changes_services_without_end_does_not_fill_the_log() -> None:
    ignored = IgnoredAddresses()
    log = log_of(ignored)
    with capture_logs() as captured:
        for number in range(1_000):
            ignored.put(WEB, ADDRESS, f"why {number}")
            log.follow(number / 1_000)
    assert len(captured) < 70


def test_more_services_than_are_told_are_not_called_resolved() -> None:
    ignored = IgnoredAddresses()
    log = log_of(ignored)
    with capture_logs() as captured:
        for number in range(300):
            ignored.put(("shop", f"s{number:03}"), ADDRESS, "why")
            log.follow(float(number))
    assert len(log.told) == 256
    assert {level for level, _, _ in lines(captured)} == {"warning"}


def test_an_event_regards_the_service() -> None:
    book = EventBook(EventLimits(), lambda: 0.0)
    announcements = Announcements(book)
    for _ in range(3):
        announcements.note_ignored_addresses([(WEB, "u-1", "203.0.113.1 is not virtual: why"), (DB, "u-2", "why")])
    series = book.take_due()
    assert [(found.notice.subject.name, found.notice.subject.uid, found.count) for found in series] == [
        ("web", "u-1", 1),
        ("db", "u-2", 1),
    ]
    assert {(found.notice.kind, found.notice.is_shared) for found in series} == {(EventKind.ADDRESS_NOT_VIRTUAL, True)}
