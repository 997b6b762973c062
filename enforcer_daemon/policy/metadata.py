# SPDX-License-Identifier: Apache-2.0
"""What all Kubernetes objects share: apiVersion, kind, metadata and label selectors, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from enforcer_daemon.policy.objects import Operator, Requirement, Selector
from enforcer_daemon.policy.reader import Reader, child
from enforcer_daemon.policy.syntax import check_dns_label, check_dns_subdomain, check_label_key, check_label_value

DEFAULT_NAMESPACE = "default"
_METADATA_FIELDS = frozenset({
    "annotations", "creationTimestamp", "deletionGracePeriodSeconds", "deletionTimestamp", "finalizers", "generateName",
    "generation", "labels", "managedFields", "name", "namespace", "ownerReferences", "resourceVersion", "selfLink",
    "uid",
})  # fmt: skip
_MAX_ANNOTATIONS_BYTES = 256 * 1024  # TotalAnnotationSizeLimitB of apimachinery
_OPERATORS = {operator.value: operator for operator in Operator}


@dataclass(frozen=True, slots=True)
class Metadata:
    """The part of metadata that policy uses."""

    name: str
    namespace: str
    labels: Mapping[str, str]


def read_object(
    reader: Reader, manifest: object, api_version: str, kind: str, fields: Iterable[str]
) -> Mapping[str, object]:
    """Read the outermost object: its type must be the expected one, and its fields those of the type."""
    top = reader.struct(manifest, "", {"apiVersion", "kind", "metadata", *fields})
    if manifest is None:
        reader.refuse("", "the document is empty")
    for field, expected in (("apiVersion", api_version), ("kind", kind)):
        value = reader.string(top.get(field), field)
        if value == "":
            reader.refuse(field, f"Required value: must be {expected}")
        elif value is not None and value != expected:
            reader.invalid(field, value, [f"must be {expected}"])
    return top


def read_metadata(reader: Reader, value: object, check_name: Callable[[str], list[str]]) -> Metadata:
    """Read metadata; a missing namespace is "default", and generateName stands in for a missing name."""
    tree = reader.struct(value, "metadata", _METADATA_FIELDS)
    name = _read_name(reader, tree, check_name)
    namespace = reader.string(tree.get("namespace"), "metadata.namespace")
    if namespace:
        reader.invalid("metadata.namespace", namespace, check_dns_label(namespace))
    labels = reader.string_map(tree.get("labels"), "metadata.labels")
    _check_labels(reader, labels, "metadata.labels")
    _check_annotations(reader, tree.get("annotations"))
    return Metadata(name, namespace or DEFAULT_NAMESPACE, labels)


def _read_name(reader: Reader, tree: Mapping[str, object], check_name: Callable[[str], list[str]]) -> str:
    name = reader.string(tree.get("name"), "metadata.name")
    prefix = reader.string(tree.get("generateName"), "metadata.generateName")
    if prefix:
        # The server appends letters and digits, so the prefix may end in a hyphen.
        reader.invalid("metadata.generateName", prefix, check_name(prefix.removesuffix("-")))
    if name:
        reader.invalid("metadata.name", name, check_name(name))
    elif name == "" and not prefix:
        reader.refuse("metadata.name", "Required value: name or generateName is required")
    return name or prefix or ""


def _check_labels(reader: Reader, labels: Mapping[str, str], path: str) -> None:
    for key, value in labels.items():
        reader.invalid(path, key, check_label_key(key))
        reader.invalid(path, value, check_label_value(value))


def _check_annotations(reader: Reader, value: object) -> None:
    path = "metadata.annotations"
    annotations = reader.string_map(value, path)
    for key in annotations:
        reader.invalid(path, key, check_label_key(key.lower()))
    if sum(len(key.encode()) + len(text.encode()) for key, text in annotations.items()) > _MAX_ANNOTATIONS_BYTES:
        reader.refuse(path, f"Too long: may not be more than {_MAX_ANNOTATIONS_BYTES} bytes")


def read_selector(reader: Reader, value: object, path: str) -> Selector:
    """Read a label selector; absent selects everything."""
    tree = reader.struct(value, path, {"matchLabels", "matchExpressions"})
    labels_path = child(path, "matchLabels")
    labels = reader.string_map(tree.get("matchLabels"), labels_path)
    _check_labels(reader, labels, labels_path)
    requirements = [Requirement(key, Operator.IN, frozenset({text})) for key, text in sorted(labels.items())]
    for entry_path, entry in reader.sequence(tree.get("matchExpressions"), child(path, "matchExpressions")):
        requirement = _read_requirement(reader, entry, entry_path)
        if requirement is not None:
            requirements.append(requirement)
    return Selector(tuple(requirements))


def _read_requirement(reader: Reader, value: object, path: str) -> Requirement | None:
    tree = reader.struct(value, path, {"key", "operator", "values"})
    key = reader.string(tree.get("key"), child(path, "key"))
    word = reader.string(tree.get("operator"), child(path, "operator"))
    values_path = child(path, "values")
    entries = [
        (entry_path, reader.string(entry, entry_path))
        for entry_path, entry in reader.sequence(tree.get("values"), values_path)
    ]
    operator = None if word is None else _OPERATORS.get(word)
    match operator:
        case None if word is not None:
            reader.invalid(child(path, "operator"), word, ["not a valid selector operator"])
        case Operator.IN | Operator.NOT_IN if not entries:
            reader.refuse(values_path, "Required value: must be specified when `operator` is 'In' or 'NotIn'")
        case Operator.EXISTS | Operator.DOES_NOT_EXIST if entries:
            reader.refuse(values_path, "Forbidden: may not be specified when `operator` is 'Exists' or 'DoesNotExist'")
        case _:
            pass
    if key is not None:
        reader.invalid(child(path, "key"), key, check_label_key(key))
    values = [text for _, text in entries if text is not None]
    for entry_path, text in entries:
        # Values of expressions were not checked at first (AllowInvalidLabelValueInSelector): no label can equal them.
        if text is not None and not reader.is_stored:
            reader.invalid(entry_path, text, check_label_value(text))
    return None if key is None or operator is None else Requirement(key, operator, frozenset(values))


def check_namespace_name(name: str) -> list[str]:
    """Check the name of a namespace."""
    return check_dns_label(name)


def check_object_name(name: str) -> list[str]:
    """Check the name of a NetworkPolicy or a pod."""
    return check_dns_subdomain(name)
