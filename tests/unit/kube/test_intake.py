# SPDX-License-Identifier: Apache-2.0
"""Objects that wait to be decoded: the last version of each, each namespace by itself; policies kept as bytes."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer_daemon.kube import intake as module
from enforcer_daemon.kube.intake import Intake
from enforcer_daemon.kube.jsonlists import members
from enforcer_daemon.kube.resources import NETWORK_POLICIES, PODS
from enforcer_daemon.kube.table import Entry, Table, read_entry
from enforcer_daemon.policy import NetworkPolicy
from enforcer_daemon.sources.turns import Turns


def event(name: str, namespace: str = "x", **spec: object) -> bytes:
    metadata = {"name": name, "namespace": namespace}
    return json.dumps({"type": "MODIFIED", "object": {"metadata": metadata, "spec": spec}}).encode()


class Desk:
    """An intake with one table, whose reading of chosen namespaces can be held up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.table: Table[Any] = Table(NETWORK_POLICIES)
        self.changed = asyncio.Event()
        self.turns = Turns()
        self.intake = Intake(self.turns, self.changed.set)
        self.read: list[str] = []
        self.gates: dict[str, threading.Event] = {}
        whole = module._read

        def read(table: Table[Any], key: tuple[str, str], line: bytes) -> Any:
            if gate := self.gates.get(key[0]):
                assert gate.wait(10)
            self.read.append(key[1])
            return whole(table, key, line)

        monkeypatch.setattr(module, "_read", read)

    def put(self, name: str, namespace: str = "x", **spec: object) -> None:
        self.intake.put(self.table, (namespace, name), event(name, namespace, **spec))

    async def settle(self) -> None:
        async with asyncio.timeout(10):
            while self.intake._waiting:  # noqa: ASYNC110 - all of it, whatever it is
                await asyncio.sleep(0.001)

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *_: object) -> None:
        for gate in self.gates.values():
            gate.set()
        self.intake.close()
        self.turns.close()


def test_of_several_versions_the_last_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        with Desk(monkeypatch) as desk:
            gate = desk.gates["x"] = threading.Event()
            desk.put("first")
            await asyncio.sleep(0)
            for port in range(50):
                desk.put("busy", ingress=[{"ports": [{"port": 1 + port}]}])
            desk.put("gone")
            desk.intake.put(desk.table, ("x", "gone"), None)
            gate.set()
            await desk.settle()
            assert desk.read == ["first", "busy"]
            assert b'"port":50' in desk.table.entries["x", "busy"].document
            assert ("x", "gone") not in desk.table.entries

    asyncio.run(work())


def test_a_namespace_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        with Desk(monkeypatch) as desk:
            desk.gates["slow"] = threading.Event()
            desk.put("p", "slow")
            desk.put("p", "quick")
            async with asyncio.timeout(10):
                await desk.changed.wait()
            assert list(desk.table.entries) == [("quick", "p")]

    asyncio.run(work())


def test_what_came_before_a_list_does_not_replace_what_was_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        with Desk(monkeypatch) as desk:
            gate = desk.gates["x"] = threading.Event()
            desk.put("read", policyTypes=["Egress"])
            desk.put("waits")
            await asyncio.sleep(0.01)
            desk.intake.drop(desk.table)
            listed = read_entry(NETWORK_POLICIES, json.loads(event("read"))["object"], {})
            desk.table.replace([listed])
            gate.set()
            await desk.settle()
            assert list(desk.table.entries) == [("x", "read")]
            assert b"Egress" not in desk.table.entries["x", "read"].document

    asyncio.run(work())


def test_a_policy_that_was_taken_unseen_is_checked_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        with Desk(monkeypatch) as desk:
            manifest = json.loads(event("bad", policyTypes=["Sideways"]))["object"]
            entry = read_entry(NETWORK_POLICIES, manifest, {}, is_decoded=False)
            assert isinstance(entry, Entry)
            desk.table.replace([entry])
            assert desk.table.problems() == ()
            assert desk.table.values()[0].load().ingress == ()  # Meanwhile it isolates.
            desk.intake.check(desk.table, ("x", "bad"))
            await desk.settle()
            assert "Sideways" in desk.table.problems()[0].message

    asyncio.run(work())


def test_a_good_policy_that_is_checked_is_not_kept_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        with Desk(monkeypatch) as desk:
            entry = read_entry(NETWORK_POLICIES, json.loads(event("good"))["object"], {}, is_decoded=False)
            desk.table.replace([entry])
            desk.intake.check(desk.table, ("x", "good"))
            await desk.settle()
            assert desk.table.values()[0].policy is None

    asyncio.run(work())


def test_so_many_bytes_are_decoded_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_BYTES", 100)

    async def work() -> None:
        with Desk(monkeypatch) as desk:
            manifests = [json.loads(event(f"p{number}"))["object"] for number in range(4)]
            desk.table.replace([read_entry(NETWORK_POLICIES, each, {}, is_decoded=False) for each in manifests])
            goes: list[int] = []
            read_all = module._read_all

            def count(batch: list[Any]) -> list[Any]:
                goes.append(len(batch))
                return read_all(batch)

            monkeypatch.setattr(module, "_read_all", count)
            for number in range(4):
                desk.intake.check(desk.table, ("x", f"p{number}"))
            desk.put("large", ingress=[{"ports": [{"port": 1 + port} for port in range(20)]}])
            desk.put("next")
            await desk.settle()
            assert goes == [2, 2, 1, 1]

    asyncio.run(work())


def test_a_failure_ends_who_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        with Desk(monkeypatch) as desk:
            desk.intake.put(Table(PODS), ("x", "p"), b"{")  # A watch passes on only what it has parsed.
            with pytest.raises(ValueError, match="Expecting"):
                await asyncio.wait_for(desk.intake.run(), 10)

    asyncio.run(work())


def test_a_policy_is_kept_as_bytes_and_decoded_when_asked_for() -> None:
    table: Table[Any] = Table(NETWORK_POLICIES)
    entry = read_entry(NETWORK_POLICIES, json.loads(event("p", egress=[{}]))["object"], {})
    table.put(entry)
    (stored,) = table.values()
    decoded = stored.load()
    assert isinstance(decoded, NetworkPolicy)
    assert stored == decoded
    assert stored.load() is decoded
    stored.unload()
    assert stored.load() is not decoded
    assert stored.load() == decoded
    assert stored.size == len(table.entries["x", "p"].document)
    assert table.take_changed() == [stored]
    assert table.take_changed() == []


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["items", "metadata", "a"]), _JSON), st.sampled_from([None, 1]))
def test_a_list_is_read_member_by_member(tree: dict[str, Any], indent: int | None) -> None:
    found: dict[str, Any] = {name: [] for name, value in tree.items() if name == "items" and isinstance(value, list)}
    for name, value in members(json.dumps(tree, indent=indent), "items"):
        if name == "items" and isinstance(tree["items"], list):
            found[name].append(value)
        else:
            found[name] = value
    assert found == tree


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a"}', '{"a":1,}', '{"items":[1,]}', '{"items":[1 2]}', "{} x", "{1:2}"]
)
def test_what_is_no_object_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|Expecting|follows"):
        list(members(text, "items"))
