# SPDX-License-Identifier: Apache-2.0
"""Decodes what policy needs of Pod and Namespace manifests.

Metadata is checked as strictly as a NetworkPolicy's, since labels decide. Of a pod's spec and status only the fields
used here are read and checked; the many others are somebody else's.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address

from enforcer_daemon.model import IPAddress, NamedPort, PodRef, Protocol
from enforcer_daemon.policy.complexity import check_pod
from enforcer_daemon.policy.metadata import check_namespace_name, check_object_name, read_metadata, read_object
from enforcer_daemon.policy.objects import NAMESPACE_NAME_LABEL, Namespace, Pod
from enforcer_daemon.policy.reader import Reader, child
from enforcer_daemon.policy.syntax import check_port_name, check_port_number

_FINISHED_PHASES = frozenset({"Succeeded", "Failed"})
_PROTOCOLS = {protocol.name: protocol for protocol in (Protocol.TCP, Protocol.UDP, Protocol.SCTP)}


def decode_namespace(manifest: object) -> Namespace:
    """Read one Namespace; raise InvalidObjectError with every problem and its field."""
    reader = Reader()
    top = read_object(reader, manifest, "v1", "Namespace", ["spec", "status"])
    metadata = read_metadata(reader, top.get("metadata"), check_namespace_name)
    reader.finish()
    return Namespace(metadata.name, namespace_labels(metadata.name, metadata.labels))


def namespace_labels(name: str, labels: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return a namespace's labels with the one that the API server sets, whatever the manifest says of it."""
    return {**(labels or {}), NAMESPACE_NAME_LABEL: name}


def decode_pod(manifest: object) -> Pod:
    """Read one Pod; raise InvalidObjectError with every problem and its field."""
    if isinstance(manifest, Mapping):
        check_pod(manifest.get("metadata"), manifest.get("spec"))
    reader = Reader()
    top = read_object(reader, manifest, "v1", "Pod", ["spec", "status"])
    metadata = read_metadata(reader, top.get("metadata"), check_object_name)
    spec = reader.struct(top.get("spec"), "spec")
    status = reader.struct(top.get("status"), "status")
    pod = Pod(
        ref=PodRef(metadata.namespace, metadata.name),
        labels=metadata.labels,
        service_account=reader.string(spec.get("serviceAccountName"), "spec.serviceAccountName") or "default",
        named_ports=_read_named_ports(reader, spec),
        ips=_read_ips(reader, status),
        node=reader.string(spec.get("nodeName"), "spec.nodeName") or "",
        is_on_host_network=reader.boolean(spec.get("hostNetwork"), "spec.hostNetwork"),
        is_finished=reader.string(status.get("phase"), "status.phase") in _FINISHED_PHASES,
    )
    reader.finish()
    return pod


def _read_named_ports(reader: Reader, spec: Mapping[str, object]) -> tuple[NamedPort, ...]:
    # A restartable init container (a sidecar) serves as long as the pod runs, so its names count; those of other init
    # containers do not, since nothing listens there once the pod is ready. The API is silent on both.
    named: dict[NamedPort, None] = {}
    for field in ("containers", "initContainers"):
        for path, entry in reader.sequence(spec.get(field), f"spec.{field}"):
            container = reader.struct(entry, path)
            policy = reader.string(container.get("restartPolicy"), child(path, "restartPolicy"))
            if field == "containers" or policy == "Always":
                for port_path, port in reader.sequence(container.get("ports"), child(path, "ports")):
                    _read_container_port(reader, port, port_path, named)
    return tuple(named)


def _read_container_port(reader: Reader, value: object, path: str, named: dict[NamedPort, None]) -> None:
    port = reader.struct(value, path, {"name", "containerPort", "protocol", "hostPort", "hostIP"})
    name = reader.string(port.get("name"), child(path, "name"))
    number = reader.integer(port.get("containerPort"), child(path, "containerPort"))
    protocol = reader.string(port.get("protocol"), child(path, "protocol")) or "TCP"
    if protocol not in _PROTOCOLS:
        reader.unsupported(child(path, "protocol"), protocol, _PROTOCOLS)
        return
    if number is None:
        reader.refuse(child(path, "containerPort"), "Required value")
        return
    reader.invalid(child(path, "containerPort"), number, check_port_number(number))
    if name:
        reader.invalid(child(path, "name"), name, check_port_name(name))
        named[NamedPort(name, number, _PROTOCOLS[protocol])] = None


def _read_ips(reader: Reader, status: Mapping[str, object]) -> tuple[IPAddress, ...]:
    texts = [(path, reader.struct(entry, path).get("ip")) for path, entry in reader.sequence(
        status.get("podIPs"), "status.podIPs")]  # fmt: skip
    if not texts and status.get("podIP"):
        texts = [("status.podIP", status.get("podIP"))]
    addresses = []
    for path, value in texts:
        text = reader.string(value, path)
        try:
            addresses.append(ip_address(text or ""))
        except ValueError:
            reader.invalid(path, text, ["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"])
    return tuple(addresses)
