# SPDX-License-Identifier: Apache-2.0
"""What is watched: where each kind lies in the API, what of its objects is kept, and how they become values. Pure.

An object is first reduced to the fields that are used, so that a field that a later Kubernetes adds to metadata or to a
pod refuses nothing. The spec of a NetworkPolicy is kept whole: a field that is not known there may restrict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import ip_network
from itertools import islice
from typing import Any, Generic, TypeVar

from enforcer_daemon.kube.stored import StoredPolicy
from enforcer_daemon.model import IPAddress, IPNetwork, Protocol
from enforcer_daemon.policy import (
    AnyPolicy,
    InvalidObjectError,
    Namespace,
    NetworkPolicy,
    Pod,
    decode_namespace,
    decode_network_policy,
    decode_pod,
)
from enforcer_daemon.policy.reader import Reader
from enforcer_daemon.policy.syntax import check_port_number, parse_address, parse_cidr
from enforcer_daemon.virtual import NodePort

CONFIG_HASH = "kubernetes.io/config.hash"
CONFIG_MIRROR = "kubernetes.io/config.mirror"
"""Annotations of a static pod's mirror: kubelet calls the pod by its hash, not by the mirror's UID."""
_PORT_FIELDS = ("name", "containerPort", "protocol", "hostPort", "hostIP")
MAX_EXTERNAL_IPS = 64
"""externalIPs of one Service; a few are usual. A Service above it is refused, and costs no more to read than one with
so many."""
MAX_INGRESS = 256
"""Load balancers' addresses in the status of one Service; some controllers list every node."""
MAX_SERVICE_PORTS = 1_024
"""Ports of one Service that has node ports, or addresses of its own; the range of node ports has 2,768 by default."""
_NOT_PROXIED = ("service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless")
"""Labels of Services that kube-proxy leaves alone."""
_NODE_ADDRESSES = frozenset({"InternalIP", "ExternalIP"})

Manifest = Mapping[str, object]
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Resource(Generic[Value]):
    """One kind, of all namespaces; `plural` is its name in paths and metrics."""

    plural: str
    path: str
    api_version: str
    kind: str
    reduce: Callable[[Manifest], dict[str, object]]
    """Leaves what is kept; must not fail on whatever the object is."""
    decode: Callable[[Manifest], Value]
    """Reads what was left; raises InvalidObjectError."""
    stand_in: Callable[[Manifest], Value | None] = lambda _: None
    """Gives what is in force for a bad object of which no version was good."""
    decode_stored: Callable[[Manifest], Value] | None = None
    """Reads what `decode` refuses, but an older API server accepted and still has."""
    store: Callable[[tuple[str, str], bytes, Value | None], Value] | None = None
    """Gives the form in which an object is kept in memory: by its key and bytes, decoded or not yet."""
    is_optional: bool = False
    """Whether an API server without this kind (404) has none of it."""


@dataclass(frozen=True, slots=True)
class NodeNetworks:
    """Where a node and its pods are."""

    name: str
    pod_cidrs: tuple[IPNetwork, ...]
    addresses: tuple[IPAddress, ...]


@dataclass(frozen=True, slots=True)
class ServiceAddresses:
    """Where a Service says that it answers besides its cluster addresses; what of it is believed, others decide."""

    external: tuple[IPAddress, ...] = ()
    """spec.externalIPs: the words of whoever wrote the Service."""
    load_balancers: tuple[IPAddress, ...] = ()
    """Addresses in the status, which controllers write, of load balancers whose traffic nodes take over."""
    node_ports: tuple[NodePort, ...] = ()
    ports: tuple[NodePort, ...] = ()
    """Ports of these addresses."""


_NOTHING = ServiceAddresses()
"""One value for all the Services that have cluster addresses alone."""


def _as_mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _pick(value: object, *names: str) -> object:
    """Leave these fields of an object; what is none stays as it is, for the decoder to refuse."""
    if not isinstance(value, Mapping):
        return value
    return {name: value[name] for name in names if value.get(name) is not None}


def _pick_each(value: object, *names: str) -> object:
    return [_pick(entry, *names) for entry in value] if isinstance(value, list) else value


def _reduced(manifest: Manifest, **parts: object) -> dict[str, object]:
    metadata = _pick(manifest.get("metadata"), "name", "namespace", "labels")
    return {"metadata": metadata, **{name: part for name, part in parts.items() if part is not None}}


def _reduce_policy(manifest: Manifest) -> dict[str, object]:
    return {"metadata": _pick(manifest.get("metadata"), "name", "namespace"), "spec": manifest.get("spec")}


def _reduce_pod(manifest: Manifest) -> dict[str, object]:
    metadata, spec = _as_mapping(manifest.get("metadata")), manifest.get("spec")
    left = _pick(spec, "serviceAccountName", "nodeName", "hostNetwork", "containers", "initContainers")
    if isinstance(left, dict):
        for name in ("containers", "initContainers"):
            if isinstance(containers := _pick_each(left.get(name), "restartPolicy", "ports"), list):
                left[name] = [
                    {**entry, "ports": _pick_each(entry["ports"], *_PORT_FIELDS)}
                    if isinstance(entry, dict) and "ports" in entry
                    else entry
                    for entry in containers
                ]
    reduced = _reduced(manifest, spec=left, status=_pick(manifest.get("status"), "phase", "podIPs"))
    annotations = _as_mapping(metadata.get("annotations"))
    reduced["uid"] = annotations.get(CONFIG_HASH) if CONFIG_MIRROR in annotations else metadata.get("uid")
    return reduced


