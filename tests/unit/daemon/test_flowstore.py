# SPDX-License-Identifier: Apache-2.0
"""The flow index on disk: it comes back as it was, and what is damaged is unknown, never another's."""

from __future__ import annotations

import asyncio
import json
import stat
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enforcer_daemon.daemon import flowstore, slices
from enforcer_daemon.daemon.flowstore import FlowStore
from enforcer_daemon.datapath.flowindex import FIRST, FlowIndex
from enforcer_daemon.marks import MAX_INDEX
from enforcer_daemon.model import Direction, EvaluatedFlow, Identity, NamedPort, PodRef, Protocol
from tests.unit.datapath.test_flowindex import number


class Log:
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.errors: list[dict[str, Any]] = []

    def error(self, event: str, **details: object) -> None:
        self.errors.append({"event": event, **details})


PEER = Identity(
    PodRef("shop", "web"),
    (ip_address("10.0.0.9"), ip_address("fd00::9")),
    {"app": "wéb", "empty": ""},
    {"team": "a"},
    "node-b",
    "robot",
    "example.org",
    (NamedPort("http", 80, Protocol.TCP), NamedPort("dns", 53, Protocol.UDP)),
)


def entry(index: int, port: int = 80) -> tuple[int, EvaluatedFlow]:
    return index, EvaluatedFlow(Direction.EGRESS, PEER, ip_address("fd00::9"), port, Protocol.UDP)


def facts(flow: EvaluatedFlow | None) -> list[object]:
    """Return all that a flow states; identities are compared by object."""
    assert flow is not None
    identity = [getattr(flow.peer, name) for name in Identity.__slots__]
    return [flow.direction, flow.address, flow.port, flow.protocol, *identity]


def store(path: Path, log: Log | None = None) -> FlowStore:
    return FlowStore(path / "flows" / "one.jsonl", log or Log())  # type: ignore[arg-type]


def load(path: Path, log: Log | None = None, highest_in_use: int = 0) -> FlowIndex:
    return store(path, log).load(highest_in_use)


def test_what_was_appended_comes_back(tmp_path: Path) -> None:
    kept = store(tmp_path)
    assert len(kept.load(0)) == 0
    kept.append([entry(2)])
    kept.append([entry(3, 81), entry(4, 82)])

    found = load(tmp_path)

    assert [index for index, _ in found] == [2, 3, 4]
    assert facts(found.get(3)) == facts(entry(3, 81)[1])
    mode = (tmp_path / "flows" / "one.jsonl").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
    assert stat.S_IMODE((tmp_path / "flows").stat().st_mode) == 0o700


def test_a_removed_index_is_empty(tmp_path: Path) -> None:
    kept = store(tmp_path)
    kept.append([entry(2)])
    kept.remove()
    kept.remove()
    assert len(load(tmp_path)) == 0


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"index": 3}',
        b"\xff\xfe",
        json.dumps({"index": "x"}).encode(),
    ],
)
def test_a_damaged_line_is_unknown_and_said_so(tmp_path: Path, damage: bytes) -> None:
    log = Log()
    kept = store(tmp_path)
    kept.append([entry(2), entry(3), entry(4)])
    file = tmp_path / "flows" / "one.jsonl"
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join((lines[0], damage, *lines[2:])))

    found = load(tmp_path, log)

    assert [index for index, _ in found] == [2, 4]
    assert [error["line"] for error in log.errors] == [2]


@pytest.mark.parametrize("index", [-1, 0, FIRST - 1, MAX_INDEX + 1])
def test_an_index_that_no_peer_can_have_is_refused(tmp_path: Path, index: int) -> None:
    log = Log()
    store(tmp_path).append([entry(index)])
    assert len(load(tmp_path, log)) == 0
    assert len(log.errors) == 1


def test_an_entry_after_a_torn_line_is_kept(tmp_path: Path) -> None:
    store(tmp_path).append([entry(2), entry(3)])
    file = tmp_path / "flows" / "one.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    again = store(tmp_path)
    again.load(0)
    again.append([entry(4)])
    again.append([entry(5)])
    assert [index for index, _ in load(tmp_path)] == [2, 4, 5]


def test_an_index_whose_entry_was_lost_is_not_given_to_another_peer(tmp_path: Path) -> None:
    store(tmp_path).append([entry(2), entry(3)])
    file = tmp_path / "flows" / "one.jsonl"
    file.write_bytes(file.read_bytes().splitlines(keepends=True)[0])
    assert number(load(tmp_path, highest_in_use=3)) == 4
    file.unlink()
    assert number(load(tmp_path, highest_in_use=3)) == 4


def test_a_file_that_cannot_be_read_or_written_is_said_so(tmp_path: Path) -> None:
    log = Log()
    (tmp_path / "flows" / "one.jsonl").mkdir(parents=True)
    kept = store(tmp_path, log)
    assert len(kept.load(0)) == 0
    kept.append([entry(2)])
    assert [error["event"] for error in log.errors] == ["flow index unreadable", "flow index not written"]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_any_bytes_are_an_index_or_reported(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "flows").mkdir(exist_ok=True)
    (tmp_path / "flows" / "one.jsonl").write_bytes(content)
    log = Log()
    assert len(load(tmp_path, log)) + len(log.errors) == len(content.splitlines())


def test_a_later_line_replaces_an_entry_and_spare_lines_are_bounded(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(flowstore, "MAX_SPARE_LINES", 3)
    kept, path = store(tmp_path), tmp_path / "flows" / "one.jsonl"
    kept.append([entry(FIRST), entry(FIRST + 1)])
    index = load(tmp_path)
    for app in "abcd":
        relabelled = replace(PEER, labels={"app": app})
        kept.replace(index.replace_peer([FIRST], relabelled), index)
        (found, other) = (load(tmp_path).get(at) for at in (FIRST, FIRST + 1))
        assert found is not None
        assert other is not None
        assert (found.peer.labels, other.peer.labels) == ({"app": app}, PEER.labels)
        assert len(path.read_text().splitlines()) <= 2 + 3
    assert len(path.read_text().splitlines()) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_entries_that_are_added_while_the_file_is_written_anew_are_kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(flowstore, "MAX_SPARE_LINES", 3)
    kept, path = store(tmp_path), tmp_path / "flows" / "one.jsonl"
    kept.append([entry(FIRST + n, n) for n in range(200)])
    index = load(tmp_path)
    index.free(range(FIRST, FIRST + 150))

    async def compact() -> None:
        work = asyncio.ensure_future(kept.compact(index))
        await asyncio.sleep(0)
        kept.append([entry(FIRST + 300)])
        await work

    monkeypatch.setattr(slices, "SLICE_S", 0.0)
    asyncio.run(compact())
    assert len(path.read_text().splitlines()) == 51
    assert {at for at, _ in load(tmp_path)} == {*range(FIRST + 150, FIRST + 200), FIRST + 300}


def test_a_file_that_is_removed_while_it_is_written_anew_stays_removed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(flowstore, "MAX_SPARE_LINES", 3)
    monkeypatch.setattr(slices, "SLICE_S", 0.0)
    kept = store(tmp_path)
    kept.append([entry(FIRST)] * 100)
    index = load(tmp_path)

    async def compact() -> None:
        work = asyncio.ensure_future(kept.compact(index))
        await asyncio.sleep(0)
        kept.remove()
        kept.append([entry(FIRST)])
        await work

    asyncio.run(compact())
    assert list((tmp_path / "flows").iterdir()) == []
