# SPDX-License-Identifier: Apache-2.0
"""Splits YAML and JSON text into documents, as kubectl reads them, and remembers the line of every field.

The differences from a plain YAML parser are those of Kubernetes: scalars mean what `scalars.py` says, keys become
strings, merges count in the order of the fields, and each document may begin with a byte order mark. Stricter than
kubectl: a key that occurs twice is an error, and so is a tag of no meaning here.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import yaml

from enforcer_daemon.errors import EnforcerError
from enforcer_daemon.scalars import Scalar, ScalarError, field_name, json_number, resolve, resolve_key, resolve_tagged

_MAX_DEPTH = 100
"""Nesting of a document; Kubernetes objects stay below 20."""
_CERTAINLY_SHALLOW = 1_000
"""Nesting that the C parser, which recurses, bears on every stack; text that could be deeper is counted first."""
_MAX_REPEATED = 100_000
"""Values that aliases may repeat in one file; kubectl refuses excessive aliasing too. A few lines could otherwise
stand for more than memory holds."""
_HALF_SURROGATE = re.compile("[\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"
_PLAIN = "plain"
"""In place of a tag: a scalar without quotes and without a tag of its own."""
_MERGE = "<<"
_TAGS = ("str", "timestamp", "null", "bool", "int", "float")
"""Tags that a scalar may have."""
_PATH_STEP = re.compile(r"\[(\d+)\]\.?")


class _Loader(yaml.CSafeLoader):
    """Composes nodes whose plain scalars are left for scalars.py to read."""

    yaml_implicit_resolvers = {None: [(_PLAIN, re.compile(""))]}  # noqa: RUF012 - as in yaml


class DocumentError(EnforcerError):
    """Text that is no YAML or JSON; `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True, slots=True)
class Document:
    """One document, or what is wrong with it."""

    line: int
    manifest: object = None
    error: str = ""
    """Why it has no manifest; empty if it has."""
    node: yaml.Node | None = None
    """Where its fields are; None for JSON."""

    def line_of(self, field: str) -> int:
        """Return the line of a field, or of the innermost object around it that there is."""
        if self.node is None:
            return self.line
        node, line, rest = self.node, self.line, field
        while rest:
            found = _descend(node, rest)
            if found is None:
                break
            node, line, rest = found
        return line

    def item(self, index: int, manifest: object) -> Document:
        """Return an entry of this document's `items` as a document of its own."""
        if self.node is None:
            return Document(self.line, manifest)
        found = _descend(self.node, f"items[{index}]")
        entry = None if found is None else _descend(found[0], found[2])
        return Document(self.line if entry is None else entry[1], manifest, node=None if entry is None else entry[0])


def _descend(node: yaml.Node, path: str) -> tuple[yaml.Node, int, str] | None:
    """Take one step of a field path; give the node there, its line, and the rest of the path."""
    if isinstance(node, yaml.SequenceNode):
        step = _PATH_STEP.match(path)
        if step is None or int(step[1]) >= len(node.value):
            return None
        entry = node.value[int(step[1])]
        return entry, entry.start_mark.line + 1, path[step.end() :]
    if isinstance(node, yaml.MappingNode):
        # Keys may contain dots themselves, so the longest that fits is meant.
        for key, value in sorted(node.value, key=lambda pair: -len(str(pair[0].value))):
            rest = path.removeprefix(str(key.value))
            if rest != path and (not rest or rest[0] in ".["):
                return value, key.start_mark.line + 1, rest.removeprefix(".")
    return None


def decode_text(content: bytes) -> str:
    """Return a file's text: UTF-8, or UTF-16 with a byte order mark, as editors on Windows write it.

    Raise UnicodeDecodeError.
    """
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig")


def read_documents(text: str, *, is_json: bool) -> list[Document]:
    """Split text into documents, empty ones left out; raise DocumentError if it cannot be parsed at all."""
    try:
        return list(_json_documents(text) if is_json else _yaml_documents(text))
    except RecursionError as err:
        raise DocumentError(1, f"nested more than {_MAX_DEPTH} deep") from err


def read_document(text: str) -> object:
    """Return what a YAML file of one document says, None if it is empty; raise DocumentError."""
    documents = read_documents(text, is_json=False)
    if len(documents) > 1:
        raise DocumentError(documents[1].line, "a second document begins; the file must be one")
    if documents and documents[0].error:
        raise DocumentError(documents[0].line, documents[0].error)
    return documents[0].manifest if documents else None


def _json_documents(text: str) -> Iterator[Document]:
    decoder = json.JSONDecoder(
        object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant, parse_float=_json_float
    )
    line, counted = 1, 0
    position = _skip_space(text, 0)
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        try:
            manifest, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as err:
            raise DocumentError(err.lineno, f"not JSON: {err.msg}") from err
        except ValueError as err:
            raise DocumentError(line, str(err)) from err
        _require_plain(manifest, line)
        if manifest is not None:
            yield Document(line, manifest)
        position = _skip_space(text, end)


def _require_plain(value: object, line: int, depth: int = 0) -> None:
    """Refuse what JSON can spell and nobody can use: values deeper than YAML's may be, and halves of characters."""
    if depth > _MAX_DEPTH:
        raise DocumentError(line, f"nested more than {_MAX_DEPTH} deep")
    if isinstance(value, str):
        if not value.isascii() and _HALF_SURROGATE.search(value):
            raise DocumentError(line, f"not JSON: {value[:40]!a} has half of a surrogate pair")
    elif isinstance(value, dict):
        for key, entry in value.items():
            _require_plain(key, line, depth)
            _require_plain(entry, line, depth + 1)
    elif isinstance(value, list):
        for entry in value:
            _require_plain(entry, line, depth + 1)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _unique_pairs(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f'duplicate field "{key}"')
            seen.add(key)
    return result


def _refuse_constant(name: str) -> object:
    raise ValueError(f"not JSON: {name}")


def _json_float(text: str) -> int | float:
    try:
        return json_number(float(text))
    except ScalarError as err:
        raise ValueError(f"not JSON: cannot read {text[:40]}") from err


def _yaml_documents(text: str) -> Iterator[Document]:
    text = _without_marks(text)
    try:
        _require_shallow(text)
        # Composing builds nodes only; no object is made of them by yaml.
        nodes = list(yaml.compose_all(text, Loader=_Loader))
    except yaml.MarkedYAMLError as err:
        line = err.problem_mark.line + 1 if err.problem_mark is not None else 1
        raise DocumentError(line, f"not YAML: {err.problem or err.context}") from err
    except yaml.YAMLError as err:
        raise DocumentError(1, f"not YAML: {err}") from err
    constructor = _Constructor()
    for node in nodes:
        line = node.start_mark.line + 1
        try:
            manifest = constructor.construct(node)
        except DocumentError as err:
            yield Document(err.line, error=str(err), node=node)
            continue
        if manifest is not None:
            yield Document(line, manifest, node=node)


def _without_marks(text: str) -> str:
    """Return the text without the byte order marks before its documents: files that were joined have several."""
    if "\ufeff" not in text:
        return text
    lines = text.split("\n")
    is_start = True
    for index, line in enumerate(lines):
        is_separator = line.removeprefix("\ufeff").startswith("---")
        if line.startswith("\ufeff") and (is_start or is_separator):
            lines[index] = line[1:]
        is_start = is_separator
    return "\n".join(lines)


def _require_shallow(text: str) -> None:
    """Raise DocumentError for nesting that would overflow the C stack; read as events, which need none."""
    # A collection within another opens with a bracket, or begins on a later column (a list in a mapping on the same).
    longest_line = max(map(len, text.split("\n")))
    if text.count("[") + text.count("{") + 2 * longest_line < _CERTAINLY_SHALLOW:
        return
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH + 1:
                line = 1 if event.start_mark is None else event.start_mark.line + 1
                raise DocumentError(line, f"nested more than {_MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _Constructor:
    """Makes plain values of a file's nodes; an aliased node becomes one shared value."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[object, int]] = {}
        """Each node's value, and of how many values it consists."""
        self._size = 0
        """Values so far, each as often as it occurs."""
        self._repeated = 0

    def construct(self, node: yaml.Node, depth: int = 0) -> object:
        if depth > _MAX_DEPTH:
            raise _error(node, f"nested more than {_MAX_DEPTH} deep")
        if id(node) in self._made:
            value, size = self._made[id(node)]
            self._repeated += size
            self._size += size
            if self._repeated > _MAX_REPEATED:
                raise _error(node, f"aliases repeat more than {_MAX_REPEATED} values")
            return value
        before = self._size
        self._size += 1
        value = self._make(node, depth)
        self._made[id(node)] = value, self._size - before
        return value

    def _make(self, node: yaml.Node, depth: int) -> object:
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.construct(entry, depth + 1) for entry in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, depth)
        raise _error(node, f"the tag {node.tag} has no meaning here")

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, object]:
        fields: dict[str, object] = {}
        own: set[str] = set()
        for key_node, value_node in node.value:
            value = self.construct(value_node, depth + 1)
            if key_node.tag == _TAG + "merge" or (key_node.tag == _PLAIN and key_node.value == _MERGE):
                # As go-yaml v2 has it, a merge replaces the fields before it, and the first of its sources counts.
                for source in reversed(value) if isinstance(value, list) else [value]:
                    if not isinstance(source, Mapping):
                        raise _error(value_node, "<< merges mappings only")
                    fields.update(source)
                continue
            key = _key(key_node)
            if key in own:
                raise _error(key_node, f'duplicate field "{key}"')
            own.add(key)
            fields[key] = value
        return fields


def _key(node: yaml.Node) -> str:
    key = None
    if isinstance(node, yaml.ScalarNode):
        key = resolve_key(node.value) if node.tag == _PLAIN else field_name(_scalar(node))
    if key is None:
        raise _error(node, "field names must be strings")
    return key


def _scalar(node: yaml.ScalarNode) -> Scalar:
    text: str = node.value
    kind = node.tag.removeprefix(_TAG)
    if node.tag != _PLAIN and kind not in _TAGS:
        raise _error(node, f"the tag {node.tag} has no meaning here")
    try:
        return resolve(text) if node.tag == _PLAIN else resolve_tagged(kind, text)
    except ScalarError as err:
        raise _error(node, f"cannot read {text[:40]!r}") from err


def _error(node: yaml.Node, message: str) -> DocumentError:
    return DocumentError(node.start_mark.line + 1, message)
