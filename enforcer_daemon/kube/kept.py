# SPDX-License-Identifier: Apache-2.0
"""What is in force, kept on disk, for a start without the API server: one file a kind, one line an object.

A file is replaced as a whole and synced, so that after a loss of power there is the old one or the new one. It holds
this node's pods, and never those of others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from enforcer_daemon.kube.resources import Resource, Value
from enforcer_daemon.kube.table import Entry, read_reduced
from enforcer_daemon.replacement import Replacement

_VERSION = 1
_MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Kept(Generic[Value]):
    """What a file had."""

    entries: tuple[Entry[Value], ...] = ()
    problem: str = ""
    """Why nothing, or not all, of it could be used."""
    is_there: bool = False


def file_of(directory: Path, resource: Resource[Any]) -> Path:
    """Return the path of a kind's file."""
    return directory / f"{resource.plural}.jsonl"


def load(directory: Path, resource: Resource[Value], scope: str) -> Kept[Value]:
    """Read a kind's file; one that another node, or another selection, wrote is not used."""
    path = file_of(directory, resource)
    try:
        if path.stat().st_size > _MAX_BYTES:
            return Kept(problem=f"{path}: larger than {_MAX_BYTES} bytes")
        with path.open("rb") as file:
            header = json.loads(file.readline())
            if header != _header(resource, scope):
                return Kept(problem=f"{path}: was kept for something else, and is not used")
            found = [read_reduced(resource, json.loads(line), {}, is_decoded=False) for line in file]
    except FileNotFoundError:
        return Kept()
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as err:
        return Kept(problem=f"{path}: cannot be read: {err}")
    entries = tuple(entry for entry in found if isinstance(entry, Entry) and entry.value is not None)
    unread = len(found) - sum(bool(entry.document) for entry in entries)
    return Kept(entries, f"{path}: {unread} objects cannot be used" if unread else "", not unread)


def save(directory: Path, resource: Resource[Any], scope: str, documents: Iterable[bytes]) -> None:
    """Write a kind's file; raise OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = file_of(directory, resource)
    with Replacement(path) as file:
        file.write(json.dumps(_header(resource, scope)).encode() + b"\n")
        for document in documents:
            file.write(document + b"\n")
        file.commit()


def _header(resource: Resource[Any], scope: str) -> dict[str, object]:
    return {"version": _VERSION, "resource": resource.plural, "scope": scope}


def documents(entries: Iterable[Entry[Any]]) -> list[bytes]:
    """Return what is to be written of a table."""
    return [entry.document for entry in entries if entry.document]
