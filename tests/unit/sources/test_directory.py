# SPDX-License-Identifier: Apache-2.0
"""A directory of manifests: what is in force, what stays in force, and how changes arrive."""

from __future__ import annotations

import asyncio
import json
import stat
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import Any, cast

import pytest

from enforcer_daemon.model import PodRef
from enforcer_daemon.policy.compile import loaded
from enforcer_daemon.policy.objects import NetworkPolicy
from enforcer_daemon.sources import directory as directory_module
from enforcer_daemon.sources.directory import DirectorySource
from enforcer_daemon.sources.manifests import MAX_FILE_BYTES, ClusterState


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


def decoded(state: ClusterState) -> tuple[NetworkPolicy, ...]:
    """Return the policies of a state, each decoded."""
    return loaded(state.policies)


def names(state: ClusterState) -> list[str]:
    return [f"{p.namespace}/{p.name}" for p in state.policies]


BAD: dict[str, Any] = {"policyTypes": ["Both"]}


def test_all_kinds_of_all_files_make_a_world(tmp_path: Path) -> None:
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "farm", "labels": {"green": "yes"}}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "cow", "namespace": "farm", "labels": {"a": "b"}}}
    finished = {**pod, "metadata": {"name": "calf", "namespace": "farm"}, "status": {"phase": "Succeeded"}}
    write(tmp_path / "b.yaml", policy("b"), {"apiVersion": "v1", "kind": "List", "items": [policy("a"), namespace]})
    listed = {"apiVersion": "v1", "kind": "PodList", "items": [{"metadata": pod["metadata"]}, finished]}
    write(tmp_path / "a.json", listed)
    (tmp_path / "notes.txt").write_text("not read")
    (tmp_path / ".hidden.yaml").write_text("not: [read")
    (tmp_path / "below.yaml").mkdir()

    state = DirectorySource(tmp_path).read()

    assert names(state) == ["farm/a", "farm/b"]
    assert state.problems == ()
    assert state.labels_of("farm") == {"green": "yes", "kubernetes.io/metadata.name": "farm"}
    assert state.labels_of("city") == {"kubernetes.io/metadata.name": "city"}
    assert list(state.pods) == [PodRef("farm", "cow")]
    assert state.pods[PodRef("farm", "cow")].labels == {"a": "b"}


def test_a_bad_object_is_refused_and_its_last_good_version_stays(tmp_path: Path) -> None:
    source = DirectorySource(tmp_path)
    write(tmp_path / "p.yaml", policy("a", policyTypes=["Egress"]), policy("b"))
    before = source.read()

    write(tmp_path / "p.yaml", policy("a", **BAD), policy("b"), policy("c", **BAD))
    state = source.read()

    assert state.policies == before.policies
    assert [(p.object, p.field) for p in state.problems] == [
        ("NetworkPolicy farm/a", "spec.policyTypes[0]"), ("NetworkPolicy farm/c", "spec.policyTypes[0]"),
    ]  # fmt: skip
    assert state.problems[0].file == str(tmp_path / "p.yaml")
    assert state.problems[0].line == 1

    write(tmp_path / "p.yaml", policy("a"))
    state = source.read()
    assert names(state) == ["farm/a"]
    assert state.policies != before.policies[:1]
    assert state.problems == ()


@pytest.mark.parametrize("damage", [b"a: [", b"\xff\xfea", b"\xff", b"a: 1\na: 2", b"- 1", b"kind: {}"])
def test_a_damaged_file_keeps_its_objects(tmp_path: Path, damage: bytes) -> None:
    source = DirectorySource(tmp_path)
    write(tmp_path / "a.yaml", policy("a"), policy("b"))
    write(tmp_path / "c.yaml", policy("c"))
    source.read()

    (tmp_path / "a.yaml").write_bytes(damage)
    (tmp_path / "c.yaml").unlink()
    state = source.read()

    assert names(state) == ["farm/a", "farm/b"]
    assert len({problem.file for problem in state.problems}) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("kind", "NetworkPolicies"), ("metadata", {"name": "A", "namespace": "farm"}), ("metadata", {})],
)
def test_an_object_that_lost_its_name_or_kind_stays(tmp_path: Path, field: str, value: object) -> None:
    source = DirectorySource(tmp_path)
    write(tmp_path / "a.yaml", policy("a"))
    source.read()

    write(tmp_path / "a.yaml", {**policy("a"), field: value})

    state = source.read()
    assert names(state) == ["farm/a"]
    assert state.problems != ()


