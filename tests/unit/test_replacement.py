# SPDX-License-Identifier: Apache-2.0
"""Files are replaced whole or not at all, and private from the first byte."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from enforcer_daemon.replacement import Replacement, replace_file


def test_content_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace_file(path, b"old and long")
    with Replacement(path) as file:
        file.write(b"ne")
        assert path.read_bytes() == b"old and long"
        file.write(b"w")
        file.commit()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_is_not_committed_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace_file(path, b"old")
    with Replacement(path) as file:
        file.write(b"new")
    with pytest.raises(TypeError), Replacement(path) as file:
        file.write("no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_draft_of_a_process_that_died_is_replaced_and_no_link_is_followed(tmp_path: Path) -> None:
    path, victim = tmp_path / "a.json", tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "a.json.new").symlink_to(victim)
    replace_file(path, b"new")
    assert (path.read_bytes(), victim.read_text()) == (b"new", "untouched")
    assert not path.is_symlink()


def test_a_file_that_cannot_be_replaced_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(OSError, match="a"):
        replace_file(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "absent" / "a", b"new")
