# SPDX-License-Identifier: Apache-2.0
"""The last good versions of objects on disk, for the daemon that comes after this one.

One file for each file of the source that has objects in force: a List of their manifests, as they last were good. It is
not synchronised to the disk: after a power failure it may be damaged, which is reported, and only counts for objects
that are bad at the same time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from enforcer_daemon.replacement import DRAFT_SUFFIX, replace_file
from enforcer_daemon.sources.manifests import (
    KubernetesObject,
    ObjectKey,
    Problem,
    decode_file,
    good_manifests,
    load_bytes,
)

GoodObjects = Mapping[ObjectKey, tuple[str, KubernetesObject]]
"""Objects, each with the path of the file that it is from."""


class LastGood:
    """A directory of the daemon's own (0700), for one source directory."""

    def __init__(self, directory: Path, source: Path) -> None:
        self._directory = directory
        self._source = source
        self._kept: dict[str, dict[ObjectKey, KubernetesObject]] | None = None
        """By file of the source, what its file here holds; None: not known, everything is written."""

    def load(self) -> tuple[dict[ObjectKey, tuple[str, KubernetesObject]], list[Problem]]:
        """Return what an earlier daemon kept, and what of it cannot be read."""
        found: dict[ObjectKey, tuple[str, KubernetesObject]] = {}
        problems = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                content = load_bytes(path)
                source = self._source / _file_of(content)
            except (OSError, ValueError) as err:
                problems.append(_problem(path, f"cannot be read: {err}"))
                continue
            file = decode_file(str(path), content)
            problems += [_problem(path, f"not used: {problem}") for entry in file.entries for problem in entry.problems]
            for entry in file.entries:
                if entry.key is not None and entry.object is not None:
                    found[entry.key] = (str(source), entry.object)
        return found, problems

    def keep(self, good: GoodObjects, contents: Mapping[str, bytes]) -> list[Problem]:
        """Write what changed since the last call, and remove the rest; give what could not be written.

        `contents` holds each file of the source as it was last read.
        """
        wanted: dict[str, dict[ObjectKey, KubernetesObject]] = {}
        for key, (name, found) in good.items():
            wanted.setdefault(name, {})[key] = found
        problems = []
        written = self._kept or {}
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._remove_all_but({self._path(name) for name in wanted})
        except OSError as err:
            problems.append(_problem(self._directory, f"cannot be kept: {err}"))
        for name, objects in wanted.items():
            if written.get(name) == objects:
                continue
            try:
                self._write(name, objects, contents.get(name, b""))
            except (OSError, ValueError) as err:
                problems.append(_problem(self._path(name), f"of {name} cannot be kept: {err}"))
        self._kept = None if problems else wanted
        return problems

    def _write(self, name: str, objects: Mapping[ObjectKey, KubernetesObject], content: bytes) -> None:
        path = self._path(name)
        good = good_manifests(name, content)
        if any(key not in good for key in objects):
            # Bad now, or the file as a whole is: what was kept before is still the last good version.
            good = {**self._manifests(path), **good}
        items = [good[key] for key in objects if key in good]
        tree = {"apiVersion": "v1", "kind": "List", "file": Path(name).name, "items": items}
        replace_file(path, json.dumps(tree, allow_nan=False).encode())

    def _manifests(self, path: Path) -> dict[ObjectKey, object]:
        try:
            return good_manifests(str(path), load_bytes(path))
        except FileNotFoundError:
            return {}

    def _remove_all_but(self, paths: set[Path]) -> None:
        for path in self._directory.iterdir():
            if path not in paths and path.suffix in (".json", DRAFT_SUFFIX):
                path.unlink()

    def _path(self, name: str) -> Path:
        # A name of the source may be too long to be part of another, or end in .yaml.
        return self._directory / f"{hashlib.sha256(Path(name).name.encode()).hexdigest()[:32]}.json"


def _file_of(content: bytes) -> str:
    tree = json.loads(content)
    name = tree.get("file") if isinstance(tree, dict) else None
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError("file: must be the name of a file")
    return name


def _problem(path: Path, message: str) -> Problem:
    return Problem(str(path), 0, "", "", f"last good versions: {message}")
