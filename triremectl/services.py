# SPDX-License-Identifier: Apache-2.0
"""Which pods are behind what a probe dials, by the Services among the manifests. Pure.

A pod that dials a Service is decided by the pod that answers: by its labels, its address and its port.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address

from enforcer_daemon.model import IPAddress
from enforcer_daemon.policy import Pod
from enforcer_daemon.policy.objects import Service, ServicePort
from triremectl.cases import Probe

PREFIX = "service:"


@dataclass(frozen=True, slots=True)
class Backend:
    """A pod that may answer for a Service."""

    probes: tuple[Probe, ...]
    """What to decide: the source towards this pod, on its own port. Of several, one that is allowed will do."""
    shown: Probe
    """The same, with the pod's name."""
    note: str = ""


def find_service(destination: str, services: Iterable[Service]) -> Service | None:
    """Return the Service that a probe's destination names, or whose address it is; raise ValueError if there is none.

    External addresses are not among these: whether pods show their identity there is a setting.
    """
    address = _address(destination)
    for service in services:
        if destination == f"{PREFIX}{service}" or (address is not None and address in service.addresses):
            return service
    if destination.startswith(PREFIX):
        raise ValueError(f"no Service {destination.removeprefix(PREFIX)} among the manifests")
    return None


def backends(probe: Probe, service: Service, pods: Iterable[Pod]) -> list[Backend]:
    """Return the pods that may answer; raise ValueError if that cannot be told, or none can."""
    if service.is_external_name:
        raise ValueError(f"Service {service} is an ExternalName: pods dial the addresses of that name")
    port = _port_of(probe, service)
    if not service.selector:
        raise ValueError(
            f"Service {service} has no selector: its endpoints are not among the manifests; ask for each endpoint's "
            "own address and port"
        )
    found = list(_find(probe, service, port, pods))
    if not found:
        raise ValueError(f"no pod among the manifests is behind Service {service}, port {port}")
    return found


def _port_of(probe: Probe, service: Service) -> ServicePort:
    for port in service.ports:
        if port.protocol is probe.protocol and probe.port in (port.number, port.name or None):
            return port
    listed = ", ".join(str(port) for port in service.ports) or "none"
    raise ValueError(f"Service {service} has no {probe.protocol.name} port {probe.port}; it has {listed}")


def _find(probe: Probe, service: Service, port: ServicePort, pods: Iterable[Pod]) -> Iterator[Backend]:
    dialed = _address(probe.destination)
    for pod in pods:
        if pod.ref.namespace != service.namespace or not _is_selected(pod.labels, service.selector):
            continue
        number = _target(port, pod)
        addresses = [ip for ip in pod.ips if dialed is None or ip.version == dialed.version]
        if number is None or (dialed is not None and not addresses):
            continue
        shown = replace(probe, destination=str(pod.ref), port=number)
        if pod.is_on_host_network:
            # No identity answers, so egress is decided by either address, as the daemon does.
            front = dialed or next(iter(service.addresses), None)
            note = f"{pod.ref} is on its node's network: decided by the dialed address, or by the node's"
            fronts = () if front is None else (replace(probe, destination=str(front), port=port.number),)
            yield Backend((*fronts, shown), shown, note)
        else:
            yield Backend((shown if dialed is None else replace(shown, destination=str(addresses[0])),), shown)


def _is_selected(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.items())


def _target(port: ServicePort, pod: Pod) -> int | None:
    """Return the pod's port; None if it gives no port that name, and so is no endpoint."""
    if isinstance(port.target, int):
        return port.target
    named = (p.number for p in pod.named_ports if p.name == port.target and p.protocol is port.protocol)
    return next(named, None)


def address_note(probe: Probe, services: Iterable[Service], pods: Iterable[Pod]) -> str:
    """Say what the destination may be beyond the address that it is decided as; empty if that is clear."""
    address, listed = _address(probe.destination), list(services)
    if address is None or any(address in pod.ips for pod in pods):
        return ""
    for service in listed:
        if address in service.external_ips:
            return (
                f"{address} is an external address of Service {service}, decided by address: "
                "networks.externalIpNetworks allows none by default; where it allows this one, ask for "
                f"{PREFIX}{service}"
            )
    if listed or not address.is_private:
        return ""
    return (
        f"{address} is no pod's or node's, and decided as an address outside; if a Service has it, add the Services to "
        "the manifests"
    )


def _address(text: str) -> IPAddress | None:
    try:
        return ip_address(text)
    except ValueError:
        return None
