# SPDX-License-Identifier: Apache-2.0
"""Kubernetes objects in a daemon's policy directory: one file an object, put and taken atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from enforcer_daemon.model import PodRef
from trireme_lab.errors import ScenarioError
from trireme_lab.spec import Manifest, PodSpec


class ObjectRef(NamedTuple):
    """Which object; namespace is empty for those that have none."""

    kind: str
    namespace: str
    name: str

    @property
    def file_name(self) -> str:
        return "_".join(part for part in (self.kind.lower(), self.namespace, self.name) if part) + ".yaml"


def object_ref(manifest: Manifest) -> ObjectRef:
    """Name the object of a manifest; raise ScenarioError if kind or name is missing."""
    metadata = manifest.get("metadata")
    if not isinstance(metadata, Mapping):
        raise ScenarioError("metadata: must be a mapping")
    kind, name = manifest.get("kind"), metadata.get("name")
    for field, value in (("kind", kind), ("metadata.name", name)):
        if not isinstance(value, str) or not value:
            raise ScenarioError(f"{field}: must be a name")
    namespace = "" if kind == "Namespace" else metadata.get("namespace", "default")
    return ObjectRef(str(kind), str(namespace), str(name))


def namespace_manifest(name: str, labels: Mapping[str, str]) -> Manifest:
    """Return a Namespace object."""
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": dict(labels)}}


def pod_manifest(spec: PodSpec, labels: Mapping[str, str]) -> Manifest:
    """Return a Pod object with as much as the enforcer reads."""
    ports = [
        {"containerPort": port.number, "protocol": port.protocol.name, **({"name": port.name} if port.name else {})}
        for port in spec.ports
    ]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": spec.pod.namespace, "name": spec.pod.name, "labels": dict(labels)},
        "spec": {
            "nodeName": spec.node,
            "serviceAccountName": spec.service_account,
            "containers": [{"name": "main", "image": "lab", **({"ports": ports} if ports else {})}],
        },
    }


def pod_ref(pod: PodRef) -> ObjectRef:
    """Name a pod's object."""
    return ObjectRef("Pod", pod.namespace, pod.name)


def put_manifest(directory: Path, staging: Path, manifest: Manifest) -> None:
    """Add or replace an object; a reader of the directory sees the old file or the new one, whole."""
    file_name = object_ref(manifest).file_name
    draft = staging / file_name
    draft.write_text(json.dumps(manifest, indent=2), encoding="utf-8")  # JSON is YAML whose strings are all quoted.
    draft.rename(directory / file_name)


def remove_manifest(directory: Path, reference: ObjectRef) -> bool:
    """Take an object away; say whether it was there."""
    try:
        (directory / reference.file_name).unlink()
    except FileNotFoundError:
        return False
    return True
