# SPDX-License-Identifier: Apache-2.0
"""The network configuration on standard input: our entry of the conflist, with what the runtime adds to it.

An unknown key is an error that names it, as in the daemon's settings, so that a typing error does not pass for a
setting; keys with a `/` belong to others and are passed over. DEL alone takes any configuration (`read_run_dir`).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from cni_plugin import messages, spec
from cni_plugin.spec import CniError

if TYPE_CHECKING:
    from typing import BinaryIO

DEFAULT_RUN_DIR = "/run/trireme"
DEFAULT_ADD_TIMEOUT_S = 10.0
MAX_RUN_DIR_BYTES = 88
"""The kernel takes socket paths of 107 bytes; ours is /registration.sock in this directory."""
MAX_CONFIG_BYTES = 4 * 1024 * 1024
"""A prevResult and the valid attachments of a node take tens of kilobytes."""

_OWN_KEYS = ("runDir", "excludedNamespaces", "addTimeoutSeconds", "logFile")
_STANDARD_KEYS = (
    "cniVersion",
    "name",
    "type",
    "args",
    "capabilities",
    "runtimeConfig",
    "prevResult",
    "disableCheck",
    "disableGC",
    "ipMasq",
    "ipam",
    "dns",
)
_KNOWN_KEYS = frozenset(_OWN_KEYS + _STANDARD_KEYS)
_VALID_ATTACHMENTS = ("cni.dev/valid-attachments", "cni.dev/attachments")
_ABSENT = object()


class Config(NamedTuple):
    """A checked configuration."""

    version: str
    network: str
    run_dir: str
    """Directory of the daemon's socket, and of the queue of deletions."""
    excluded_namespaces: frozenset[str]
    """Kubernetes namespaces whose pods are passed through, not enforced."""
    add_timeout_s: float
    """How long an ADD tries to reach a ready daemon, seconds."""
    log_file: str | None
    labels: dict[str, str]
    """args.cni.labels: the pod's labels where the runtime knows them; empty else."""
    prev_result: object
    """None if there is none."""
    valid_attachments: tuple[messages.Attachment, ...] | None
    """What GC is to keep; None if the runtime gave no information."""


def read_bytes(stdin: BinaryIO) -> bytes:
    """Read all of standard input; raise CniError (5)."""
    try:
        data = stdin.read(MAX_CONFIG_BYTES + 1)
    except OSError as err:
        raise CniError(spec.IO_FAILURE, f"standard input: {err.strerror}") from err
    if len(data) > MAX_CONFIG_BYTES:
        raise CniError(spec.IO_FAILURE, f"standard input: more than {MAX_CONFIG_BYTES} bytes")
    return data


def read_object(data: bytes) -> dict[str, object]:
    """Decode the JSON object; raise CniError (6)."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as err:
        raise CniError(spec.UNDECODABLE, f"standard input: not JSON: {err}") from err
    if not isinstance(tree, dict):
        raise CniError(spec.UNDECODABLE, "standard input: must be a JSON object")
    return tree


def read_version(tree: dict[str, object], command: str) -> str:
    """Return the configuration's version; raise CniError (1, 7) where we do not speak it or it lacks the command."""
    version = tree.get("cniVersion", "0.1.0")  # the specification's default, of before it had this field
    if not isinstance(version, str):
        raise _invalid("cniVersion", "must be a string")
    if version not in spec.SUPPORTED_VERSIONS:
        supported = ", ".join(spec.SUPPORTED_VERSIONS)
        raise CniError(spec.INCOMPATIBLE_VERSION, f"cniVersion: {version[:20]!r} is none of {supported}")
    first = spec.FIRST_VERSION_OF.get(command, version)
    if spec.SUPPORTED_VERSIONS.index(version) < spec.SUPPORTED_VERSIONS.index(first):
        raise CniError(spec.INCOMPATIBLE_VERSION, f"cniVersion: {version} has no {command}; it came with {first}")
    return version