def test_a_file_that_cannot_be_read_keeps_its_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = DirectorySource(tmp_path)
    write(tmp_path / "a.yaml", policy("a"))
    source.read()
    (tmp_path / "a.yaml").unlink()
    (tmp_path / "a.yaml").symlink_to("nowhere")

    assert names(source.read()) == ["farm/a"]

    (tmp_path / "a.yaml").unlink()
    with (tmp_path / "a.yaml").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    state = source.read()
    assert names(state) == ["farm/a"]
    assert "larger than" in state.problems[0].message


def test_a_directory_that_vanished_keeps_everything(tmp_path: Path) -> None:
    place = tmp_path / "policies"
    place.mkdir()
    source = DirectorySource(place)
    write(place / "a.yaml", policy("a"))
    source.read()
    place.rename(tmp_path / "away")

    state = source.read()

    assert names(state) == ["farm/a"]
    assert [problem.file for problem in state.problems] == [str(place)]


def test_removed_objects_are_gone_and_moved_ones_are_not(tmp_path: Path) -> None:
    source = DirectorySource(tmp_path)
    write(tmp_path / "a.yaml", policy("a"), policy("b"))
    source.read()

    write(tmp_path / "a.yaml", policy("a"))
    write(tmp_path / "b.yaml", policy("c"))
    assert names(source.read()) == ["farm/a", "farm/c"]

    (tmp_path / "a.yaml").rename(tmp_path / "z.yaml")
    (tmp_path / "b.yaml").unlink()
    assert names(source.read()) == ["farm/a"]


