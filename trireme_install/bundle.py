# SPDX-License-Identifier: Apache-2.0
"""The plugin's program in the CNI binary directory: versioned directories, and one symbolic link to the current one.

    /opt/cni/bin/trireme -> .trireme/0.1.0-3f9c0a51d2e7/trireme

A directory is named by its content and never changed, so a plugin that runs keeps its files during an upgrade, and the
link moves in one step (libcni follows it). The one before the current one stays for those that still run it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trireme_install.errors import InstallError
from trireme_install.netd import PLUGIN

STORE_NAME = ".trireme"
_TEMPORARY_NAME = ".new"
_KEPT = 2
"""Versions that stay: the current one, and the one before it."""
_VERSION_TIMEOUT_S = 20.0
"""The bundle answers in 50 ms; a first start from a cold disk of a busy node takes longer."""
_MAX_DAMAGED = 16


@dataclass(frozen=True, slots=True)
class Member:
    """A file of the bundle, or a symbolic link in it."""

    content: bytes
    is_executable: bool = False
    is_link: bool = False


@dataclass(frozen=True, slots=True)
class Bundle:
    """The program and all that it needs."""

    name: str
    """Of its directory: version and content."""
    members: Mapping[str, Member]
    """By path."""


def read_bundle(directory: Path, version: str) -> Bundle:
    """Read a directory that has the program `trireme`; raise InstallError."""
    members = _read(directory)
    if PLUGIN not in members or not members[PLUGIN].is_executable:
        raise InstallError(f"{directory}: has no executable {PLUGIN}; `make plugin` builds one")
    return Bundle(_name(members, version), members)


def launcher_bundle(version: str, python: Path | None = None) -> Bundle:
    """Return the program for a node where the project is installed as a package: it runs in that Python."""
    interpreter = python or Path(sys.executable)
    script = f"#!{interpreter} -I\nfrom cni_plugin.__main__ import console\n\nconsole()\n"
    members = {PLUGIN: Member(script.encode(), is_executable=True)}
    return Bundle(_name(members, version), members)


def _read(directory: Path) -> dict[str, Member]:
    members: dict[str, Member] = {}
    try:
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(directory).as_posix()
            if path.is_symlink():
                members[name] = Member(os.fsencode(path.readlink()), is_link=True)
            elif path.is_file():
                members[name] = Member(path.read_bytes(), bool(path.stat().st_mode & 0o100))
    except OSError as err:
        raise InstallError(f"{err.filename}: cannot be read: {err.strerror}") from err
    return members


def _name(members: Mapping[str, Member], version: str) -> str:
    digest = hashlib.sha256()
    for name, member in sorted(members.items()):
        part = hashlib.sha256(member.content).hexdigest()
        digest.update(f"{name}\0{member.is_executable}\0{member.is_link}\0{part}\n".encode())
    return f"{version}-{digest.hexdigest()[:12]}"


def is_in_place(bin_dir: Path, bundle: Bundle) -> bool:
    """Tell, by names and sizes alone, whether the link leads to this bundle: cheap enough to ask all the time."""
    try:
        target = (bin_dir / PLUGIN).readlink().parts
        if len(target) != 3 or target[0] != STORE_NAME or not target[1].startswith(bundle.name):
            return False
        home = bin_dir / STORE_NAME / target[1]
        return all(
            (home / name).lstat().st_size == len(member.content) for name, member in bundle.members.items()
        ) and os.access(home / PLUGIN, os.X_OK)
    except OSError:
        return False


def install_bundle(bin_dir: Path, bundle: Bundle) -> bool:
    """Put the bundle in place and have the link name it; tell whether anything had to change. Raises InstallError."""
    try:
        store = bin_dir / STORE_NAME
        store.mkdir(mode=0o755, parents=True, exist_ok=True)
        name, is_new = _place(store, bundle)
        check_program(store / name / PLUGIN)
        link = bin_dir / PLUGIN
        target = f"{STORE_NAME}/{name}/{PLUGIN}"
        before = str(link.readlink()) if link.is_symlink() else None
        if before != target:
            if link.exists() and not link.is_symlink():
                raise InstallError(f"{link}: is there and is not ours; move it away")
            _link(link, target)
            _prune(store, [name, *([before.split("/")[1]] if before and before.startswith(STORE_NAME + "/") else [])])
    except OSError as err:
        raise InstallError(
            f"{err.filename or bin_dir}: cannot be written: {err.strerror}; where this directory is read-only, choose "
            "another with --bin-dir, which must be among the runtime's plugin directories"
        ) from err
    return is_new or before != target


def remove_bundle(bin_dir: Path) -> None:
    """Remove the link, then the store; raise InstallError. Whoever still names the plugin fails from now on."""
    link, store = bin_dir / PLUGIN, bin_dir / STORE_NAME
    try:
        if link.is_symlink() and str(link.readlink()).startswith(STORE_NAME + "/"):
            link.unlink()
        if store.is_dir():
            shutil.rmtree(store)
    except OSError as err:
        raise InstallError(f"{err.filename}: cannot be removed: {err.strerror}") from err


def check_program(program: Path) -> tuple[str, ...]:
    """Run the program and return the CNI versions that it speaks; raise InstallError."""
    try:
        done = subprocess.run(
            [str(program)],
            env={"CNI_COMMAND": "VERSION", "PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_VERSION_TIMEOUT_S,
            check=False,
        )
    except OSError as err:
        raise InstallError(f"{program}: cannot be run: {err.strerror or err}") from err
    except subprocess.TimeoutExpired as err:
        raise InstallError(f"{program}: does not answer VERSION within {err.timeout:g} s") from err
    try:
        versions = json.loads(done.stdout)["supportedVersions"]
    except (ValueError, KeyError, TypeError) as err:
        text = (done.stderr or done.stdout).decode(errors="replace").strip()[:300]
        raise InstallError(f"{program}: does not answer VERSION: exit status {done.returncode}, {text!r}") from err
    return tuple(versions)


def _place(store: Path, bundle: Bundle) -> tuple[str, bool]:
    """Find the bundle in the store or put it there; one that was damaged is left alone, for a plugin may run in it."""
    for attempt in range(_MAX_DAMAGED):
        candidate = f"{bundle.name}.{attempt}" if attempt else bundle.name
        if not (store / candidate).exists():
            _write(store / _TEMPORARY_NAME, bundle.members)
            (store / _TEMPORARY_NAME).rename(store / candidate)
            return candidate, True
        if _is_same(store / candidate, bundle):
            return candidate, False
    raise InstallError(f"{store}: {bundle.name} was damaged {_MAX_DAMAGED} times; remove what nobody runs")


def _is_same(directory: Path, bundle: Bundle) -> bool:
    try:
        return _read(directory) == bundle.members
    except InstallError:
        return False


def _write(directory: Path, members: Mapping[str, Member]) -> None:
    if directory.exists():
        shutil.rmtree(directory)  # of an installer that was killed
    directory.mkdir(mode=0o755)
    for name, member in members.items():
        path = directory / name
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if member.is_link:
            path.symlink_to(os.fsdecode(member.content))
            continue
        path.write_bytes(member.content)
        path.chmod(0o755 if member.is_executable else 0o644)


def _link(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.rename(link)


def _prune(store: Path, kept: list[str]) -> None:
    others = sorted(
        (path for path in store.iterdir() if path.name not in kept), key=lambda path: path.stat().st_mtime, reverse=True
    )
    for path in others[max(0, _KEPT - len(kept)) :]:
        shutil.rmtree(path)