def read_config(tree: dict[str, object], version: str) -> Config:
    """Check every key; raise CniError (7) that names the one at fault."""
    for key in tree:
        if key not in _KNOWN_KEYS and "/" not in key:
            raise _invalid(key, f"unknown key; ours are {', '.join(_OWN_KEYS)}")
    network = _text(tree, "name")
    if fault := messages.network_fault(network):
        raise _invalid("name", fault)
    log_file = tree.get("logFile")
    return Config(
        version=version,
        network=network,
        run_dir=_run_dir(tree.get("runDir", DEFAULT_RUN_DIR)),
        excluded_namespaces=_excluded(tree.get("excludedNamespaces", [])),
        add_timeout_s=_seconds(tree.get("addTimeoutSeconds", DEFAULT_ADD_TIMEOUT_S), "addTimeoutSeconds"),
        log_file=None if log_file is None else _path(log_file, "logFile"),
        labels=_labels(tree),
        prev_result=tree.get("prevResult"),
        valid_attachments=_valid_attachments(tree),
    )


def read_run_dir(tree: dict[str, object]) -> str:
    """Return what a DEL needs, whatever else is wrong with the configuration."""
    return _path_or_none(tree.get("runDir")) or DEFAULT_RUN_DIR


def read_log_file(tree: dict[str, object]) -> str | None:
    """Return the log file, whatever else is wrong with the configuration."""
    return _path_or_none(tree.get("logFile"))


def _invalid(key: str, problem: str) -> CniError:
    return CniError(spec.INVALID_CONFIG, f"{key}: {problem}")


def _text(tree: dict[str, object], key: str) -> str:
    value = tree.get(key)
    if not isinstance(value, str):
        raise _invalid(key, "is missing" if value is None else "must be a string")
    return value


def _path(value: object, key: str) -> str:
    path = _path_or_none(value)
    if path is None:
        raise _invalid(key, "must be an absolute path")
    return path


def _path_or_none(value: object) -> str | None:
    return value if isinstance(value, str) and value.startswith("/") and messages.is_text(value) else None


def _run_dir(value: object) -> str:
    run_dir = _path(value, "runDir")
    if len(run_dir.encode()) > MAX_RUN_DIR_BYTES:
        raise _invalid("runDir", f"must not have more than {MAX_RUN_DIR_BYTES} bytes: a socket's path is short")
    return run_dir


def _seconds(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 120:
        raise _invalid(key, "must be a number of seconds, more than 0 and at most 120")
    return float(value)


def _excluded(value: object) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise _invalid("excludedNamespaces", "must be a list of namespaces")
    return frozenset(value)


def _labels(tree: dict[str, object]) -> dict[str, str]:
    """Read args.cni.labels: a map, or the list of {"key", "value"} of the CNI conventions."""
    args = tree.get("args", {})
    cni = args.get("cni", {}) if isinstance(args, dict) else {}
    labels = cni.get("labels", {}) if isinstance(cni, dict) else {}
    if isinstance(labels, list):
        pairs = [(item.get("key"), item.get("value")) if isinstance(item, dict) else (None, None) for item in labels]
    elif isinstance(labels, dict):
        pairs = list(labels.items())
    else:
        raise _invalid("args.cni.labels", 'must be a map, or a list of {"key": ..., "value": ...}')
    read: dict[str, str] = {}
    for key, value in pairs:
        if not isinstance(key, str) or not isinstance(value, str) or not key or key in read:
            raise _invalid("args.cni.labels", f"{key!r}: key and value must be strings, each key once")
        read[key] = value
    if len(read) > messages.MAX_LABELS:
        raise _invalid("args.cni.labels", f"must not have more than {messages.MAX_LABELS} entries")
    return read


def _valid_attachments(tree: dict[str, object]) -> tuple[messages.Attachment, ...] | None:
    """Read what GC keeps: absent means no information, null and [] mean none (spec, "Garbage-collection")."""
    key, listed = next(((key, tree[key]) for key in _VALID_ATTACHMENTS if key in tree), ("", _ABSENT))
    if listed is _ABSENT:
        return None
    if listed is None:
        return ()
    if not isinstance(listed, list):
        raise _invalid(key, "must be a list")
    return tuple(_attachment(entry, f"{key}[{index}]") for index, entry in enumerate(listed))


def _attachment(entry: object, path: str) -> messages.Attachment:
    container_id = entry.get("containerID") if isinstance(entry, dict) else None
    ifname = entry.get("ifname") if isinstance(entry, dict) else None
    if not isinstance(container_id, str) or not isinstance(ifname, str):
        raise _invalid(path, "must have containerID and ifname")
    if fault := messages.container_id_fault(container_id) or messages.ifname_fault(ifname):
        raise _invalid(path, fault)
    return messages.Attachment(container_id, ifname)
