# SPDX-License-Identifier: Apache-2.0
"""Gathers what `trireme-install doctor` judges: directories, the plugin's answer, the daemon's socket, runtimes."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from trireme_install.bundle import check_program
from trireme_install.directory import read_listing
from trireme_install.doctor import Facts
from trireme_install.errors import InstallError
from trireme_install.netd import MAX_FILE_BYTES, PLUGIN
from trireme_install.runtimes import RuntimeSettings, decode_containerd, decode_crio, merged

_SOCKET_TIMEOUT_S = 2.0
_MAX_ANSWER_BYTES = 16 * 1024 * 1024
_CRIO = "crio"
"""Name of the directory that has CRI-O's settings."""
_MAX_FILES = 256
"""Of one runtime's settings, imports included."""


def examine(conf_dir: Path, bin_dir: Path, run_dir: Path, runtime_configs: tuple[Path, ...]) -> Facts:
    """Look at the node; raise InstallError if the configuration directory cannot be read."""
    runtimes, faults = _runtimes(runtime_configs)
    return Facts(
        conf_dir=str(conf_dir),
        bin_dir=str(bin_dir),
        listing=read_listing(conf_dir),
        program_fault=_program_fault(bin_dir / PLUGIN),
        daemon_fault=_daemon_fault(run_dir / "registration.sock"),
        unenforced=_unenforced(run_dir / "admin.sock"),
        runtimes=tuple(_named_as(settings, conf_dir, bin_dir) for settings in runtimes),
        runtime_faults=tuple(faults),
    )


def default_network(runtime_configs: tuple[Path, ...]) -> str | None:
    """Return the network that CRI-O is told to use; None if it uses that of the first file, or is not there.

    Raises InstallError if its settings cannot be read: the entry could go where no pod gets it.
    """
    runtimes, faults = _runtimes(tuple(path for path in runtime_configs if path.name == _CRIO))
    if faults:
        raise InstallError("; ".join(faults))
    return next((found.default_network for found in runtimes if found.default_network), None)


def _named_as(settings: RuntimeSettings, conf_dir: Path, bin_dir: Path) -> RuntimeSettings:
    """Name our directories as we do where the runtime means the same: a snap's `current` is a link to its revision."""

    def same(path: str, ours: Path) -> str:
        return str(ours) if Path(path).resolve() == ours.resolve() else path

    classes = tuple(
        replace(entry, conf_dir=None if entry.conf_dir is None else same(entry.conf_dir, conf_dir))
        for entry in settings.classes
    )
    return replace(
        settings,
        conf_dir=None if settings.conf_dir is None else same(settings.conf_dir, conf_dir),
        bin_dirs=tuple(same(path, bin_dir) for path in settings.bin_dirs),
        classes=classes,
    )


def _program_fault(program: Path) -> str | None:
    try:
        check_program(program)
    except InstallError as err:
        return str(err)
    return None


def _daemon_fault(path: Path) -> str | None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_SOCKET_TIMEOUT_S)
        try:
            connection.connect(str(path))
        except OSError as err:
            return f"{path}: {err.strerror or err}"
    return None


def _unenforced(path: Path) -> tuple[str, ...]:
    """Ask the daemon which pods started past it; none if it does not say (docs/registration.md, operators' socket)."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_SOCKET_TIMEOUT_S)
        try:
            connection.connect(str(path))
            connection.sendall(b'{"version":1,"command":"status"}\n')
            with connection.makefile("rb") as answer:
                found = json.loads(answer.readline(_MAX_ANSWER_BYTES))["result"]["unenforced_pods"]["past"]
        except (OSError, ValueError, LookupError, TypeError):
            return ()
    return tuple(map(str, found)) if isinstance(found, list) else ()


def _runtimes(paths: tuple[Path, ...]) -> tuple[list[RuntimeSettings], list[str]]:
    found: list[list[RuntimeSettings]] = []
    faults: list[str] = []
    for path in paths:
        if parts := list(_parts(path, faults)):
            found.append(parts)
    return [merged(parts) for parts in found], faults


def _parts(path: Path, faults: list[str]) -> Iterator[RuntimeSettings]:
    """Read a runtime's files in the order in which it lays them over one another; name those that cannot be read.

    containerd reads a file's imports after all that it already knows of, and none twice (LoadConfig in
    cmd/containerd/server/config/config.go). Its releases before 2.0 replace a plugin's whole section by that of a later
    file; here a later file's values lie over the earlier one's, as in those since.
    """
    pending, known = list(_files(path)), set[Path]()
    while pending and len(known) < _MAX_FILES:
        file, decode = pending.pop(0)
        if file in known:
            continue
        known.add(file)
        try:
            with file.open("rb") as stream:
                part = decode(str(file), stream.read(MAX_FILE_BYTES))
        except OSError as err:
            faults.append(f"{file}: cannot be read: {err.strerror}")
        except InstallError as err:
            faults.append(str(err))
        else:
            yield part
            pending += ((imported, decode) for name in part.imports for imported in _imported(file, name))


def _imported(file: Path, name: str) -> list[Path]:
    path = Path(os.path.normpath(file.parent / name))
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) if "*" in str(path) else [path]


def _files(path: Path) -> Iterator[tuple[Path, Callable[[str, bytes], RuntimeSettings]]]:
    """Yield a runtime's files with how to read them: containerd's file, or CRI-O's directory in its own order."""
    if path.name == _CRIO:
        for file in (path / "crio.conf", *sorted((path / "crio.conf.d").glob("*"))):
            if file.is_file():
                yield file, decode_crio
    elif path.is_file():
        yield path, decode_containerd
    elif path.is_dir():
        yield from ((file, decode_containerd) for file in sorted(path.glob("*.toml")))
