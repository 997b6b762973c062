# SPDX-License-Identifier: Apache-2.0
"""The objects of one kind as they are in force: the last good version of each, and what is wrong with the present one.

An entry is made where the object is read (which may be a thread), and put into its table on the event loop.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Generic

from enforcer_daemon.kube.resources import Manifest, Resource, Value
from enforcer_daemon.kube.stored import StoredPolicy
from enforcer_daemon.policy import InvalidObjectError
from enforcer_daemon.sources.manifests import Problem

Key = tuple[str, str]
"""Namespace (empty for what has none) and name."""
_MAX_PROBLEMS = 10
"""Problems of one object that are told."""


@dataclass(frozen=True, slots=True)
class Entry(Generic[Value]):
    """One object."""

    key: Key
    value: Value | None
    """None: no version of it was good."""
    document: bytes
    """What was kept of the version that `value` is of, as JSON; empty if none was good: then `value` stands in."""
    problems: tuple[Problem, ...] = ()
    """Of the present version, where it is refused."""
    uid: str = field(default="", compare=False)
    """The API server's; empty of what was kept on disk."""
    version: str = field(default="", compare=False)
    """The API server's resourceVersion; empty of what was kept on disk."""
    warnings: tuple[Problem, ...] = field(default=(), compare=False)
    """What an API server no longer accepts in a new object, and was read as in older versions."""


def read_key(manifest: object) -> Key | None:
    """Return which object it is; None if that cannot be told."""
    metadata = manifest.get("metadata") if isinstance(manifest, Mapping) else None
    if not isinstance(metadata, Mapping):
        return None
    namespace, name = metadata.get("namespace") or "", metadata.get("name")
    return (namespace, name) if isinstance(namespace, str) and isinstance(name, str) and name else None


def read_entry(
    resource: Resource[Value], manifest: Manifest, known: Mapping[Key, Entry[Value]], *, is_decoded: bool = True
) -> Entry[Value] | Problem:
    """Read an object; a bad one keeps the value that is known, a Problem is one that nobody can name.

    Without `is_decoded`, one of a kind that is stored as bytes is taken for good unseen.
    """
    if read_key(manifest) is None:
        return Problem(resource.plural, 0, "", "metadata", "an object without a name was refused", False)
    entry = read_reduced(resource, resource.reduce(manifest), known, is_decoded=is_decoded)
    if not isinstance(entry, Entry):
        return entry
    uid, version = _metadata(manifest, "uid"), _metadata(manifest, "resourceVersion")
    return entry if (entry.uid, entry.version) == (uid, version) else replace(entry, uid=uid, version=version)


def _metadata(manifest: Manifest, name: str) -> str:
    metadata = manifest.get("metadata")
    value = metadata.get(name) if isinstance(metadata, Mapping) else None
    return value if isinstance(value, str) else ""


def read_reduced(
    resource: Resource[Value], reduced: Manifest, known: Mapping[Key, Entry[Value]], *, is_decoded: bool = True
) -> Entry[Value] | Problem:
    """Read what was left of an object, as `read_entry` does."""
    key = read_key(reduced)
    if key is None:
        return Problem(resource.plural, 0, "", "metadata", "an object without a name was refused", False)
    document = json.dumps(reduced, separators=(",", ":")).encode()
    before = known.get(key)
    if before is not None and before.document == document:
        return replace(before, problems=())
    if not is_decoded and resource.store is not None:
        return Entry(key, resource.store(key, document, None), document)
    try:
        return Entry(key, resource.decode(reduced), document)
    except InvalidObjectError as err:
        if resource.decode_stored is not None:
            with suppress(InvalidObjectError):
                warnings = _problems(resource, key, err, None)
                return Entry(key, resource.decode_stored(reduced), document, warnings=warnings)
        has_earlier = before is not None and bool(before.document)
        problems = _problems(resource, key, err, has_earlier)
        if before is None or not has_earlier:
            return Entry(key, resource.stand_in(reduced), b"", problems)
        return replace(before, problems=problems)


def _problems(
    resource: Resource[Value], key: Key, err: InvalidObjectError, has_earlier: bool | None
) -> tuple[Problem, ...]:
    label = f"{resource.kind} {'/'.join(filter(None, key))}"
    told = err.problems[:_MAX_PROBLEMS]
    return tuple(Problem(resource.plural, 0, label, p.field, p.message, has_earlier) for p in told)


