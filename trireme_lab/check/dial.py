# SPDX-License-Identifier: Apache-2.0
"""What a probe of a case is in the lab: from which place and address to which, on which port. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_address

from enforcer_daemon.model import IPAddress, Protocol
from enforcer_daemon.policy import Pod
from trireme_lab.check.plan import Layout, is_sandboxed, node_of
from trireme_lab.errors import ScenarioError
from triremectl.cases import Case, Probe


class Unprobed(Enum):
    """Why a probe cannot be dialed; the value follows "N probes not probed: "."""

    ENDED_POD = "one end is a pod that has ended"
    NO_SUCH_PORT = "the destination has no port of that name to dial"


@dataclass(frozen=True, slots=True)
class Dial:
    """One connection or exchange of datagrams, by places of the lab."""

    source: str
    source_address: IPAddress | None
    """None: the kernel chooses (loopback)."""
    target: str
    address: IPAddress
    port: int
    protocol: Protocol = Protocol.TCP


def dial_of(layout: Layout, case: Case, probe: Probe) -> Dial | Unprobed:
    """Return how to dial a TCP or UDP probe; raise ScenarioError if its ends have no addresses of one family."""
    pods = {str(pod.ref): pod for pod in case.objects.pods}
    source, target = pods.get(probe.source), pods.get(probe.destination)
    if any(pod is not None and pod.is_finished for pod in (source, target)):
        return Unprobed.ENDED_POD
    sources, targets = _addresses(case, probe.source, source), _addresses(case, probe.destination, target)
    if target is None and targets[0].is_loopback:
        port = _port(probe, source)
        place = layout.owners[sources[0]]
        return Dial(place, None, place, targets[0], port, probe.protocol) if port else Unprobed.NO_SUCH_PORT
    pair = next(((s, t) for s in sources for t in targets if s.version == t.version), None)
    if pair is None:
        raise ScenarioError(f"{case.name}: {probe}: the two ends have no addresses of one family")
    owner = layout.owners[pair[1]]
    port = _port(probe, target if target is not None else pods.get(owner))
    if port == 0:
        return Unprobed.NO_SUCH_PORT
    return Dial(layout.owners[pair[0]], pair[0], owner, pair[1], port, probe.protocol)


def _addresses(case: Case, end: str, pod: Pod | None) -> tuple[IPAddress, ...]:
    if "/" not in end:
        return (ip_address(end),)
    if pod is None:
        raise ScenarioError(f"{case.name}: no pod {end}")
    node = "" if is_sandboxed(pod) else node_of(case, pod)
    return pod.ips or tuple(address for address, name in case.objects.nodes.items() if name == node)


def _port(probe: Probe, pod: Pod | None) -> int:
    if isinstance(probe.port, int):
        return probe.port
    ports = () if pod is None else pod.named_ports
    return next((p.number for p in ports if p.name == probe.port and p.protocol is probe.protocol), 0)
