# SPDX-License-Identifier: Apache-2.0
"""Decodes what `triremectl simulate` needs of a Service manifest: where it is dialed, and which pods are behind it.

The daemon reads Services in another form (`kube/resources.py`): it decides by the pods that answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from enforcer_daemon.model import IPAddress, Protocol
from enforcer_daemon.policy.metadata import check_object_name, read_metadata, read_object
from enforcer_daemon.policy.objects import Service, ServicePort
from enforcer_daemon.policy.reader import Reader, child
from enforcer_daemon.policy.syntax import check_port_number, parse_address

_PROTOCOLS = {protocol.name: protocol for protocol in (Protocol.TCP, Protocol.UDP, Protocol.SCTP)}
_NO_ADDRESS = ("", "None")
"""In place of a cluster IP: of an ExternalName, and of a headless Service."""


def decode_service(manifest: object) -> Service:
    """Read one Service; raise InvalidObjectError with every problem and its field."""
    reader = Reader()
    top = read_object(reader, manifest, "v1", "Service", ["spec", "status"])
    metadata = read_metadata(reader, top.get("metadata"), check_object_name)
    spec, status = reader.struct(top.get("spec"), "spec"), reader.struct(top.get("status"), "status")
    service = Service(
        namespace=metadata.namespace,
        name=metadata.name,
        selector=reader.string_map(spec.get("selector"), "spec.selector"),
        addresses=(*_read_cluster_ips(reader, spec), *_read_balancers(reader, status)),
        external_ips=_read_addresses(reader, reader.sequence(spec.get("externalIPs"), "spec.externalIPs")),
        ports=tuple(_read_port(reader, port, path) for path, port in reader.sequence(spec.get("ports"), "spec.ports")),
        is_external_name=reader.string(spec.get("type"), "spec.type") == "ExternalName",
    )
    reader.finish()
    return service


def _read_cluster_ips(reader: Reader, spec: Mapping[str, object]) -> tuple[IPAddress, ...]:
    texts = [("spec.clusterIP", spec.get("clusterIP")), *reader.sequence(spec.get("clusterIPs"), "spec.clusterIPs")]
    return _read_addresses(reader, ((path, text) for path, text in texts if text not in (None, *_NO_ADDRESS)))


def _read_balancers(reader: Reader, status: Mapping[str, object]) -> tuple[IPAddress, ...]:
    """Read the addresses that nodes translate: not those where the load balancer is an end of its own."""
    balancer, path = reader.struct(status.get("loadBalancer"), "status.loadBalancer"), "status.loadBalancer.ingress"
    found = [(path, reader.struct(entry, path)) for path, entry in reader.sequence(balancer.get("ingress"), path)]
    texts = [(child(path, "ip"), entry.get("ip")) for path, entry in found if entry.get("ipMode") != "Proxy"]
    return _read_addresses(reader, ((path, text) for path, text in texts if text))


def _read_addresses(reader: Reader, texts: Iterable[tuple[str, object]]) -> tuple[IPAddress, ...]:
    found: dict[IPAddress, None] = {}
    for path, value in texts:
        address = parse_address(reader.string(value, path) or "")
        if address is None:
            reader.invalid(path, value, ["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"])
        else:
            found[address] = None
    return tuple(found)


def _read_port(reader: Reader, value: object, path: str) -> ServicePort:
    port = reader.struct(value, path)
    number = reader.integer(port.get("port"), child(path, "port")) or 0
    reader.invalid(child(path, "port"), number, check_port_number(number))
    protocol = reader.string(port.get("protocol"), child(path, "protocol")) or "TCP"
    if protocol not in _PROTOCOLS:
        reader.unsupported(child(path, "protocol"), protocol, _PROTOCOLS)
    target = port.get("targetPort")
    if not isinstance(target, str):
        target = reader.integer(target, child(path, "targetPort"))
    return ServicePort(
        name=reader.string(port.get("name"), child(path, "name")) or "",
        number=number,
        protocol=_PROTOCOLS.get(protocol, Protocol.TCP),
        target=target or number,
    )
