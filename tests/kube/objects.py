# SPDX-License-Identifier: Apache-2.0
"""The objects of the API server that tests talk to: versions, history and selectors, as the real one keeps them.

Nothing is validated, so that a test can store what a later Kubernetes might. Not thread-safe: `tests/kube/api.py` calls
it from its own loop.
"""

from __future__ import annotations

import copy
import itertools
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Manifest = dict[str, Any]

KINDS = {
    ("v1", "configmaps"): "ConfigMap",
    ("v1", "events"): "Event",
    ("v1", "namespaces"): "Namespace",
    ("v1", "nodes"): "Node",
    ("v1", "pods"): "Pod",
    ("v1", "secrets"): "Secret",
    ("v1", "serviceaccounts"): "ServiceAccount",
    ("v1", "services"): "Service",
    ("apps/v1", "daemonsets"): "DaemonSet",
    ("certificates.k8s.io/v1", "certificatesigningrequests"): "CertificateSigningRequest",
    ("certificates.k8s.io/v1", "clustertrustbundles"): "ClusterTrustBundle",
    ("certificates.k8s.io/v1beta1", "clustertrustbundles"): "ClusterTrustBundle",
    ("coordination.k8s.io/v1", "leases"): "Lease",
    ("events.k8s.io/v1", "events"): "Event",
    ("networking.k8s.io/v1", "networkpolicies"): "NetworkPolicy",
    ("networking.k8s.io/v1", "servicecidrs"): "ServiceCIDR",
}
"""What is served, by apiVersion and plural."""
CLUSTER_SCOPED = frozenset({"namespaces", "nodes", "certificatesigningrequests", "clustertrustbundles", "servicecidrs"})
_PLURALS = {(version, kind): (version, plural) for (version, plural), kind in KINDS.items()}

Kind = tuple[str, str]
"""apiVersion and plural."""
Key = tuple[str, str]
"""Namespace (empty for what is cluster-scoped) and name."""


