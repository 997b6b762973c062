# SPDX-License-Identifier: Apache-2.0
"""Events as the API server gets them: what it would refuse of them, series, and a server that is away."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from enforcer_daemon.kube.client import ClusterApi
from enforcer_daemon.kube.events import EventSender
from enforcer_daemon.telemetry.events import EventBook, EventKind, EventLimits, Notice, Subject
from enforcer_daemon.telemetry.metrics import Metrics
from tests.kube.api import FakeApi

POD = Subject("v1", "Pod", "shop", "db", "u-1")
NODE = Subject("v1", "Node", "", "node-1", "node-1")
WIDE = EventLimits(max_per_minute=60_000.0, max_per_minute_per_object=60_000.0, update_interval_s=60.0)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Told:
    """A sender with its book and clock, and what it counted."""

    def __init__(self, cluster: ClusterApi, node: str) -> None:
        self.clock, self.metrics = Clock(), Metrics()
        self.book = EventBook(WIDE, self.clock)
        self._sender = EventSender(cluster, self.book, node, structlog.get_logger(), self.metrics)

    async def note(self, subject: Subject = POD, note: str = "why", *, is_shared: bool = False) -> None:
        notice = Notice(subject, EventKind.FLOW_DENIED, note, is_shared)
        self.book.note(subject, note, lambda: notice)
        await self.send()

    async def send(self) -> None:
        await self._sender.send_due()

    def counts(self) -> tuple[float | None, float | None]:
        name = "trireme_kubernetes_events_total"
        value = self.metrics.registry.get_sample_value
        return value(name, {"result": "sent"}), value(name, {"result": "failed"})


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with FakeApi() as api:
        yield api


def run(api: FakeApi, tmp_path: Path, work: Callable[[Callable[[str], Told]], Awaitable[None]]) -> None:
    async def main() -> None:
        config = api.write_kubeconfig(tmp_path / "kubeconfig")
        cluster = ClusterApi(config, tmp_path / "scratch")
        await cluster.open()
        try:
            await work(lambda node: Told(cluster, node))
        finally:
            await cluster.close()

    asyncio.run(main())


def events(api: FakeApi) -> list[dict[str, Any]]:
    return api.all("Event")


def test_an_event_has_what_the_api_requires(api: FakeApi, tmp_path: Path) -> None:
    async def work(start: Callable[[str], Told]) -> None:
        told = start("node-1")
        await told.note()
        await told.note(NODE, "x" + "\u00e4" * 2000)

    run(api, tmp_path, work)
    of_pod, of_node = sorted(events(api), key=lambda event: str(event["regarding"]["kind"]), reverse=True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", of_pod["eventTime"])
    assert {key: of_pod[key] for key in ("reportingController", "reportingInstance", "type", "reason", "action")} == {
        "reportingController": "trireme.io/enforcer",
        "reportingInstance": "node-1",
        "type": "Warning",
        "reason": "FlowDenied",
        "action": "Deny",
    }
    assert of_pod["regarding"] == {
        "apiVersion": "v1", "kind": "Pod", "namespace": "shop", "name": "db", "uid": "u-1",
    }  # fmt: skip
    assert (of_pod["metadata"]["namespace"], of_node["metadata"]["namespace"]) == ("shop", "default")
    assert (of_pod["note"], "series" in of_pod) == ("why", False)
    assert len(of_node["note"].encode()) == 1023  # Cut between characters of two bytes.
    assert "namespace" not in of_node["regarding"]


def test_repetitions_change_the_series_and_nothing_else(api: FakeApi, tmp_path: Path) -> None:
    async def work(start: Callable[[str], Told]) -> None:
        told = start("node-1")
        await told.note()
        (before,) = events(api)
        await told.note()
        told.clock.now += WIDE.update_interval_s
        await told.note()
        (after,) = events(api)
        series = after.pop("series")
        before["metadata"].pop("resourceVersion")
        after["metadata"].pop("resourceVersion")
        assert (after, series["count"]) == (before, 3)
        assert series["lastObservedTime"] > before["eventTime"]
        assert told.counts() == (2, 0)

    run(api, tmp_path, work)


def test_an_event_that_has_ended_begins_anew(api: FakeApi, tmp_path: Path) -> None:
    async def work(start: Callable[[str], Told]) -> None:
        told = start("node-1")
        await told.note()
        (before,) = events(api)
        await asyncio.to_thread(api.delete, "Event", "shop", before["metadata"]["name"])
        told.clock.now += WIDE.update_interval_s
        await told.note()
        (after,) = events(api)
        assert after["metadata"]["name"] != before["metadata"]["name"]
        assert after["series"]["count"] == 2

    run(api, tmp_path, work)


def test_what_all_nodes_see_is_one_event(api: FakeApi, tmp_path: Path) -> None:
    async def work(start: Callable[[str], Told]) -> None:
        nodes = [start(f"node-{number}") for number in range(3)]
        for told in nodes:
            await told.note(is_shared=True)
        assert len(events(api)) == 1
        assert [told.counts() for told in nodes] == [(1, 0)] * 3
        for told in nodes:
            await told.note(note="of this node")
        assert len(events(api)) == 4

    run(api, tmp_path, work)


def test_without_the_api_server_events_are_dropped_and_counted(api: FakeApi, tmp_path: Path) -> None:
    async def work(start: Callable[[str], Told]) -> None:
        told = start("node-1")
        with api.away():
            for _ in range(5):
                await told.note()
        assert told.counts() == (0, 1)  # One attempt in all that time.
        await told.send()
        assert events(api) == []
        told.clock.now += WIDE.update_interval_s
        await told.note()
        assert [event["series"]["count"] for event in events(api)] == [6]

    run(api, tmp_path, work)


def test_a_refusal_is_counted_and_harms_nothing(api: FakeApi, tmp_path: Path) -> None:
    async def work(start: Callable[[str], Told]) -> None:
        told = start("node-1")
        api.faults = lambda _: 403
        await told.note()
        await told.note(note="more")
        assert told.counts() == (0, 2)

    run(api, tmp_path, work)
