# SPDX-License-Identifier: Apache-2.0
"""Why a flow was denied: found in what the enforcers at both of its ends remember of their recent denials."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from trireme_lab.lab import Lab
from trireme_lab.probe import Probe, ProbeResult
from trireme_lab.scenario import Flow
from triremectl.admin_client import AdminError

_CLOCK_SLACK_S = 0.05
"""Between the lab's reading of the clock and the daemon's."""


@dataclass(frozen=True, slots=True)
class Denial:
    """One end's denial."""

    pod: str
    """Whose enforcer denied."""
    direction: str
    reason: str
    rules: tuple[str, ...] = ()
    """The policies that decided."""


def find_denial(lab: Lab, flow: Flow, probe: Probe, result: ProbeResult) -> Denial | None:
    """Return what an enforcer said of this flow since the probe began; None for allowed flows and where none spoke."""
    if not result.outcome.is_denied:
        return None
    targets = _target_pods(lab, flow, probe)
    answering = {probe.address} | {address for pod in targets for address in lab.place(pod).addresses}
    ends = [(flow.source, "egress", {str(address) for address in answering})] if lab.has_pod(flow.source) else []
    ends += [(pod, "ingress", {str(address) for address in lab.place(flow.source).addresses}) for pod in targets]
    ports = _ports(lab, flow)
    for pod, direction, peers in ends:
        for record in _recent_denials(lab, pod, result.started):
            if (
                record.get("direction") == direction
                and str(record.get("address")) in peers
                and record.get("port") in ports
                and record.get("protocol") == flow.protocol.value
            ):
                return Denial(pod, direction, str(record.get("reason")), _rules(record.get("rules")))
    return None


def _target_pods(lab: Lab, flow: Flow, probe: Probe) -> list[str]:
    """The pods that could answer: behind the Service, or at the dialed address."""
    for service in lab.spec.services:
        is_dialed = probe.address in (*service.addresses, *service.external_ips)
        if is_dialed or flow.target == f"service:{service.namespace}/{service.name}":
            return [str(pod) for pod in service.pods]
    return [str(pod) for pod, sandbox in lab.pods.items() if probe.address in sandbox.place.addresses]


def _ports(lab: Lab, flow: Flow) -> set[int]:
    """The dialed port, and those that a Service translates it to."""
    return {flow.port} | {
        port.target_port
        for service in lab.spec.services
        for port in service.ports
        if flow.port in (port.port, port.node_port)
    }


def _recent_denials(lab: Lab, pod: str, since: float) -> Iterator[Mapping[str, object]]:
    """Yield the denials of one pod's enforcer that are not older than `since`, newest first."""
    node = lab.pod_node(pod)
    if not node.has_enforcer:
        return
    try:
        endpoints = node.endpoints()
    except AdminError:  # the daemon is down: it cannot say anything
        return
    for endpoint in endpoints:
        denials = endpoint.get("recent_denials")
        if _pod_name(endpoint) == pod and isinstance(denials, Sequence):
            for record in reversed(denials):
                if isinstance(record, Mapping) and _when(record.get("when")) >= since - _CLOCK_SLACK_S:
                    yield record


def _pod_name(endpoint: Mapping[str, object]) -> str:
    name = str(endpoint.get("pod"))
    return name if "/" in name else f"{endpoint.get('namespace')}/{name}"


def _when(value: object) -> float:
    """Read a time that is in seconds since the epoch or in ISO form."""
    if isinstance(value, int | float):
        return float(value)
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except ValueError:
        return 0.0


def _rules(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else ()
