# SPDX-License-Identifier: Apache-2.0
"""Which cases share a shared, and who has which address in it. Pure.

Cases can share one as long as no pod, node or address means two things. Pods that a case does not know do not disturb
it: nobody dials them, and policies add nothing for the others.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import TypeVar

from enforcer_daemon.model import IPAddress, PodRef
from enforcer_daemon.policy import Pod
from trireme_lab.errors import ScenarioError
from trireme_lab.spec import MAX_NODES, HostSpec, LabSpec, NodeSpec, PodSpec
from triremectl.cases import Case

MAX_PODS = 64
"""Of one shared: each is a network namespace with rules of its own."""
SPARE_NODES = ("spare-1", "spare-2")
"""Where pods run whose case names no node, in turns; nobody's own node in a probe."""

_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class Layout:
    """Who has which addresses."""

    pods: Mapping[PodRef, tuple[tuple[IPAddress, ...], str]]
    """Addresses and node; no node: any of the spare ones."""
    nodes: Mapping[str, tuple[IPAddress, ...]]
    """Addresses that cases name; there may be none."""
    owners: Mapping[IPAddress, str]
    """Which place of the lab has an address: a pod, a node, or a host without an enforcer."""

    def joined(self, other: Layout) -> Layout | None:
        """Return what holds for both; None if they contradict each other or are too many pods together."""
        pods, nodes = _joined(self.pods, other.pods), _joined(self.nodes, other.nodes)
        owners = _joined(self.owners, other.owners)
        if pods is None or nodes is None or owners is None or len(pods) > max(MAX_PODS, len(self.pods)):
            return None
        return Layout(pods, nodes, owners)


def _joined(ours: Mapping[_K, _V], theirs: Mapping[_K, _V]) -> Mapping[_K, _V] | None:
    if any(ours[key] != theirs[key] for key in ours.keys() & theirs.keys()):
        return None
    return {**ours, **theirs}


def is_sandboxed(pod: Pod) -> bool:
    """Return whether a pod has a network namespace of its own, with addresses that are its own."""
    return bool(pod.ips) and not pod.is_on_host_network and not pod.is_finished


def host_place(address: IPAddress) -> str:
    """Name the host that has an address of no pod and no node."""
    return f"host:{str(address).replace(':', '-')}"


def node_of(case: Case, pod: Pod) -> str:
    """Return the node of a pod on its node's network; empty if the case does not tell."""
    nodes = case.objects.nodes
    return pod.node or next((nodes[address] for address in pod.ips if address in nodes), "")


def layout_of(case: Case) -> Layout:
    """Return who has which addresses in a case; raise ScenarioError if two have one, or if no daemon can enforce it."""
    if case.objects.has_cluster_policies:
        raise ScenarioError(f"{case.name}: ClusterNetworkPolicy is not enforced; the case can only be simulated")
    pods = {pod.ref: (pod.ips, pod.node) for pod in case.objects.pods if is_sandboxed(pod)}
    nodes = _node_addresses(case)
    claims = [(f"node:{name}", addresses) for name, addresses in nodes.items()]
    claims += [(str(ref), addresses) for ref, (addresses, _) in pods.items()]
    owners: dict[IPAddress, str] = {}
    for place, addresses in claims:
        for address in addresses:
            if owners.setdefault(address, place) != place:
                raise ScenarioError(f"{case.name}: address {address}: of {owners[address]} and of {place}")
    for address in _bare_addresses(case):
        owners.setdefault(address, host_place(address))
    return Layout(pods, nodes, owners)


def _node_addresses(case: Case) -> dict[str, tuple[IPAddress, ...]]:
    """Gather all nodes that a case mentions, with the addresses that it gives to them or to pods on their network."""
    nodes: dict[str, dict[IPAddress, None]] = {}
    for address, name in case.objects.nodes.items():
        nodes.setdefault(name, {})[address] = None
    for pod in case.objects.pods:
        name = node_of(case, pod) if pod.is_on_host_network else pod.node
        if name and not pod.is_finished:
            nodes.setdefault(name, {}).update(dict.fromkeys(pod.ips if pod.is_on_host_network else ()))
    return {name: tuple(addresses) for name, addresses in nodes.items()}