def _reduce_node(manifest: Manifest) -> dict[str, object]:
    addresses = _pick_each(_as_mapping(manifest.get("status")).get("addresses"), "type", "address")
    return _reduced(manifest, spec=_pick(manifest.get("spec"), "podCIDRs"), status={"addresses": addresses})


def _reduce_service(manifest: Manifest) -> dict[str, object]:
    """Leave what may make addresses virtual, cut; nothing of a Service that kube-proxy passes over."""
    metadata, spec = _as_mapping(manifest.get("metadata")), manifest.get("spec")
    named = {"metadata": _pick(metadata, "name", "namespace")}
    if isinstance(spec, Mapping) and _is_passed_over(_as_mapping(metadata.get("labels")), spec):
        return named
    balancer = _as_mapping(_as_mapping(manifest.get("status")).get("loadBalancer")).get("ingress")
    left = _pick(spec, "externalIPs", "ports")
    if isinstance(left, dict):
        left["externalIPs"] = _cut(left.get("externalIPs"), MAX_EXTERNAL_IPS)
        if isinstance(ports := left.get("ports"), list):
            picked = (_pick(port, "port", "nodePort", "protocol") for port in ports)
            if not left["externalIPs"] and not balancer:
                picked = (port for port in picked if not isinstance(port, dict) or "nodePort" in port)
            left["ports"] = list(islice(picked, MAX_SERVICE_PORTS + 1))
    ingress = _pick_each(_cut(balancer, MAX_INGRESS), "ip", "ipMode")
    return {**named, "spec": left, "status": {"ingress": ingress}}


def _is_passed_over(labels: Mapping[str, object], spec: Mapping[str, object]) -> bool:
    """Return whether kube-proxy does not translate to it, so that what is sent there would leave the node as it is.

    Source: cmd/kube-proxy/app/server.go (the watch's label selector), pkg/proxy/util (ShouldSkipService).
    """
    return any(label in labels for label in _NOT_PROXIED) or (
        spec.get("clusterIP") == "None" or spec.get("type") == "ExternalName"
    )


def _cut(value: object, most: int) -> object:
    """Leave one entry more than may be, for the decoder to refuse."""
    return value[: most + 1] if isinstance(value, list) else value


def _decode_cluster_pod(reduced: Manifest) -> Pod:
    reader = Reader()
    uid = reader.string(reduced.get("uid"), "metadata.uid")
    if uid == "":
        reader.refuse("metadata.uid", "Required value")
    reader.finish()
    return replace(decode_pod(_typed(reduced, "v1", "Pod", "metadata", "spec", "status")), uid=uid or "")


def _typed(reduced: Manifest, api_version: str, kind: str, *parts: str) -> dict[str, object]:
    return {"apiVersion": api_version, "kind": kind, **{part: reduced.get(part) for part in parts}}


def _decode_policy(reduced: Manifest) -> NetworkPolicy:
    return decode_network_policy(_typed_policy(reduced))


def _decode_stored_policy(reduced: Manifest) -> NetworkPolicy:
    return decode_network_policy(_typed_policy(reduced), mask_host_bits=True)


def _typed_policy(reduced: Manifest) -> dict[str, object]:
    return _typed(reduced, "networking.k8s.io/v1", "NetworkPolicy", "metadata", "spec")


def _isolate(reduced: Manifest) -> NetworkPolicy | None:
    """Isolate those whom a policy that cannot be read selects, and allow them nothing.

    The API server took it, so somebody relies on it: without it its pods would be open. What is unknown in it counts as
    everybody, or as both directions; None if not even its name can be read.
    """
    spec = _as_mapping(reduced.get("spec"))
    stated = spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])
    both = ["Ingress", "Egress"]
    for selector, types in ((spec.get("podSelector"), stated), (spec.get("podSelector"), both), ({}, both)):
        with suppress(InvalidObjectError):
            return _decode_stored_policy({**reduced, "spec": {"podSelector": selector, "policyTypes": types}})
    return None


def _store_policy(key: tuple[str, str], document: bytes, policy: AnyPolicy | None) -> AnyPolicy:
    stored = StoredPolicy(key, document, _decode_stored_policy, _isolate)
    if isinstance(policy, NetworkPolicy):
        stored.policy = policy
    return stored


def _decode_namespace(reduced: Manifest) -> Namespace:
    return decode_namespace(_typed(reduced, "v1", "Namespace", "metadata"))