def test_of_two_objects_by_one_name_the_first_counts(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", policy("a"))
    write(tmp_path / "b.yaml", policy("a", policyTypes=["Egress"]))
    state = DirectorySource(tmp_path).read()
    assert decoded(state)[0].egress is None
    assert [(p.file, p.field) for p in state.problems] == [(str(tmp_path / "b.yaml"), "metadata.name")]


def test_a_list_without_items_and_other_kinds_are_problems(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", {"apiVersion": "v1", "kind": "List"}, {**policy("a"), "kind": "Deployment"})
    state = DirectorySource(tmp_path).read()
    assert [p.message for p in state.problems] == [
        "items of a List must be a list",
        'Invalid value: "Deployment": is not read here; NetworkPolicy, Namespace and Pod are, alone or in a List',
    ]  # fmt: skip


def test_unchanged_files_are_not_decoded_again(tmp_path: Path) -> None:
    source = DirectorySource(tmp_path)
    write(tmp_path / "a.yaml", policy("a"))
    write(tmp_path / "b.yaml", policy("b"))
    before = source.read()
    write(tmp_path / "b.yaml", policy("b", policyTypes=["Egress"]))
    after = source.read()
    assert after.policies[0] is before.policies[0]
    assert after.policies[1] != before.policies[1]


async def _next(states: AsyncIterator[ClusterState]) -> ClusterState:
    async with asyncio.timeout(20):
        return await anext(states)


def _watched(source: DirectorySource) -> AbstractAsyncContextManager[AsyncGenerator[ClusterState]]:
    return aclosing(cast(AsyncGenerator[ClusterState], source.watch()))


def _without_inotify(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(directory: Path) -> object:
        raise OSError(24, "no inotify instance left")

    monkeypatch.setattr(directory_module, "DirectoryWatch", none_left)
    monkeypatch.setattr(directory_module, "RECHECK_S", 0.02)


@pytest.mark.parametrize("has_inotify", [True, False], ids=["inotify", "compared"])
def test_changes_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_inotify: bool) -> None:
    if not has_inotify:
        _without_inotify(monkeypatch)

    async def story() -> None:
        write(tmp_path / "a.yaml", policy("a"))
        async with _watched(DirectorySource(tmp_path)) as states:
            assert names(await _next(states)) == ["farm/a"]
            write(tmp_path / "b.yaml", policy("b"))
            assert names(await _next(states)) == ["farm/a", "farm/b"]
            (tmp_path / "a.yaml").unlink()
            assert names(await _next(states)) == ["farm/b"]
            (tmp_path / "notes.txt").write_text("no manifest, no change")
            write(tmp_path / "b.yaml", policy("b", policyTypes=["Egress"]))
            assert decoded(await _next(states))[0].egress == ()

    asyncio.run(story())


def _publish(volume: Path, version: str, *manifests: dict[str, Any]) -> None:
    """Write a version as the kubelet does for a ConfigMap: a new directory, and one link that is swapped."""
    (volume / version).mkdir()
    write(volume / version / "p.yaml", *manifests)
    (volume / "..data_tmp").symlink_to(version)
    (volume / "..data_tmp").replace(volume / "..data")


def test_a_change_is_known_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with _watched(DirectorySource(tmp_path)) as states:
            await _next(states)
            waiting = asyncio.ensure_future(_next(states))
            await asyncio.sleep(0.1)  # until the watch is in place
            began = time.monotonic()
            write(tmp_path / "a.yaml", policy("a"))
            await waiting
            assert time.monotonic() - began < 0.5

    asyncio.run(story())


def test_what_the_kernel_does_not_report_is_found_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system reports what this machine changes alone; a link's target may lie anywhere."""
    place, elsewhere = tmp_path / "policies", tmp_path / "elsewhere"
    place.mkdir()
    elsewhere.mkdir()
    write(elsewhere / "a.yaml", policy("a"))
    (place / "a.yaml").symlink_to(elsewhere / "a.yaml")
    (place / "b.yaml").hardlink_to(elsewhere / "a.yaml")
    monkeypatch.setattr(directory_module, "RECHECK_S", 0.02)

    async def story() -> None:
        async with _watched(DirectorySource(place)) as states:
            assert names(await _next(states)) == ["farm/a"]
            write(elsewhere / "a.yaml", policy("c"))
            assert names(await _next(states)) == ["farm/a", "farm/c"]  # by the link, and by what the other name has
            (elsewhere / "again").hardlink_to(place / "b.yaml")
            (elsewhere / "again").write_text(json.dumps(policy("d")))
            assert names(await _next(states)) == ["farm/c", "farm/d"]

    asyncio.run(story())


def test_a_config_map_is_followed(tmp_path: Path) -> None:
    async def story() -> None:
        _publish(tmp_path, "..2026_01", policy("a"))
        (tmp_path / "p.yaml").symlink_to("..data/p.yaml")
        async with _watched(DirectorySource(tmp_path)) as states:
            assert names(await _next(states)) == ["farm/a"]
            _publish(tmp_path, "..2026_02", policy("b"))
            assert names(await _next(states)) == ["farm/b"]
            _publish(tmp_path, "..2026_03", policy("b"), policy("c"))
            assert names(await _next(states)) == ["farm/b", "farm/c"]

    asyncio.run(story())


def test_a_directory_may_come_later_and_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "RECHECK_S", 0.05)
    place = tmp_path / "policies"

    async def story() -> None:
        async with _watched(DirectorySource(place)) as states:
            assert (await _next(states)).problems != ()
            place.mkdir()
            write(place / "a.yaml", policy("a"))
            state = await _next(states)
            while names(state) != ["farm/a"]:
                state = await _next(states)
            place.rename(tmp_path / "away")
            state = await _next(states)
            assert (names(state), len(state.problems)) == (["farm/a"], 1)
            place.mkdir()
            write(place / "b.yaml", policy("b"))
            while names(state) != ["farm/b"]:
                state = await _next(states)

    asyncio.run(story())


def restarted(tmp_path: Path, *manifests: dict[str, Any]) -> tuple[Path, Path]:
    """Return a source directory with one file, and what a daemon that read it has kept."""
    place, kept = tmp_path / "policies", tmp_path / "state" / "last-good"
    place.mkdir()
    write(place / "a.yaml", *manifests)
    source = DirectorySource(place, kept)
    source.read()
    assert not source.keep()
    return place, kept


@pytest.mark.parametrize("damage", [json.dumps(policy("a", **BAD)).encode(), b"a: ["], ids=["object", "file"])
def test_after_a_restart_what_is_bad_now_is_in_force_as_it_was(tmp_path: Path, damage: bytes) -> None:
    place, kept = restarted(tmp_path, policy("a", policyTypes=["Egress"]))
    (place / "a.yaml").write_bytes(damage)

    source = DirectorySource(place, kept)
    state = source.read()
    assert decoded(state)[0].egress == ()
    assert "in force as before the restart: NetworkPolicy farm/a" in state.problems[0].message
    assert not source.keep()
    assert DirectorySource(place, kept).read() == state  # and after the next one

    write(place / "a.yaml", policy("a"))
    mended = source.read()
    assert (decoded(mended)[0].egress, mended.problems) == (None, ())
    write(place / "a.yaml", policy("a", **BAD))
    assert "before the restart" not in source.read().problems[0].message


def test_after_a_restart_what_is_absent_is_gone(tmp_path: Path) -> None:
    place, kept = restarted(tmp_path, policy("a"), policy("b"))
    write(place / "a.yaml", policy("a"))
    assert names(DirectorySource(place, kept).read()) == ["farm/a"]
    (place / "a.yaml").unlink()
    source = DirectorySource(place, kept)
    assert names(source.read()) == []
    source.keep()
    assert list(kept.iterdir()) == []


def test_the_good_objects_of_a_file_are_those_of_now_and_the_bad_ones_of_before(tmp_path: Path) -> None:
    place, kept = restarted(tmp_path, policy("a", policyTypes=["Egress"]), policy("b"))
    write(place / "a.yaml", policy("a", **BAD), policy("b", policyTypes=["Egress"]))
    running = DirectorySource(place, kept)
    running.read()
    running.keep()
    (place / "a.yaml").write_bytes(b"\xff")
    state = DirectorySource(place, kept).read()
    assert [(p.name, p.egress) for p in decoded(state)] == [("a", ()), ("b", ())]
    assert "NetworkPolicy farm/a, NetworkPolicy farm/b" in state.problems[0].message


def test_all_kinds_and_many_objects_are_kept(tmp_path: Path) -> None:
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "farm", "labels": {"green": "yes"}}}
    pod = {"metadata": {"name": "cow", "namespace": "farm", "labels": {"a": "b"}}}
    pods = {"apiVersion": "v1", "kind": "PodList", "items": [pod]}
    place, kept = restarted(tmp_path, namespace, pods, *(policy(name) for name in "abcde"))
    before = DirectorySource(place).read()
    (place / "a.yaml").write_bytes(b"- 1\n- [")
    after = DirectorySource(place, kept).read()
    assert (after.policies, after.namespaces, after.pods) == (before.policies, before.namespaces, before.pods)
    assert after.problems[0].message.endswith(" and 4 more")


