# SPDX-License-Identifier: Apache-2.0
"""What `--check-config` finds in the files that the settings name."""

from __future__ import annotations

from pathlib import Path

import pytest

from enforcer_daemon.daemon.preflight import find_problems
from enforcer_daemon.errors import SettingsError
from enforcer_daemon.settings import Settings
from enforcer_daemon.settings_file import decode_settings


def settings_in(tmp_path: Path, **more: object) -> Settings:
    run = {"registration": {"runDir": str(tmp_path / "run")}}
    return decode_settings({"node": "a", "stateDir": str(tmp_path / "state"), **run, **more})


def test_what_is_not_there_yet_is_no_problem_and_is_not_made(tmp_path: Path) -> None:
    assert find_problems(settings_in(tmp_path), 0.0) == []
    assert list(tmp_path.iterdir()) == []


def test_every_problem_is_told(tmp_path: Path) -> None:
    for name in ("state", "run"):
        (tmp_path / name).write_text("a file")
    credentials = {"caCertificate": str(tmp_path / "ca.pem"), "caKey": str(tmp_path / "ca.key")}
    settings = settings_in(tmp_path, credentials=credentials, policyDir=str(tmp_path / "policy"))
    state, run, authority, policy = find_problems(settings, 0.0)
    assert state == f"stateDir: {tmp_path}/state: cannot be used: {tmp_path}/state is not a directory"
    assert run.startswith("registration.runDir: ")
    assert "ca.pem" in authority
    assert policy == f"policyDir: {tmp_path}/policy: No such file or directory"


def test_manifests_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{")
    (problem,) = find_problems(settings_in(tmp_path, policyDir=str(tmp_path)), 0.0)
    assert problem.startswith(f"policyDir: {tmp_path}/a.yaml")


def test_a_run_directory_whose_sockets_have_too_long_a_path_is_refused() -> None:
    fits = "/" + "r" * (107 - len("//registration.sock"))
    assert decode_settings({"node": "a", "registration": {"runDir": fits}}).registration.run_dir == Path(fits)
    with pytest.raises(SettingsError, match=r"registration\.runDir: is too long: .* 108 bytes, the kernel takes 107"):
        decode_settings({"node": "a", "registration": {"runDir": fits + "r"}})
