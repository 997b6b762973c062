# SPDX-License-Identifier: Apache-2.0
"""Reads files of Kubernetes manifests into typed objects and problems; a problem names file, line, object and field.

NetworkPolicy, Namespace and Pod are read, alone or in Lists; Service and ClusterNetworkPolicy for those who ask. Any
other kind is a problem: were a misspelt kind passed over, a policy would be missing without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from enforcer_daemon.documents import Document, DocumentError, decode_text, read_documents
from enforcer_daemon.errors import PolicyError
from enforcer_daemon.model import PodRef
from enforcer_daemon.policy import (
    AnyPolicy,
    InvalidObjectError,
    Namespace,
    NetworkPolicy,
    Pod,
    decode_namespace,
    decode_network_policy,
    decode_pod,
    namespace_labels,
)
from enforcer_daemon.policy.cluster_objects import Channel, ClusterNetworkPolicy
from enforcer_daemon.policy.decode_cluster import API_VERSION as CLUSTER_POLICY_API_VERSION
from enforcer_daemon.policy.decode_cluster import decode_cluster_policy
from enforcer_daemon.policy.decode_services import decode_service
from enforcer_daemon.policy.metadata import DEFAULT_NAMESPACE
from enforcer_daemon.policy.objects import Service

SUFFIXES = (".yaml", ".yml", ".json")
MAX_FILE_BYTES = 32 * 1024 * 1024
"""Larger files are refused; ten thousand policies take about a quarter of it."""
_MAX_PROBLEMS = 100
"""Problems of one object that are told, each with its line."""

KubernetesObject = NetworkPolicy | ClusterNetworkPolicy | Namespace | Pod | Service
_LIST_KINDS = {
    "List": "",
    "NetworkPolicyList": "NetworkPolicy",
    "NamespaceList": "Namespace",
    "PodList": "Pod",
    "ServiceList": "Service",
    "ClusterNetworkPolicyList": "ClusterNetworkPolicy",
}
_CLUSTER_SCOPED = frozenset({"Namespace", "ClusterNetworkPolicy"})
_IDENTITY_FIELDS = frozenset({"", "kind", "metadata", "metadata.name", "metadata.generateName", "metadata.namespace"})
"""Where a problem leaves open which object is meant."""
_API_VERSIONS = {
    "NetworkPolicy": "networking.k8s.io/v1",
    "ClusterNetworkPolicy": CLUSTER_POLICY_API_VERSION,
    "Namespace": "v1",
    "Pod": "v1",
    "Service": "v1",
}


@dataclass(frozen=True, slots=True, order=True)
class ObjectKey:
    """What makes an object the same one in another version of a file."""

    kind: str
    namespace: str
    """Empty for a Namespace or a ClusterNetworkPolicy."""
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """Something that is not in force, and why."""

    file: str
    line: int
    """Counts from 1; 0 for the file as a whole."""
    object: str
    """Kind and name, as far as they could be read; else empty."""
    field: str
    message: str
    has_earlier: bool | None = None
    """Whether an earlier version is in force instead; None if nothing is asked to be in force."""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        told = ": ".join(part for part in (place, self.object, self.field, self.message) if part)
        if self.has_earlier is None:
            return told
        return f"{told} ({'an earlier version is in force' if self.has_earlier else 'no version of it is in force'})"


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a file, or the problems with it."""

    line: int
    key: ObjectKey | None
    """None: it could not even be told which object it is."""
    object: KubernetesObject | None
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """What one file holds."""

    name: str
    entries: tuple[Entry, ...] = ()
    problem: Problem | None = None
    """Why the file could not be read or parsed; it then has no entries."""


