# SPDX-License-Identifier: Apache-2.0
"""net.d on disk: what is written is whole, and what somebody else writes is not lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from trireme_install import directory as directory_module
from trireme_install.directory import carry_out, locked, read_listing
from trireme_install.errors import ChangedMeanwhileError, InstallError
from trireme_install.plan import Remove, Replace, Write


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_listing_has_what_runtimes_look_at(tmp_path: Path) -> None:
    for name in ("10-a.conflist", "b.conf", "c.json", "calico-kubeconfig", "d.conf.bak"):
        (tmp_path / name).write_text(name)
    (tmp_path / "cbr0").mkdir()
    (tmp_path / "cbr0" / "x.conf").write_text("x")
    (tmp_path / "cbr0" / "y.txt").write_text("y")
    (tmp_path / "dir.conf").mkdir()
    listing = read_listing(tmp_path)
    assert listing.candidates() == ["10-a.conflist", "b.conf", "c.json"]
    assert listing.drop_ins == {"cbr0": {"x.conf": b"x"}}


def test_a_directory_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_listing(tmp_path / "none").files == {}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_file_is_replaced_with_its_mode_and_nothing_is_left_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(directory_module, "_exchange", lambda one, other: False)
    path = tmp_path / "10-a.conflist"
    path.write_bytes(b"old")
    path.chmod(0o600)
    carry_out(tmp_path, Replace(path.name, b"old", b"new"))
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert names(tmp_path) == {path.name}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_file_that_its_owner_has_written_meanwhile_stays_its_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(directory_module, "_exchange", lambda one, other: False)
    path = tmp_path / "10-a.conflist"
    path.write_bytes(b"newer")
    with pytest.raises(ChangedMeanwhileError):
        carry_out(tmp_path, Replace(path.name, b"old", b"ours"))
    assert path.read_bytes() == b"newer"
    assert names(tmp_path) == {path.name}


def test_what_goes_while_it_is_read_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "10-a.conflist").write_bytes(b"x")
    names_before = list(tmp_path.iterdir())
    monkeypatch.setattr(Path, "is_dir", lambda path: True)  # as it was a moment before
    assert read_listing(tmp_path).drop_ins == {}

    def vanishing(path: Path) -> list[Path]:
        monkeypatch.undo()
        (tmp_path / "10-a.conflist").unlink()
        tmp_path.rmdir()
        return names_before

    monkeypatch.setattr(Path, "iterdir", vanishing)
    assert read_listing(tmp_path).files == {}


def test_a_file_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(ChangedMeanwhileError):
        carry_out(tmp_path, Replace("10-a.conflist", b"old", b"ours"))
    assert names(tmp_path) == set()


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "chain").write_bytes(b"old")
    (tmp_path / "10-a.conflist").symlink_to("real/chain")
    carry_out(tmp_path, Replace("10-a.conflist", b"old", b"new"))
    assert (tmp_path / "10-a.conflist").is_symlink()
    assert (tmp_path / "real" / "chain").read_bytes() == b"new"


def test_a_drop_in_comes_and_goes_with_its_directory(tmp_path: Path) -> None:
    carry_out(tmp_path, Write("cbr0/99.conf", b"x"))
    assert read_listing(tmp_path).drop_ins == {"cbr0": {"99.conf": b"x"}}
    carry_out(tmp_path, Remove("cbr0/99.conf"))
    assert names(tmp_path) == set()
    carry_out(tmp_path, Write("cbr0/99.conf", b"x"))
    (tmp_path / "cbr0" / "other").touch()
    carry_out(tmp_path, Remove("cbr0/99.conf"))
    assert names(tmp_path) == {"cbr0"}


def test_two_installers_do_not_work_at_once_and_a_dead_ones_files_go(tmp_path: Path) -> None:
    (tmp_path / ".10-a.conflist.trireme-tmp").write_text("half")
    with locked(tmp_path):
        assert ".10-a.conflist.trireme-tmp" not in names(tmp_path)
        with pytest.raises(InstallError, match="another trireme-install"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass
