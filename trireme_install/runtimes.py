# SPDX-License-Identifier: Apache-2.0
"""What containerd's and CRI-O's settings say of CNI, and which of their runtime classes our rules do not reach. Pure.

Sources: containerd, docs/cri/config.md (sections named io.containerd.grpc.v1.cri up to version 2 of the file,
io.containerd.cri.v1.runtime from 3 on); CRI-O, crio.conf(5).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trireme_install.errors import InstallError
from trireme_install.netd import Runtime

_CRI_SECTIONS = ("io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri", "cri")
_BYPASSING = {
    "runsc": "gVisor has a network stack of its own above the pod's interface",
    "kata": "Kata passes frames to its virtual machine by tc, before netfilter",
}


@dataclass(frozen=True, slots=True)
class RuntimeClass:
    """A runtime that pods can ask for."""

    name: str
    bypass: str
    """Why packets of its pods do not pass the namespace's netfilter hooks; empty if they do."""
    conf_dir: str | None = None
    """Its own CNI directory, where it has one."""


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """What a runtime's configuration says; None if it says nothing, and the runtime's default holds."""

    runtime: Runtime
    source: str
    conf_dir: str | None = None
    bin_dirs: tuple[str, ...] = ()
    max_conf_num: int | None = None
    default_network: str | None = None
    """CRI-O's cni_default_network: it then uses this network, whatever sorts first."""
    classes: tuple[RuntimeClass, ...] = ()
    imports: tuple[str, ...] = ()
    """containerd's further files, as they are written: patterns, relative to the file's directory or absolute."""


def decode_containerd(source: str, data: bytes) -> RuntimeSettings:
    """Read a config.toml; raise InstallError."""
    tree = _decode(source, data)
    plugins, imports = _table(tree, "plugins"), tree.get("imports")
    sections = [_table(plugins, name) for name in _CRI_SECTIONS if name in plugins]
    cni = {key: value for section in reversed(sections) for key, value in _table(section, "cni").items()}
    listed = cni.get("bin_dirs")
    bin_dirs = listed if isinstance(listed, list) and listed else [cni.get("bin_dir")]
    most = cni.get("max_conf_num")
    return RuntimeSettings(
        Runtime.CONTAINERD,
        source,
        _text(cni, "conf_dir"),
        tuple(path for path in bin_dirs if isinstance(path, str) and path),
        most if isinstance(most, int) else None,
        classes=tuple(entry for section in sections for entry in _containerd_classes(section)),
        imports=tuple(path for path in imports if isinstance(path, str)) if isinstance(imports, list) else (),
    )


def decode_crio(source: str, data: bytes) -> RuntimeSettings:
    """Read a crio.conf or a file of crio.conf.d; raise InstallError."""
    crio = _table(_decode(source, data), "crio")
    network, runtime = _table(crio, "network"), _table(crio, "runtime")
    listed = network.get("plugin_dirs")
    classes = (
        RuntimeClass(name, _bypass(name, str(entry.get("runtime_path", "")), str(entry.get("runtime_type", ""))))
        for name, entry in _tables(_table(runtime, "runtimes"))
    )
    return RuntimeSettings(
        Runtime.CRIO,
        source,
        _text(network, "network_dir"),
        tuple(path for path in listed if isinstance(path, str)) if isinstance(listed, list) else (),
        default_network=_text(network, "cni_default_network"),
        classes=tuple(classes),
    )


def merged(parts: list[RuntimeSettings]) -> RuntimeSettings:
    """Lay a runtime's files over one another; a later one wins."""
    result = parts[0]
    for part in parts[1:]:
        result = RuntimeSettings(
            part.runtime,
            f"{result.source}, {part.source}",
            part.conf_dir or result.conf_dir,
            part.bin_dirs or result.bin_dirs,
            result.max_conf_num if part.max_conf_num is None else part.max_conf_num,
            part.default_network or result.default_network,
            tuple({entry.name: entry for entry in (*result.classes, *part.classes)}.values()),
        )
    return result


def _containerd_classes(section: Mapping[str, Any]) -> Iterator[RuntimeClass]:
    for name, entry in _tables(_table(_table(section, "containerd"), "runtimes")):
        yield RuntimeClass(name, _bypass(name, str(entry.get("runtime_type", ""))), _text(entry, "cni_conf_dir"))


def _bypass(*texts: str) -> str:
    return next((why for word, why in _BYPASSING.items() if any(word in text.lower() for text in texts)), "")


def _decode(source: str, data: bytes) -> dict[str, Any]:
    try:
        return tomllib.loads(data.decode())
    except ValueError as err:
        raise InstallError(f"{source}: not TOML: {err}") from err


def _table(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def _tables(tree: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from ((name, entry) for name, entry in tree.items() if isinstance(entry, dict))


def _text(tree: Mapping[str, Any], key: str) -> str | None:
    value = tree.get(key)
    return value if isinstance(value, str) and value else None