def _decode_node(reduced: Manifest) -> NodeNetworks:
    reader = Reader()
    name = reader.string(_as_mapping(reduced.get("metadata")).get("name"), "metadata.name") or ""
    spec, status = reader.struct(reduced.get("spec"), "spec"), reader.struct(reduced.get("status"), "status")
    networks = _networks(reader, spec.get("podCIDRs"), "spec.podCIDRs")
    addresses: list[IPAddress] = []
    for path, entry in reader.sequence(status.get("addresses"), "status.addresses"):
        address, text = reader.struct(entry, path), ""
        if address.get("type") in _NODE_ADDRESSES:
            text = reader.string(address.get("address"), f"{path}.address") or ""
        # The API server does not check them: one that is no address must not cost the node's pods their networks.
        if (known := parse_address(text)) is not None:
            addresses.append(known)
    reader.finish()
    return NodeNetworks(name, networks, tuple(addresses))


def _decode_service_cidr(reduced: Manifest) -> tuple[IPNetwork, ...]:
    reader = Reader()
    networks = _networks(reader, reader.struct(reduced.get("spec"), "spec").get("cidrs"), "spec.cidrs")
    reader.finish()
    return networks


def _decode_service(reduced: Manifest) -> ServiceAddresses:
    reader = Reader()
    spec, status = reader.struct(reduced.get("spec"), "spec"), reader.struct(reduced.get("status"), "status")
    texts = _few(reader, spec.get("externalIPs"), "spec.externalIPs", MAX_EXTERNAL_IPS)
    external = _addresses(reader, texts)
    texts = []
    for path, entry in _few(reader, status.get("ingress"), "status.loadBalancer.ingress", MAX_INGRESS):
        ingress = reader.struct(entry, path)
        # A load balancer in mode Proxy is an outside end of its own, which nodes do not stand in for.
        if ingress.get("ip") and ingress.get("ipMode") != "Proxy":
            texts.append((f"{path}.ip", ingress.get("ip")))
    balancers = _addresses(reader, texts)
    ports, node_ports = [], []
    for path, entry in _few(reader, spec.get("ports"), "spec.ports", MAX_SERVICE_PORTS):
        port = reader.struct(entry, path)
        ports += _read_port(reader, port, path, "port")
        node_ports += _read_port(reader, port, path, "nodePort")
    reader.finish()
    if not (external or balancers or node_ports):
        return _NOTHING
    lists: tuple[list[Any], ...] = (external, balancers, node_ports, ports if external or balancers else [])
    return ServiceAddresses(*(tuple(dict.fromkeys(found)) for found in lists))


def _few(reader: Reader, value: object, path: str, most: int) -> list[tuple[str, object]]:
    """Read a list that is not longer than it may be."""
    entries = reader.sequence(value, path)
    if len(entries) <= most:
        return entries
    reader.refuse(path, f"Too many: must have at most {most} items for any of its addresses and node ports to count")
    return []


def _read_port(reader: Reader, port: Mapping[str, object], path: str, field: str) -> list[NodePort]:
    """Read a port's number; give it where it is one that identities travel to."""
    number = reader.integer(port.get(field), f"{path}.{field}")
    protocol = reader.string(port.get("protocol"), f"{path}.protocol") or "TCP"
    if not number:
        return []
    reader.invalid(f"{path}.{field}", number, check_port_number(number))
    return [(Protocol[protocol], number)] if protocol in ("TCP", "UDP") else []


def _networks(reader: Reader, value: object, path: str) -> tuple[IPNetwork, ...]:
    found = []
    for entry_path, entry in reader.sequence(value, path):
        text = reader.string(entry, entry_path) or ""
        network, _ = parse_cidr(text, mask_host_bits=True)
        if network is None and (address := parse_address(text)) is not None:
            network = ip_network(address)
        if network is None:
            reader.invalid(entry_path, entry, ["must be a network (e.g. 10.9.8.0/24)"])
        else:
            found.append(network)
    return tuple(found)


def _addresses(reader: Reader, texts: list[tuple[str, object]]) -> list[IPAddress]:
    found = []
    for path, value in texts:
        address = parse_address(reader.string(value, path) or "")
        if address is None:
            reader.invalid(path, value, ["must be an IP address"])
        else:
            found.append(address)
    return found


NETWORK_POLICIES: Resource[AnyPolicy] = Resource(
    "networkpolicies",
    "/apis/networking.k8s.io/v1/networkpolicies",
    "networking.k8s.io/v1",
    "NetworkPolicy",
    _reduce_policy,
    _decode_policy,
    _isolate,
    _decode_stored_policy,
    _store_policy,
)
NAMESPACES = Resource("namespaces", "/api/v1/namespaces", "v1", "Namespace", _reduced, _decode_namespace)
PODS = Resource("pods", "/api/v1/pods", "v1", "Pod", _reduce_pod, _decode_cluster_pod)
NODES = Resource("nodes", "/api/v1/nodes", "v1", "Node", _reduce_node, _decode_node)
SERVICES = Resource("services", "/api/v1/services", "v1", "Service", _reduce_service, _decode_service)
SERVICE_CIDRS = Resource(
    "servicecidrs",
    "/apis/networking.k8s.io/v1/servicecidrs",
    "networking.k8s.io/v1",
    "ServiceCIDR",
    lambda manifest: _reduced(manifest, spec=_pick(manifest.get("spec"), "cidrs")),
    _decode_service_cidr,
    is_optional=True,
)
