# SPDX-License-Identifier: Apache-2.0
"""Which backends' rules pods may still have, from one start to the next."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from enforcer_daemon.dataplane.backendrecord import FILE_NAME, BackendRecord
from enforcer_daemon.dataplane.backends import make_backend
from enforcer_daemon.errors import DataplaneError

NFT, IPTABLES, LEGACY = (make_backend(name) for name in ("nft", "iptables-nft", "iptables-legacy"))


def _began(run_dir: Path, *names: str) -> list[str]:
    """Begin and finish with one backend after the other; return the file's lines and who came before the last."""
    earlier: tuple[str, ...] = ()
    for name in names:
        backend_record, backend = BackendRecord(run_dir), make_backend(name)
        earlier = tuple(each.name for each in backend_record.begin(backend))
        backend_record.finish(backend)
    return list(earlier)


def test_the_first_and_the_same_again_have_nobody_before_them(tmp_path: Path) -> None:
    assert _began(tmp_path, "nft") == []
    assert _began(tmp_path, "nft") == []


def test_another_one_knows_who_came_before(tmp_path: Path) -> None:
    assert _began(tmp_path, "iptables-nft", "nft") == ["iptables-nft"]
    assert _began(tmp_path, "nft") == []
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600


def test_starts_that_did_not_finish_are_remembered(tmp_path: Path) -> None:
    for backend in (NFT, IPTABLES):
        BackendRecord(tmp_path).begin(backend)
    earlier = BackendRecord(tmp_path).begin(LEGACY)
    assert [backend.name for backend in earlier] == ["nft", "iptables-nft"]
    assert [backend.name for backend in BackendRecord(tmp_path).begin(NFT)] == ["iptables-nft", "iptables-legacy"]


def test_a_name_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("pf\n")
    with pytest.raises(DataplaneError, match="pf: no such backend of rules; there are nft, "):
        BackendRecord(tmp_path).begin(NFT)


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataplaneError, match="backends: cannot be written"):
        BackendRecord(tmp_path / "none").begin(NFT)