@dataclass(frozen=True, slots=True)
class ClusterState:
    """All that a source knows at one moment."""

    policies: tuple[AnyPolicy, ...] = ()
    namespaces: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Labels of the declared ones."""
    pods: Mapping[PodRef, Pod] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    is_cluster: bool = False
    """Whether the pods are a cluster's, which knows all there are: one that is not here any longer was deleted."""

    def find_pod(self, ref: PodRef, uid: str) -> Pod | None:
        """Return a pod by its name, and by its UID where the source knows that."""
        pod = self.pods.get(ref)
        return pod if pod is not None and pod.uid in ("", uid) else None

    def labels_of(self, namespace: str) -> Mapping[str, str]:
        """Return a namespace's labels; one that is not declared has only the label of its name."""
        return self.namespaces.get(namespace) or namespace_labels(namespace)


def manifest_entries(directory: Path) -> list[os.DirEntry[str]]:
    """List a directory's manifests, in order; hidden ones are not read, nor are directories in it.

    A dangling link is listed: its objects are not gone, they cannot be read.
    """
    with os.scandir(directory) as entries:
        return sorted((entry for entry in entries if _is_manifest(entry)), key=lambda entry: entry.name)


def _is_manifest(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(SUFFIXES) and not entry.name.startswith(".") and not entry.is_dir()


def manifest_files(directory: Path) -> list[Path]:
    """Return the paths of a directory's manifests, in order."""
    return [Path(entry.path) for entry in manifest_entries(directory)]


def load_bytes(path: Path) -> bytes:
    """Read a file of bounded size; raise OSError."""
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(f"larger than {MAX_FILE_BYTES} bytes")
    return content


@dataclass(frozen=True, slots=True)
class MoreKinds:
    """Kinds that are read on request, because not everything that reads manifests knows what to do with them."""

    services: bool = False
    cluster_policies: Channel | None = None
    """The channel of the CRD that ClusterNetworkPolicies are checked against; None: they are not read."""

    def __str__(self) -> str:
        more = ("ClusterNetworkPolicy, " if self.cluster_policies else "") + ("Service, " if self.services else "")
        return f"NetworkPolicy, {more}Namespace and Pod"


NO_MORE_KINDS = MoreKinds()


def read_file(path: Path, more: MoreKinds = NO_MORE_KINDS) -> ManifestFile:
    """Read a file; what is wrong with it is in the result."""
    try:
        return decode_file(str(path), load_bytes(path), more)
    except OSError as err:
        return unreadable(str(path), err)


def unreadable(name: str, err: OSError) -> ManifestFile:
    """Return the result of a file that could not be read."""
    return ManifestFile(name, problem=Problem(name, 0, "", "", f"cannot be read: {err.strerror or err}"))


def decode_file(name: str, content: bytes, more: MoreKinds = NO_MORE_KINDS) -> ManifestFile:
    """Decode the content of a file; what is wrong with it is in the result."""
    try:
        documents = read_documents(decode_text(content), is_json=name.endswith(".json"))
    except UnicodeDecodeError as err:
        line = content.count(b"\n", 0, err.start) + 1
        return ManifestFile(
            name, problem=Problem(name, line, "", "", "not UTF-8 text, nor UTF-16 with a byte order mark")
        )
    except DocumentError as err:
        return ManifestFile(name, problem=Problem(name, err.line, "", "", str(err)))
    objects = (item for document in documents for item in _expand(document))
    return ManifestFile(name, tuple(_decode_entry(name, document, more) for document in objects))


def good_manifests(name: str, content: bytes) -> dict[ObjectKey, object]:
    """Return the manifests of the objects in a file's content that are without fault."""
    try:
        documents = read_documents(decode_text(content), is_json=name.endswith(".json"))
    except (UnicodeDecodeError, DocumentError):
        return {}
    found: dict[ObjectKey, object] = {}
    for item in (item for document in documents for item in _expand(document)):
        entry = _decode_entry(name, item)
        if entry.key is not None and entry.object is not None:
            found.setdefault(entry.key, item.manifest)
    return found


def _expand(document: Document) -> Iterator[Document]:
    manifest = document.manifest
    kind = manifest.get("kind") if isinstance(manifest, Mapping) else None
    if not isinstance(manifest, Mapping) or not isinstance(kind, str) or kind not in _LIST_KINDS:
        yield document
        return
    items = manifest.get("items")
    if not isinstance(items, list):
        yield Document(document.line_of("items"), error=f"items of a {kind} must be a list", node=document.node)
        return
    item_kind = _LIST_KINDS[kind]
    for index, item in enumerate(items):
        if item_kind and isinstance(item, Mapping):
            # The API leaves the type out of a typed list's items.
            item = {"apiVersion": _API_VERSIONS[item_kind], "kind": item_kind, **item}
        yield document.item(index, item)


def _decode_entry(name: str, document: Document, more: MoreKinds = NO_MORE_KINDS) -> Entry:
    key = _key_of(document.manifest)
    label = "" if key is None else str(key)
    if document.error:
        return Entry(document.line, None, None, (Problem(name, document.line, "", "", document.error),))
    try:
        found = _decode(document.manifest, more)
    except InvalidObjectError as err:
        problems = tuple(
            Problem(name, document.line_of(p.field), label, p.field, p.message) for p in err.problems[:_MAX_PROBLEMS]
        )
        is_unsure = any(problem.field in _IDENTITY_FIELDS for problem in err.problems)
        return Entry(document.line, None if is_unsure else key, None, problems)
    return Entry(document.line, key, found)


def _decode(manifest: object, more: MoreKinds) -> KubernetesObject:
    kind = manifest.get("kind") if isinstance(manifest, Mapping) else None
    if kind == "Namespace":
        return decode_namespace(manifest)
    if kind == "Pod":
        return decode_pod(manifest)
    if kind == "Service" and more.services:
        return decode_service(manifest)
    if kind == "ClusterNetworkPolicy" and more.cluster_policies is not None:
        return decode_cluster_policy(manifest, more.cluster_policies)
    if isinstance(kind, str) and kind != "NetworkPolicy":
        message = f'Invalid value: "{kind}": is not read here; {more} are, alone or in a List'
        raise InvalidObjectError([PolicyError("kind", message)])
    return decode_network_policy(manifest)


def _key_of(manifest: object) -> ObjectKey | None:
    metadata = manifest.get("metadata") if isinstance(manifest, Mapping) else None
    if not isinstance(manifest, Mapping) or not isinstance(metadata, Mapping):
        return None
    kind, name = manifest.get("kind"), metadata.get("name") or metadata.get("generateName")
    namespace = metadata.get("namespace") or DEFAULT_NAMESPACE
    if not (isinstance(kind, str) and isinstance(name, str) and isinstance(namespace, str)):
        return None
    return ObjectKey(kind, "" if kind in _CLUSTER_SCOPED else namespace, name)


def unique_objects(
    files: Iterable[ManifestFile],
) -> tuple[dict[ObjectKey, tuple[str, KubernetesObject]], list[Problem]]:
    """Return each object with its file, and all problems; of several by one name the first counts, the others are
    problems.
    """
    found: dict[ObjectKey, tuple[str, KubernetesObject]] = {}
    problems = []
    for file in files:
        if file.problem is not None:
            problems.append(file.problem)
        for entry in file.entries:
            problems += entry.problems
            if entry.object is None or entry.key is None:
                continue
            if entry.key in found:
                message = f"is already in {found[entry.key][0]}; that one is in force"
                problems.append(Problem(file.name, entry.line, str(entry.key), "metadata.name", message))
            else:
                found[entry.key] = (file.name, entry.object)
    return found, problems


def assemble(objects: Iterable[KubernetesObject], problems: Iterable[Problem]) -> ClusterState:
    """Put a state together; pods that have finished are not in it."""
    policies, namespaces, pods = [], {}, {}
    for found in objects:
        match found:
            case NetworkPolicy():
                policies.append(found)
            case Namespace():
                namespaces[found.name] = found.labels
            case Pod():
                if not found.is_finished:
                    pods[found.ref] = found
    return ClusterState(tuple(policies), namespaces, pods, tuple(problems))