def _bare_addresses(case: Case) -> Iterable[IPAddress]:
    """Yield the ends that are addresses, and those of pods on a network that belongs to no known node."""
    for end in (end for probe in case.probes for end in (probe.source, probe.destination) if "/" not in end):
        try:
            address = ip_address(end)
        except ValueError as err:
            raise ScenarioError(f"{case.name}: {end}: neither a pod (namespace/name) nor an address") from err
        if not address.is_loopback:
            yield address
    for pod in case.objects.pods:
        if pod.is_on_host_network and not node_of(case, pod):
            yield from pod.ips


@dataclass(frozen=True, slots=True)
class SharedLab:
    """Cases that one lab serves, in the order in which they run."""

    layout: Layout
    cases: tuple[Case, ...]


def share_labs(cases: Iterable[Case]) -> list[SharedLab]:
    """Put the cases into few labs; a sequence's steps follow one another in one, if its pods keep their addresses."""
    labs: list[SharedLab] = []
    for unit in _units(cases):
        layout = _unit_layout(unit)
        parts = [(layout, unit)] if layout is not None else [(layout_of(case), [case]) for case in unit]
        for part, members in parts:
            _place(labs, part, members)
    return labs


def _place(labs: list[SharedLab], layout: Layout, cases: Sequence[Case]) -> None:
    for index, shared in enumerate(labs):
        joined = shared.layout.joined(layout)
        if joined is not None:
            labs[index] = SharedLab(joined, (*shared.cases, *cases))
            return
    labs.append(SharedLab(layout, tuple(cases)))


def _unit_layout(unit: Sequence[Case]) -> Layout | None:
    layout: Layout | None = Layout({}, {}, {})
    for case in unit:
        layout = None if layout is None else layout.joined(layout_of(case))
    return layout


def _units(cases: Iterable[Case]) -> list[list[Case]]:
    """Gather the steps of each sequence, in their order."""
    units: dict[object, list[Case]] = {}
    for number, case in enumerate(cases):
        units.setdefault(case.objects.sequence or number, []).append(case)
    return [sorted(unit, key=lambda case: case.objects.step) for unit in units.values()]


def sample(cases: Iterable[Case], count: int, seed: int) -> list[Case]:
    """Choose about `count` cases, whole sequences together; the same ones for the same seed, whatever their order."""

    def draw(unit: Sequence[Case]) -> bytes:
        return hashlib.sha256(f"{seed} {unit[0].objects.sequence} {unit[0].name}".encode()).digest()

    chosen: list[Case] = []
    for unit in sorted(_units(cases), key=draw):
        if len(chosen) >= count:
            break
        chosen += unit
    return chosen


def spec_of(layout: Layout, deny_with: str) -> LabSpec:
    """Return the lab's shared for a layout: every pod with a route of its own, every other address a host."""
    spare = itertools.cycle(SPARE_NODES)
    pods = [PodSpec(ref, node or next(spare), addresses=ips) for ref, (ips, node) in layout.pods.items()]
    names = [*layout.nodes, *(SPARE_NODES if any(not node for _, node in layout.pods.values()) else ())]
    numbers = iter(range(1, MAX_NODES + 1))
    return LabSpec(
        nodes=tuple(_node(name, layout, pods, numbers) for name in names),
        pods=tuple(pods),
        hosts=tuple(
            HostSpec(place.removeprefix("host:"), (address,))
            for address, place in layout.owners.items()
            if place.startswith("host:")
        ),
        settings={"denyWith": deny_with},
    )


def _node(name: str, layout: Layout, pods: Iterable[PodSpec], numbers: Iterable[int]) -> NodeSpec:
    default = next(
        (spec for spec in (NodeSpec.numbered(name, number) for number in numbers) if not _is_taken(spec, layout)), None
    )
    if default is None:
        raise ScenarioError(f"node {name}: no address is left for it")
    addresses = layout.nodes.get(name, ())
    versions = {address.version for address in addresses}
    return NodeSpec(
        name,
        (*addresses, *(address for address in default.addresses if address.version not in versions)),
        tuple(ip_network(address) for pod in pods if pod.node == name for address in pod.addresses),
        is_routed=True,
    )


def _is_taken(spec: NodeSpec, layout: Layout) -> bool:
    return any(address in layout.owners for address in spec.addresses)