class ApiError(Exception):
    """An answer with a status of failure."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason

    def as_status(self) -> Manifest:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "message": str(self),
            "reason": self.reason,
            "code": self.code,
        }


def not_found(key: Key) -> ApiError:
    return ApiError(404, "NotFound", f"{'/'.join(filter(None, key))} not found")


def expired(version: int) -> ApiError:
    return ApiError(410, "Expired", f"too old resource version: {version}")


@dataclass(frozen=True)
class Event:
    """One change; `before` is what the object was, for selectors that it leaves or enters."""

    version: int
    kind: Kind
    type: str
    object: Manifest
    before: Manifest | None


@dataclass
class Objects:
    """All objects of a cluster. Listeners are told of every event after it is stored."""

    kinds: dict[Kind, dict[Key, Manifest]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    history: list[Event] = field(default_factory=list)
    version: int = 1
    compacted: int = 0
    listeners: list[Callable[[Event], None]] = field(default_factory=list)
    _names: itertools.count[int] = field(default_factory=itertools.count)

    def get(self, kind: Kind, key: Key) -> Manifest:
        try:
            return self.kinds[kind][key]
        except KeyError:
            raise not_found(key) from None

    def create(self, kind: Kind, namespace: str, manifest: Mapping[str, Any]) -> Manifest:
        stored = copy.deepcopy(dict(manifest))
        metadata = stored.setdefault("metadata", {})
        if not metadata.get("name"):
            metadata["name"] = f"{metadata.get('generateName', 'object-')}{next(self._names):05d}"
        if kind[1] not in CLUSTER_SCOPED:
            metadata["namespace"] = namespace or metadata.get("namespace") or "default"
        key = metadata.get("namespace", ""), metadata["name"]
        if key in self.kinds[kind]:
            raise ApiError(409, "AlreadyExists", f"{key[1]} already exists")
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        return self._put(kind, key, stored, "ADDED")

    def replace(self, kind: Kind, key: Key, manifest: Mapping[str, Any]) -> Manifest:
        before, stored = self.get(kind, key), copy.deepcopy(dict(manifest))
        metadata = stored.setdefault("metadata", {})
        expected = metadata.get("resourceVersion")
        if expected and expected != before["metadata"]["resourceVersion"]:
            raise ApiError(409, "Conflict", "the object has been modified; please apply your changes to the latest")
        for name in ("uid", "name", "namespace", "creationTimestamp"):
            if name in before["metadata"]:
                metadata[name] = before["metadata"][name]
        return self._put(kind, key, stored, "MODIFIED")

    def merge(self, kind: Kind, key: Key, patch: Mapping[str, Any]) -> Manifest:
        """Change an object as a JSON merge patch does (RFC 7386); lists are replaced."""
        return self.replace(kind, key, _merged(self.get(kind, key), patch))

    def delete(self, kind: Kind, key: Key) -> Manifest:
        gone = self.kinds[kind].pop(key, None)
        if gone is None:
            raise not_found(key)
        return self._tell(kind, "DELETED", copy.deepcopy(gone), gone)

    def matching(self, kind: Kind, wanted: Selector) -> list[tuple[Key, Manifest]]:
        return sorted((key, found) for key, found in self.kinds[kind].items() if wanted.matches(found))

    def since(self, version: int) -> list[Event]:
        if version < self.compacted:
            raise expired(version)
        return [event for event in self.history if event.version > version]

    def compact(self) -> None:
        """Forget the history, as etcd does every few minutes: older versions are 410 Gone."""
        self.version += 1
        self.compacted = self.version
        self.history.clear()

    def restore(self, version: int) -> None:
        """Be what the cluster was at a version, as from a backup of etcd; nobody is told. For objects never changed."""
        self.history = [event for event in self.history if event.version <= version]
        for known in self.kinds.values():
            for key in [key for key, found in known.items() if int(found["metadata"]["resourceVersion"]) > version]:
                del known[key]
        self.version = version

    def _put(self, kind: Kind, key: Key, stored: Manifest, type_: str) -> Manifest:
        stored.setdefault("apiVersion", kind[0])
        stored.setdefault("kind", KINDS[kind])
        before = self.kinds[kind].get(key)
        self.kinds[kind][key] = stored
        return self._tell(kind, type_, stored, before)

    def _tell(self, kind: Kind, type_: str, changed: Manifest, before: Manifest | None) -> Manifest:
        self.version += 1
        changed["metadata"]["resourceVersion"] = str(self.version)
        event = Event(self.version, kind, type_, changed, before)
        self.history.append(event)
        for listener in self.listeners:
            listener(event)
        return changed


@dataclass(frozen=True)
class Selector:
    """What a list or a watch asks for: a namespace, fields by path, labels; all by equality."""

    namespace: str = ""
    fields: tuple[tuple[str, str], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, namespace: str, query: Mapping[str, str]) -> Selector:
        return cls(namespace, pairs(query.get("fieldSelector", "")), pairs(query.get("labelSelector", "")))

    def matches(self, manifest: Mapping[str, Any]) -> bool:
        metadata = manifest["metadata"]
        if self.namespace and metadata.get("namespace") != self.namespace:
            return False
        labels = metadata.get("labels") or {}
        return all(_field(manifest, path) == value for path, value in self.fields) and all(
            labels.get(key) == value for key, value in self.labels
        )


def kind_of(manifest: Mapping[str, Any]) -> Kind:
    """Return what a manifest is, by its apiVersion and kind."""
    return _PLURALS[str(manifest["apiVersion"]), str(manifest["kind"])]


def key_of(manifest: Mapping[str, Any]) -> Key:
    metadata = manifest["metadata"]
    is_namespaced = kind_of(manifest)[1] not in CLUSTER_SCOPED
    return (metadata.get("namespace") or "default" if is_namespaced else ""), metadata["name"]


def _merged(below: Any, above: Any) -> Any:
    if not isinstance(above, Mapping):
        return above
    merged = dict(below) if isinstance(below, Mapping) else {}
    for key, value in above.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key), value)
    return merged


def pairs(text: str) -> tuple[tuple[str, str], ...]:
    split = [entry.replace("==", "=").partition("=") for entry in text.split(",") if entry]
    return tuple((key, value) for key, _, value in split)


def _field(manifest: Mapping[str, Any], path: str) -> str:
    value: Any = manifest
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return "" if value is None else str(value)
