# SPDX-License-Identifier: Apache-2.0
"""The plugin's queue of deletions, drained by the daemon."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from cni_plugin import deletions as plugin
from cni_plugin import messages
from enforcer_daemon.errors import RegistrationError
from enforcer_daemon.model import AttachmentId
from enforcer_daemon.registration.deletions import Drained, drain


class Deleter:
    def __init__(self, failing: frozenset[str] = frozenset()) -> None:
        self.deleted: list[AttachmentId] = []
        self.failing = failing

    async def __call__(self, attachment: AttachmentId) -> None:
        if attachment.container_id in self.failing:
            raise RegistrationError(101, "the kernel refused")
        self.deleted.append(attachment)


def drained(tmp_path: Path, delete: Deleter) -> Drained:
    return asyncio.run(drain(tmp_path / "deletions", delete))


def queue(tmp_path: Path, container_id: str) -> Path:
    return Path(plugin.enqueue(str(tmp_path), messages.Attachment(container_id, "eth0")))


def test_an_absent_queue_is_empty(tmp_path: Path) -> None:
    assert drained(tmp_path, Deleter()) == Drained()


def test_every_deletion_is_carried_out_and_removed(tmp_path: Path) -> None:
    queue(tmp_path, "c1")
    queue(tmp_path, "c2")
    delete = Deleter()
    assert drained(tmp_path, delete) == Drained(deleted=2)
    assert delete.deleted == [AttachmentId("c1", "eth0"), AttachmentId("c2", "eth0")]
    assert drained(tmp_path, delete) == Drained()


def test_a_deletion_that_fails_is_kept_and_stops_no_other(tmp_path: Path) -> None:
    kept = queue(tmp_path, "c1")
    queue(tmp_path, "c2")
    assert drained(tmp_path, Deleter(frozenset({"c1"}))) == Drained(deleted=1, failed=1)
    assert list((tmp_path / "deletions").iterdir()) == [kept]


def test_what_is_no_deletion_is_removed(tmp_path: Path) -> None:
    good = queue(tmp_path, "c1")
    for name, content in {
        "a": b"",
        "b": b"\xff",
        "c": messages.encode_request(messages.Status()),
        "d": b'"' + b"x" * 5000 + b'"',
    }.items():
        good.with_name(name).write_bytes(content)
    os.mkfifo(good.with_name("e"))
    assert drained(tmp_path, Deleter()) == Drained(deleted=1, unreadable=5)
    assert list((tmp_path / "deletions").iterdir()) == []


def test_a_file_that_a_plugin_is_writing_is_left_until_it_is_old(tmp_path: Path) -> None:
    unfinished = queue(tmp_path, "c1").with_name(".123.tmp")
    unfinished.write_bytes(b"{")
    drained(tmp_path, Deleter())
    assert unfinished.exists()
    os.utime(unfinished, (0, 0))
    drained(tmp_path, Deleter())
    assert not unfinished.exists()
