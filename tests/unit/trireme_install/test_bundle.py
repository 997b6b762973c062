# SPDX-License-Identifier: Apache-2.0
"""The plugin's program: placed whole, linked in one step, kept for those that run it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from trireme_install.bundle import (
    Bundle,
    check_program,
    install_bundle,
    is_in_place,
    launcher_bundle,
    read_bundle,
    remove_bundle,
)
from trireme_install.errors import InstallError

ANSWER = '{"cniVersion":"1.1.0","supportedVersions":["1.0.0","%s"]}'


def bundle(directory: Path, marker: str) -> Bundle:
    (directory / "lib").mkdir(parents=True)
    program = directory / "trireme"
    program.write_text(f"#!/bin/sh\necho '{ANSWER % marker}'\n")
    program.chmod(0o755)
    (directory / "lib" / "part").write_text(marker)
    (directory / "lib" / "link").symlink_to("part")
    return read_bundle(directory, "0.1.0")


def test_the_link_leads_to_a_directory_named_by_version_and_content(tmp_path: Path) -> None:
    made = bundle(tmp_path / "src", "a")
    bin_dir = tmp_path / "bin"
    assert not is_in_place(bin_dir, made)
    assert install_bundle(bin_dir, made)
    assert str((bin_dir / "trireme").readlink()) == f".trireme/{made.name}/trireme"
    assert made.name.startswith("0.1.0-")
    assert (bin_dir / ".trireme" / made.name / "lib" / "link").is_symlink()
    assert is_in_place(bin_dir, made)
    assert not install_bundle(bin_dir, made)


def test_the_directory_can_be_mounted_elsewhere(tmp_path: Path) -> None:
    install_bundle(tmp_path / "bin", bundle(tmp_path / "src", "a"))
    (tmp_path / "bin").rename(tmp_path / "elsewhere")
    assert check_program(tmp_path / "elsewhere" / "trireme") == ("1.0.0", "a")


def test_an_upgrade_keeps_the_version_before_it_and_no_older_one(tmp_path: Path) -> None:
    bin_dir, made = tmp_path / "bin", [bundle(tmp_path / name, name) for name in "abc"]
    install_bundle(bin_dir, made[0])
    running = subprocess.Popen(["/bin/sleep", "60"], cwd=bin_dir / ".trireme" / made[0].name)
    try:
        install_bundle(bin_dir, made[1])
        assert (bin_dir / ".trireme" / made[0].name / "lib" / "part").read_text() == "a"
        install_bundle(bin_dir, made[2])
    finally:
        running.kill()
        running.wait()
    assert {path.name for path in (bin_dir / ".trireme").iterdir()} == {made[1].name, made[2].name}
    assert check_program(bin_dir / "trireme")[1] == "c"


def test_a_damaged_bundle_is_replaced_beside_it(tmp_path: Path) -> None:
    bin_dir, made = tmp_path / "bin", bundle(tmp_path / "src", "a")
    install_bundle(bin_dir, made)
    (bin_dir / ".trireme" / made.name / "lib" / "part").write_text("damaged")
    assert not is_in_place(bin_dir, made)
    assert install_bundle(bin_dir, made)
    assert is_in_place(bin_dir, made)
    assert str((bin_dir / "trireme").readlink()) == f".trireme/{made.name}.1/trireme"


def test_a_half_written_bundle_of_a_killed_installer_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "bin" / ".trireme" / ".new" / "lib").mkdir(parents=True)
    made = bundle(tmp_path / "src", "a")
    install_bundle(tmp_path / "bin", made)
    assert is_in_place(tmp_path / "bin", made)


def test_a_program_that_does_not_answer_is_not_linked(tmp_path: Path) -> None:
    bin_dir, good = tmp_path / "bin", bundle(tmp_path / "src", "a")
    install_bundle(bin_dir, good)
    (tmp_path / "src" / "trireme").write_text("#!/bin/sh\necho wrong libc >&2\nexit 1\n")
    with pytest.raises(InstallError, match=r"does not answer VERSION.*wrong libc"):
        install_bundle(bin_dir, read_bundle(tmp_path / "src", "0.2.0"))
    assert is_in_place(bin_dir, good)


def test_somebody_elses_program_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "trireme").write_text("theirs")
    with pytest.raises(InstallError, match="is not ours"):
        install_bundle(tmp_path / "bin", bundle(tmp_path / "src", "a"))


def test_a_directory_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InstallError, match="--bin-dir"):
        install_bundle(tmp_path / "file" / "bin", bundle(tmp_path / "src", "a"))


def test_a_bundle_needs_the_program(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match="make plugin"):
        read_bundle(tmp_path, "0.1.0")


def test_without_a_bundle_the_installed_package_is_the_plugin(tmp_path: Path) -> None:
    install_bundle(tmp_path / "bin", launcher_bundle("0.1.0"))
    assert "1.1.0" in check_program(tmp_path / "bin" / "trireme")


def test_removal_takes_the_link_and_the_store(tmp_path: Path) -> None:
    install_bundle(tmp_path / "bin", bundle(tmp_path / "src", "a"))
    (tmp_path / "bin" / "bridge").touch()
    remove_bundle(tmp_path / "bin")
    assert [path.name for path in (tmp_path / "bin").iterdir()] == ["bridge"]
    remove_bundle(tmp_path / "bin")