def test_what_is_kept_is_for_the_daemon_alone_and_written_only_when_it_changes(tmp_path: Path) -> None:
    place, kept = restarted(tmp_path, policy("a"))
    (file,) = kept.iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (file, kept)] == [0o600, 0o700]
    source = DirectorySource(place, kept)
    source.read()
    source.keep()
    before = file.stat()
    write(place / "b.yaml", policy("b"))
    source.read()
    source.keep()
    assert file.stat() == before
    assert len(list(kept.iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"file": "../../etc/passwd"}', b"\xff", b"{"])
def test_a_damaged_keepsake_is_said_so_and_replaced(tmp_path: Path, damage: bytes) -> None:
    place, kept = restarted(tmp_path, policy("a"))
    (file,) = kept.iterdir()
    file.write_bytes(damage)
    source = DirectorySource(place, kept)
    state = source.read()
    assert names(state) == ["farm/a"]
    assert [problem.file for problem in state.problems] == [str(file)]
    assert source.keep()
    assert source.read().problems == ()
    assert names(DirectorySource(place, kept).read()) == ["farm/a"]


def test_what_cannot_be_kept_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    place = tmp_path / "policies"
    place.mkdir()
    write(place / "a.yaml", policy("a"))

    async def story() -> None:
        async with _watched(DirectorySource(place, tmp_path / "state" / "last-good")) as states:
            assert (await _next(states)).problems == ()
            assert "cannot be kept" in (await _next(states)).problems[0].message

    asyncio.run(story())


def test_a_problem_says_whether_an_earlier_version_is_in_force(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", policy("a"))
    source = DirectorySource(tmp_path)
    source.read()
    for name in ("a", "b"):
        write(tmp_path / f"{name}.yaml", policy(name, podSelector=1))
    (tmp_path / "c.yaml").write_text("{")
    told = {Path(problem.file).name: problem for problem in source.read().problems}
    assert {name: problem.has_earlier for name, problem in told.items()} == {
        "a.yaml": True,
        "b.yaml": False,
        "c.yaml": False,
    }
    assert str(told["a.yaml"]).endswith("(an earlier version is in force)")
    assert str(told["b.yaml"]).endswith("(no version of it is in force)")
    (tmp_path / "a.yaml").write_text("{")
    assert [problem.has_earlier for problem in source.read().problems if problem.file.endswith("a.yaml")] == [True]


def test_a_change_does_not_wait_until_the_one_before_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in force is kept when no change follows, or at the latest after a second."""
    source = DirectorySource(tmp_path)
    keeps: list[float] = []

    def keep() -> bool:
        keeps.append(time.monotonic())
        return False

    monkeypatch.setattr(source, "keep", keep)

    async def scenario() -> None:
        async with _watched(source) as states:
            await anext(states)
            for number in range(3):
                write(tmp_path / "a.yaml", policy(f"a{number}"))
                await asyncio.wait_for(anext(states), 5)
                assert len(keeps) <= 1
            following = asyncio.ensure_future(anext(states))
            while len(keeps) < 2:
                await asyncio.wait({following}, timeout=0.01)
                assert not following.done()
            began = time.monotonic()
            number = 3
            while len(keeps) < 4:
                assert time.monotonic() < began + 10
                write(tmp_path / "a.yaml", policy(f"a{number}"))
                number += 1
                await asyncio.wait({following}, timeout=0.05)
                if following.done():
                    following = asyncio.ensure_future(anext(states))
            following.cancel()
            await asyncio.wait({following})

    asyncio.run(scenario())
