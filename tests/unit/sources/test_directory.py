# SPDX-License-Identifier: Apache-2.0
"""A directory of manifests: what is in force, what stays in force, and how changes arrive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from watchfiles._rust_notify import WatchfilesRustInternalError

from enforcer_daemon.model import PodRef
from enforcer_daemon.sources import directory as directory_module
from enforcer_daemon.sources.directory import DirectorySource
from enforcer_daemon.sources.manifests import MAX_FILE_BYTES, World


def policy(name: str, namespace: str = "farm", **spec: object) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def write(path: Path, *manifests: dict[str, Any]) -> None:
    """Write manifests as one YAML file (JSON is YAML), in one step."""
    new = path.with_name("." + path.name)
    new.write_text("\n---\n".join(json.dumps(manifest) for manifest in manifests))
    new.replace(path)


def names(world: World) -> list[str]:
    return [f"{p.namespace}/{p.name}" for p in world.policies]


BAD: dict[str, object] = {"policyTypes": ["Both"]}


def test_all_kinds_of_all_files_make_a_world(tmp_path: Path):
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "farm", "labels": {"green": "yes"}}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "cow", "namespace": "farm", "labels": {"a": "b"}}}
    finished = {**pod, "metadata": {"name": "calf", "namespace": "farm"}, "status": {"phase": "Succeeded"}}
    write(tmp_path / "b.yaml", policy("b"), {"apiVersion": "v1", "kind": "List", "items": [policy("a"), namespace]})
    listed = {"apiVersion": "v1", "kind": "PodList", "items": [{"metadata": pod["metadata"]}, finished]}
    write(tmp_path / "a.json", listed)
    (tmp_path / "notes.txt").write_text("not read")
    (tmp_path / ".hidden.yaml").write_text("not: [read")
    (tmp_path / "below.yaml").mkdir()

    world = DirectorySource(tmp_path).read()

    assert names(world) == ["farm/a", "farm/b"]
    assert world.problems == ()
    assert world.labels_of("farm") == {"green": "yes", "kubernetes.io/metadata.name": "farm"}
    assert world.labels_of("city") == {"kubernetes.io/metadata.name": "city"}
    assert list(world.pods) == [PodRef("farm", "cow")]
    assert world.pods[PodRef("farm", "cow")].labels == {"a": "b"}


def test_a_bad_object_is_refused_and_its_last_good_version_stays(tmp_path: Path):
    source = DirectorySource(tmp_path)
    write(tmp_path / "p.yaml", policy("a", policyTypes=["Egress"]), policy("b"))
    before = source.read()

    write(tmp_path / "p.yaml", policy("a", **BAD), policy("b"), policy("c", **BAD))
    world = source.read()

    assert world.policies == before.policies
    assert [(p.object, p.field) for p in world.problems] == [
        ("NetworkPolicy farm/a", "spec.policyTypes[0]"), ("NetworkPolicy farm/c", "spec.policyTypes[0]"),
    ]  # fmt: skip
    assert world.problems[0].file == str(tmp_path / "p.yaml")
    assert world.problems[0].line == 1

    write(tmp_path / "p.yaml", policy("a"))
    world = source.read()
    assert names(world) == ["farm/a"]
    assert world.policies != before.policies[:1]
    assert world.problems == ()


@pytest.mark.parametrize("damage", [b"a: [", b"\xff\xfe", b"a: 1\na: 2", b"- 1", b"kind: {}"])
def test_a_damaged_file_keeps_its_objects(tmp_path: Path, damage: bytes):
    source = DirectorySource(tmp_path)
    write(tmp_path / "a.yaml", policy("a"), policy("b"))
    write(tmp_path / "c.yaml", policy("c"))
    source.read()

    (tmp_path / "a.yaml").write_bytes(damage)
    (tmp_path / "c.yaml").unlink()
    world = source.read()

    assert names(world) == ["farm/a", "farm/b"]
    assert len({problem.file for problem in world.problems}) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("kind", "NetworkPolicies"), ("metadata", {"name": "A", "namespace": "farm"}), ("metadata", {})],
)
def test_an_object_that_lost_its_name_or_kind_stays(tmp_path: Path, field: str, value: object):
    source = DirectorySource(tmp_path)
    write(tmp_path / "a.yaml", policy("a"))
    source.read()

    write(tmp_path / "a.yaml", {**policy("a"), field: value})

    world = source.read()
    assert names(world) == ["farm/a"]
    assert world.problems != ()


def test_a_file_that_cannot_be_read_keeps_its_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = DirectorySource(tmp_path)
    write(tmp_path / "a.yaml", policy("a"))
    source.read()
    (tmp_path / "a.yaml").unlink()
    (tmp_path / "a.yaml").symlink_to("nowhere")

    assert names(source.read()) == ["farm/a"]

    (tmp_path / "a.yaml").unlink()
    with (tmp_path / "a.yaml").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    world = source.read()
    assert names(world) == ["farm/a"]
    assert "larger than" in world.problems[0].message


def test_a_directory_that_vanished_keeps_everything(tmp_path: Path):
    place = tmp_path / "policies"
    place.mkdir()
    source = DirectorySource(place)
    write(place / "a.yaml", policy("a"))
    source.read()
    place.rename(tmp_path / "away")

    world = source.read()

    assert names(world) == ["farm/a"]
    assert [problem.file for problem in world.problems] == [str(place)]


def test_removed_objects_are_gone_and_moved_ones_are_not(tmp_path: Path):
    source = DirectorySource(tmp_path)
    write(tmp_path / "a.yaml", policy("a"), policy("b"))
    source.read()

    write(tmp_path / "a.yaml", policy("a"))
    write(tmp_path / "b.yaml", policy("c"))
    assert names(source.read()) == ["farm/a", "farm/c"]

    (tmp_path / "a.yaml").rename(tmp_path / "z.yaml")
    (tmp_path / "b.yaml").unlink()
    assert names(source.read()) == ["farm/a"]


def test_of_two_objects_by_one_name_the_first_counts(tmp_path: Path):
    write(tmp_path / "a.yaml", policy("a"))
    write(tmp_path / "b.yaml", policy("a", policyTypes=["Egress"]))
    world = DirectorySource(tmp_path).read()
    assert world.policies[0].egress is None
    assert [(p.file, p.field) for p in world.problems] == [(str(tmp_path / "b.yaml"), "metadata.name")]


def test_a_list_without_items_and_other_kinds_are_problems(tmp_path: Path):
    write(tmp_path / "a.yaml", {"apiVersion": "v1", "kind": "List"}, {**policy("a"), "kind": "Deployment"})
    world = DirectorySource(tmp_path).read()
    assert [p.message for p in world.problems] == [
        "items of a List must be a list", 'Invalid value: "Deployment": must be NetworkPolicy',
    ]  # fmt: skip


def test_unchanged_files_are_not_decoded_again(tmp_path: Path):
    source = DirectorySource(tmp_path)
    write(tmp_path / "a.yaml", policy("a"))
    write(tmp_path / "b.yaml", policy("b"))
    before = source.read()
    write(tmp_path / "b.yaml", policy("b", policyTypes=["Egress"]))
    after = source.read()
    assert after.policies[0] is before.policies[0]
    assert after.policies[1] != before.policies[1]


async def _next(worlds: AsyncIterator[World]) -> World:
    async with asyncio.timeout(20):
        return await anext(worlds)


def _watched(source: DirectorySource) -> Any:
    return aclosing(source.watch())  # type: ignore[type-var]


NO_INOTIFY = [OSError(24, "inotify watch limit reached"), WatchfilesRustInternalError("no inotify instance left")]


@pytest.mark.parametrize("failure", [None, *NO_INOTIFY], ids=["inotify", "polling", "polling too"])
def test_changes_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception | None):
    if failure is not None:
        real = directory_module.awatch

        def without_inotify(*paths: Path, force_polling: bool, **options: Any) -> Any:
            if not force_polling:
                raise failure
            return real(*paths, force_polling=True, **options)

        monkeypatch.setattr(directory_module, "awatch", without_inotify)

    async def story() -> None:
        write(tmp_path / "a.yaml", policy("a"))
        async with _watched(DirectorySource(tmp_path)) as worlds:
            assert names(await _next(worlds)) == ["farm/a"]
            write(tmp_path / "b.yaml", policy("b"))
            assert names(await _next(worlds)) == ["farm/a", "farm/b"]
            (tmp_path / "a.yaml").unlink()
            assert names(await _next(worlds)) == ["farm/b"]
            (tmp_path / "notes.txt").write_text("no manifest, no change")
            write(tmp_path / "b.yaml", policy("b", policyTypes=["Egress"]))
            assert (await _next(worlds)).policies[0].egress == ()

    asyncio.run(story())


def _publish(volume: Path, version: str, *manifests: dict[str, Any]) -> None:
    """Write a version as the kubelet does for a ConfigMap: a new directory, and one link that is swapped."""
    (volume / version).mkdir()
    write(volume / version / "p.yaml", *manifests)
    (volume / "..data_tmp").symlink_to(version)
    (volume / "..data_tmp").replace(volume / "..data")


def test_where_nothing_can_be_watched_the_files_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*paths: Path, **options: object) -> object:
        raise WatchfilesRustInternalError("neither inotify nor polling")

    monkeypatch.setattr(directory_module, "awatch", broken)
    monkeypatch.setattr(directory_module, "RECHECK_MS", 50)

    async def story() -> None:
        async with _watched(DirectorySource(tmp_path)) as worlds:
            assert names(await _next(worlds)) == []
            write(tmp_path / "a.yaml", policy("a"))
            assert names(await _next(worlds)) == ["farm/a"]

    asyncio.run(story())


def test_a_config_map_is_followed(tmp_path: Path):
    async def story() -> None:
        _publish(tmp_path, "..2026_01", policy("a"))
        (tmp_path / "p.yaml").symlink_to("..data/p.yaml")
        async with _watched(DirectorySource(tmp_path)) as worlds:
            assert names(await _next(worlds)) == ["farm/a"]
            _publish(tmp_path, "..2026_02", policy("b"))
            assert names(await _next(worlds)) == ["farm/b"]
            _publish(tmp_path, "..2026_03", policy("b"), policy("c"))
            assert names(await _next(worlds)) == ["farm/b", "farm/c"]

    asyncio.run(story())


def test_a_directory_may_come_later_and_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(directory_module, "RECHECK_MS", 50)
    place = tmp_path / "policies"

    async def story() -> None:
        async with _watched(DirectorySource(place)) as worlds:
            assert (await _next(worlds)).problems != ()
            place.mkdir()
            write(place / "a.yaml", policy("a"))
            world = await _next(worlds)
            while names(world) != ["farm/a"]:
                world = await _next(worlds)
            place.rename(tmp_path / "away")
            world = await _next(worlds)
            assert (names(world), len(world.problems)) == (["farm/a"], 1)
            place.mkdir()
            write(place / "b.yaml", policy("b"))
            while names(world) != ["farm/b"]:
                world = await _next(worlds)

    asyncio.run(story())