class Table(Generic[Value]):
    """The objects of one kind. For the event loop alone, but that threads may read `entries`."""

    def __init__(
        self, resource: Resource[Value], on_put: Callable[[Key, Value | None], None] = lambda _key, _value: None
    ) -> None:
        """`on_put` is told of each object that changed; None: it is gone, or no version of it was good."""
        self.resource = resource
        self._on_put = on_put
        self.entries: dict[Key, Entry[Value]] = {}
        self.revision = 0
        """Rises with each change of what is in force or refused."""
        self._changed: dict[Key, None] = {}
        self._unnamed: tuple[Problem, ...] = ()
        self._bad: dict[Key, tuple[Problem, ...]] = {}

    def put(self, entry: Entry[Value] | Problem) -> bool:
        """Take an object as it is now; tell whether anything changed."""
        if isinstance(entry, Problem):
            return self._refuse_unnamed((entry,))
        before = self.entries.get(entry.key)
        self.entries[entry.key] = entry = self._stored(entry)
        is_known = before is not None and before.document == entry.document and before.problems == entry.problems
        if is_known and before is not None and (entry.document or before.value == entry.value):
            # At most its UID and version are new, and its value was decoded once more.
            self.entries[entry.key] = replace(entry, value=before.value)
            return False
        self._bad.pop(entry.key, None)
        if entry.problems:
            self._bad[entry.key] = entry.problems
        self._changed[entry.key] = None
        self.revision += 1
        self._on_put(entry.key, entry.value)
        return True

    def take_changed(self) -> list[Value]:
        """Return what is in force of the objects that changed since the last call."""
        changed, self._changed = self._changed, {}
        found = (self.entries.get(key) for key in changed)
        return [entry.value for entry in found if entry is not None and entry.value is not None]

    def _stored(self, entry: Entry[Value]) -> Entry[Value]:
        """Return an entry with its value as it is kept; what is refused, and stands in, stays as it is."""
        store = self.resource.store
        if store is None or entry.value is None or not entry.document or isinstance(entry.value, StoredPolicy):
            return entry
        return replace(entry, value=store(entry.key, entry.document, entry.value))

    def checked(self, entry: Entry[Value]) -> Entry[Value] | Problem:
        """Decode an entry that was taken for good unseen; for threads."""
        found = read_reduced(self.resource, json.loads(entry.document), {})
        return replace(found, uid=entry.uid) if isinstance(found, Entry) else found

    def remove(self, key: Key) -> bool:
        """Forget an object; tell whether it was there."""
        if self.entries.pop(key, None) is None:
            return False
        self._bad.pop(key, None)
        self.revision += 1
        self._on_put(key, None)
        return True

    def replace(self, found: Iterable[Entry[Value] | Problem]) -> bool:
        """Take a complete list: what is not in it is gone. Tell whether anything changed."""
        entries = list(found)
        is_changed = self._refuse_unnamed(tuple(entry for entry in entries if isinstance(entry, Problem)))
        wanted = {entry.key for entry in entries if isinstance(entry, Entry)}
        for key in [key for key in self.entries if key not in wanted]:
            is_changed |= self.remove(key)
        for entry in entries:
            if isinstance(entry, Entry):
                is_changed |= self.put(entry)
        return is_changed

    def replace_namespace(self, namespace: str, found: Iterable[Entry[Value] | Problem]) -> bool:
        """Take the complete list of a namespace, as `replace` does; one that nobody can name is left out."""
        entries = [entry for entry in found if isinstance(entry, Entry) and entry.key[0] == namespace]
        wanted = {entry.key for entry in entries}
        gone = [key for key in self.entries if key[0] == namespace and key not in wanted]
        changes = [self.remove(key) for key in gone] + [self.put(entry) for entry in entries]
        return any(changes)

    def values(self) -> list[Value]:
        """Return what is in force."""
        return [entry.value for entry in self.entries.values() if entry.value is not None]

    def problems(self) -> tuple[Problem, ...]:
        """Return what is refused."""
        return (*self._unnamed, *(problem for problems in self._bad.values() for problem in problems))

    def refused(self) -> list[Entry[Value]]:
        """Return the objects whose present version is refused."""
        return [self.entries[key] for key in self._bad]

    def warnings(self) -> tuple[Problem, ...]:
        """Return what is in force although an API server would not take it any more."""
        return tuple(warning for entry in self.entries.values() for warning in entry.warnings)

    def _refuse_unnamed(self, problems: tuple[Problem, ...]) -> bool:
        if problems == self._unnamed:
            return False
        self._unnamed = problems
        self.revision += 1
        return True
