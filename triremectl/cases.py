# SPDX-License-Identifier: Apache-2.0
"""Worlds of pods, namespaces and policies, and who may reach whom in them: what `simulate` and the lab's checks
evaluate.

A case is one JSON object: name, namespaces, pods, policies (manifests of NetworkPolicy and ClusterNetworkPolicy),
nodes, and probes, each with the verdict expected of it. Both ends of a probe are judged as two enforcers would, each on
the other end's identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address

from enforcer_daemon.model import Decision, Direction, Identity, IPAddress, NamedPort, PodRef, Protocol
from enforcer_daemon.policy import NetworkPolicy, Pod, compile_snapshot, decode_network_policy, namespace_labels
from enforcer_daemon.policy.cluster_objects import Channel, ClusterNetworkPolicy
from enforcer_daemon.policy.decode_cluster import decode_cluster_policy
from enforcer_daemon.policy.evaluate_cluster import ClusterPolicies, Flow, Node
from enforcer_daemon.policy.reader import InvalidObjectError, Reader, child
from enforcer_daemon.reasons import Reason

PROTOCOLS = {"TCP": Protocol.TCP, "UDP": Protocol.UDP, "SCTP": Protocol.SCTP}
_VERDICTS = ("allow", "deny")
_BOTH_ENDS = "egress+ingress"
"""Another way to write "both"."""
_DENIERS = ("egress", "ingress", "both", _BOTH_ENDS)
_UNNAMED_PORT = 0  # what a name is that the destination gives to no port: in "all ports", but no port's number
_ADDRESS_FIELDS = ("ip", "ips", "address", "addresses", "internalIP")


@dataclass(frozen=True, slots=True)
class Probe:
    """One connection that is tried."""

    source: str
    """namespace/pod, or an address."""
    destination: str
    port: int | str
    """Of the destination; a name is the destination pod's."""
    protocol: Protocol = Protocol.TCP
    expected: str | None = None
    """allow, deny, or None if the case does not say."""
    denied_by: str | None = None
    """egress, ingress or both."""

    def __str__(self) -> str:
        return f"{self.source} -> {self.destination} {self.protocol.name} {self.port}"


@dataclass(frozen=True, slots=True)
class ProbeVerdict:
    """What both ends say of a probe."""

    egress: Decision
    ingress: Decision
    limits: tuple[str, ...] = ()
    """Limits that the policies of the two ends exceed, which shape these decisions."""

    @property
    def is_allowed(self) -> bool:
        """Whether both ends allow it."""
        return self.egress.is_allowed and self.ingress.is_allowed

    @property
    def verdict(self) -> str:
        """The verdict as cases spell it."""
        return "allow" if self.is_allowed else "deny"

    @property
    def denied_by(self) -> str | None:
        """Which end denies it; None if none does."""
        if self.egress.is_allowed:
            return None if self.ingress.is_allowed else "ingress"
        return "egress" if self.ingress.is_allowed else "both"


@dataclass(frozen=True, slots=True)
class _End:
    """One end of a probe: a pod with an identity, or only addresses."""

    addresses: tuple[IPAddress, ...]
    identity: Identity | None = None
    node: str = ""
    """The node that these are the addresses of, also for a pod on its node's network; empty: no node's."""


WITH_IDENTITY = frozenset({Protocol.TCP, Protocol.UDP})
"""Protocols by which enforcers show each other identities."""


class CaseCluster:
    """Pods, namespaces and policies that probes are judged in."""

    def __init__(
        self,
        pods: Iterable[Pod],
        namespaces: Mapping[str, Mapping[str, str]],
        policies: Iterable[NetworkPolicy],
        nodes: Mapping[IPAddress, str] | None = None,
        cluster_policies: ClusterPolicies | None = None,
    ) -> None:
        self._nodes = dict(nodes or {})
        self._cluster_policies = cluster_policies or ClusterPolicies(())
        self._snapshot = compile_snapshot(policies, generation=1)
        self._pods: dict[str, _End] = {}
        self._owners: dict[IPAddress, _End] = {}
        for pod in pods:
            labels = namespace_labels(pod.ref.namespace, namespaces.get(pod.ref.namespace))
            end = self._pods[str(pod.ref)] = self._end_of(pod, labels)
            if end.identity is not None and not pod.is_finished:
                self._owners.update(dict.fromkeys(end.addresses, end))

    def _end_of(self, pod: Pod, labels: Mapping[str, str]) -> _End:
        if pod.is_on_host_network:
            # No selector sees such a pod; to all others it is its node.
            node = pod.node or next((self._nodes[ip] for ip in pod.ips if ip in self._nodes), "")
            return _End(pod.ips or tuple(ip for ip, name in self._nodes.items() if name == node), node=node)
        identity = Identity(
            pod.ref, pod.ips, pod.labels, labels, pod.node, pod.service_account, named_ports=pod.named_ports
        )
        return _End(pod.ips, identity)

    def _limits(self, identity: Identity | None) -> tuple[str, ...]:
        """Return the limits that the policies of an end exceed, in the daemon's words."""
        if identity is None:
            return ()
        if problem := self._snapshot.problem_of(identity.pod.namespace):
            return (problem,)
        return self._snapshot.pod_policy(identity).problems

    def evaluate(
        self, probe: Probe, *, explain: bool = False, as_enforced: bool = False, hides_peers: bool = False
    ) -> ProbeVerdict:
        """Evaluate a probe at both ends; `explain` names all rules that allow it, not one. ValueError: no such end.

        `as_enforced`: as the enforcers do, which see no identity of a peer by SCTP, and not as NetworkPolicy means it.
        `hides_peers`: no pod proves its identity to another.
        """
        source, destination = self._end(probe.source), self._end(probe.destination)
        if source.identity is not None and any(address.is_loopback for address in destination.addresses):
            destination = source
        if source.identity is not None and source.identity is destination.identity:
            return ProbeVerdict(_allowed(Reason.SELF, Direction.EGRESS), _allowed(Reason.SELF, Direction.INGRESS))
        port = _port_number(probe, destination.identity)
        source_address, destination_address = _same_family(source, destination)
        is_hidden = hides_peers or (as_enforced and probe.protocol not in WITH_IDENTITY)
        egress, ingress = _allowed(Reason.NOT_ISOLATED, Direction.EGRESS), _allowed(Reason.NOT_ISOLATED,
                                                                                    Direction.INGRESS)  # fmt: skip
        if source.identity is not None:
            flow = _flow(destination, destination_address, port, probe.protocol, is_hidden)
            egress = self._decide(source.identity, Direction.EGRESS, flow, explain=explain)
        if destination.identity is not None:
            flow = _flow(source, source_address, port, probe.protocol, is_hidden)
            ingress = self._decide(destination.identity, Direction.INGRESS, flow, explain=explain)
            if source.node and source.node == destination.identity.node:
                ingress = _allowed(Reason.NODE, Direction.INGRESS)
        limits = dict.fromkeys((*self._limits(source.identity), *self._limits(destination.identity)))
        return ProbeVerdict(egress, ingress, tuple(limits))

    def _decide(self, identity: Identity, direction: Direction, flow: Flow, *, explain: bool) -> Decision:
        policy = self._snapshot.pod_policy(identity).direction(direction)
        return self._cluster_policies.direction(identity, policy, direction).evaluate(flow, explain=explain)

    def _end(self, name: str) -> _End:
        if "/" in name:
            try:
                return self._pods[name]
            except KeyError:
                raise ValueError(f"no pod {name}") from None
        try:
            address = ip_address(name)
        except ValueError:
            raise ValueError(f"{name}: must be NAMESPACE/POD or an IP address") from None
        if owner := self._owners.get(address):
            return replace(owner, addresses=(address,))  # of a pod's two families, the one that is dialed
        return _End((address,), node=self._nodes.get(address, ""))


def _allowed(reason: Reason, direction: Direction) -> Decision:
    return Decision(True, reason, direction)


def _flow(peer: _End, address: IPAddress, port: int, protocol: Protocol, is_hidden: bool) -> Flow:
    # The case names all its pods, so every other address is a node's or outside.
    is_pod = peer.identity is not None
    return Flow(None if is_hidden else peer.identity, address, is_pod_address=is_pod, port=port, protocol=protocol)


def _port_number(probe: Probe, destination: Identity | None) -> int:
    if isinstance(probe.port, int):
        return probe.port
    ports = () if destination is None else destination.named_ports
    return next((p.number for p in ports if p.name == probe.port and p.protocol is probe.protocol), _UNNAMED_PORT)


def _same_family(source: _End, destination: _End) -> tuple[IPAddress, IPAddress]:
    for ours in source.addresses:
        for theirs in destination.addresses:
            if ours.version == theirs.version:
                return ours, theirs
    raise ValueError("the two ends have no addresses of one family")


@dataclass(frozen=True, slots=True)
class Case:
    """One case: a world and the probes of it."""

    name: str
    cluster: CaseCluster
    probes: tuple[Probe, ...]
    objects: CaseObjects


@dataclass(frozen=True, slots=True)
class CaseObjects:
    """What a case's world is made of, for those who build it elsewhere."""

    pods: tuple[Pod, ...]
    namespaces: Mapping[str, Mapping[str, str]]
    policies: tuple[Mapping[str, object], ...]
    """Manifests as the case has them."""
    nodes: Mapping[IPAddress, str]
    has_cluster_policies: bool = False
    """Some of the policies are ClusterNetworkPolicies."""
    has_old_cidrs: bool = False
    """CIDRs are written as before Kubernetes 1.36: host bits are to be masked."""
    sequence: str = ""
    """Cases of one sequence follow one another in one cluster; empty: the case stands alone."""
    step: int = 0
    """Place in the sequence."""


def decode_case(tree: object) -> Case:
    """Read a case; raise InvalidObjectError that names the fields at fault. Unknown fields are remarks."""
    reader = Reader()
    top = reader.struct(tree, "")
    name = reader.string(top.get("name"), "name") or ""
    requires = [reader.string(entry, path) for path, entry in reader.sequence(top.get("requires"), "requires")]
    namespaces = {}
    for path, entry in reader.sequence(top.get("namespaces"), "namespaces"):
        namespace = reader.struct(entry, path)
        key = reader.string(namespace.get("name"), child(path, "name")) or ""
        namespaces[key] = reader.string_map(namespace.get("labels"), child(path, "labels"))
    pods = [_read_pod(reader, entry, path) for path, entry in reader.sequence(top.get("pods"), "pods")]
    probes = tuple(_read_probe(reader, entry, path) for path, entry in reader.sequence(top.get("probes"), "probes"))
    nodes = _read_nodes(reader, top.get("nodes"))
    sequence = reader.struct(top.get("sequence"), "sequence")
    is_legacy = "legacy-cidr" in requires
    manifests, policies = [], []
    cluster_policies: list[ClusterNetworkPolicy] = []
    for path, manifest in reader.sequence(top.get("policies"), "policies"):
        try:
            if isinstance(manifest, Mapping) and manifest.get("kind") == "ClusterNetworkPolicy":
                cluster_policies.append(decode_cluster_policy(manifest, Channel.EXPERIMENTAL))
            else:
                policies.append(decode_network_policy(manifest, mask_host_bits=is_legacy))
            manifests.append(reader.struct(manifest, path))
        except InvalidObjectError as err:
            reader.problems += [type(p)(child(path, p.field), p.message) for p in err.problems]
    objects = CaseObjects(
        pods=tuple(pods),
        namespaces=namespaces,
        policies=tuple(manifests),
        nodes=nodes,
        has_cluster_policies=bool(cluster_policies),
        has_old_cidrs=is_legacy,
        sequence=reader.string(sequence.get("id"), "sequence.id") or "",
        step=reader.integer(sequence.get("step"), "sequence.step") or 0,
    )
    node_objects = _read_node_labels(reader, top.get("nodes"), nodes)
    reader.finish()
    tiers = ClusterPolicies(cluster_policies, node_objects)
    return Case(name, CaseCluster(pods, namespaces, policies, nodes, tiers), probes, objects)


def _read_pod(reader: Reader, value: object, path: str) -> Pod:
    tree = reader.struct(value, path)
    ports = []
    for port_path, entry in reader.sequence(tree.get("containerPorts"), child(path, "containerPorts")):
        port = reader.struct(entry, port_path)
        name = reader.string(port.get("name"), child(port_path, "name"))
        number = reader.integer(port.get("port", port.get("containerPort")), child(port_path, "port"))
        if name and number is not None:
            ports.append(NamedPort(name, number, _read_protocol(reader, port, port_path)))
    namespace = reader.string(tree.get("namespace"), child(path, "namespace")) or ""
    return Pod(
        ref=PodRef(namespace, reader.string(tree.get("name"), child(path, "name")) or ""),
        labels=reader.string_map(tree.get("labels"), child(path, "labels")),
        named_ports=tuple(ports),
        ips=_read_addresses(reader, tree, path),
        node=reader.string(tree.get("node", tree.get("nodeName")), child(path, "node")) or "",
        is_on_host_network=reader.boolean(tree.get("hostNetwork"), child(path, "hostNetwork")),
        is_finished=reader.string(tree.get("phase"), child(path, "phase")) in ("Succeeded", "Failed"),
    )


def _read_nodes(reader: Reader, value: object) -> dict[IPAddress, str]:
    """Read nodes: a list of {name, ip}, or a map of names to addresses."""
    if isinstance(value, Mapping):
        value = [
            {"name": name, **entry} if isinstance(entry, Mapping) else {"name": name, "ips": entry}
            for name, entry in value.items()
        ]
    nodes = {}
    for path, entry in reader.sequence(value, "nodes"):
        tree = reader.struct(entry, path)
        name = reader.string(tree.get("name"), child(path, "name")) or ""
        nodes.update(dict.fromkeys(_read_addresses(reader, tree, path), name))
    return nodes


def _read_node_labels(reader: Reader, value: object, nodes: Mapping[IPAddress, str]) -> list[Node]:
    """Read the labels of nodes that are a list; those of a map have none."""
    found: dict[str, Mapping[str, str]] = {name: {} for name in nodes.values()}
    for path, entry in reader.sequence(value, "nodes") if isinstance(value, list | tuple) else ():
        tree = reader.struct(entry, path)
        name = tree.get("name")
        if isinstance(name, str):
            found[name] = reader.string_map(tree.get("labels"), child(path, "labels"))
    return [
        Node(labels, tuple(address for address, owner in nodes.items() if owner == name))
        for name, labels in found.items()
    ]


def _read_addresses(reader: Reader, tree: Mapping[str, object], path: str) -> tuple[IPAddress, ...]:
    found: dict[IPAddress, None] = {}
    for field in _ADDRESS_FIELDS:
        value, field_path = tree.get(field), child(path, field)
        entries = [(field_path, value)] if isinstance(value, str) else reader.sequence(value, field_path)
        for entry_path, entry in entries:
            text = reader.string(entry, entry_path) or ""
            try:
                found[ip_address(text)] = None
            except ValueError:
                reader.invalid(entry_path, text, ["must be a valid IP address"])
    return tuple(found)


def _read_protocol(reader: Reader, tree: Mapping[str, object], path: str) -> Protocol:
    text = reader.string(tree.get("protocol"), child(path, "protocol")) or "TCP"
    if text not in PROTOCOLS:
        reader.unsupported(child(path, "protocol"), text, PROTOCOLS)
    return PROTOCOLS.get(text, Protocol.TCP)


def _read_probe(reader: Reader, value: object, path: str) -> Probe:
    tree = reader.struct(value, path)
    denied_by = _read_choice(reader, tree, path, "denied_by", _DENIERS)
    port = tree.get("port")
    if not isinstance(port, str):
        port = reader.integer(port, child(path, "port")) or 0
    return Probe(
        source=_read_end(reader, tree, path, "from"),
        destination=_read_end(reader, tree, path, "to"),
        port=port,
        protocol=_read_protocol(reader, tree, path),
        expected=_read_choice(reader, tree, path, "expected", _VERDICTS),
        denied_by="both" if denied_by == _BOTH_ENDS else denied_by,
    )


def _read_end(reader: Reader, tree: Mapping[str, object], path: str, field: str) -> str:
    text = reader.string(tree.get(field), child(path, field))
    if text == "":
        reader.refuse(child(path, field), "Required value")
    return text or ""


def _read_choice(
    reader: Reader, tree: Mapping[str, object], path: str, field: str, choices: tuple[str, ...]
) -> str | None:
    text = reader.string(tree.get(field), child(path, field))
    if text and text not in choices:
        reader.unsupported(child(path, field), text, choices)
    return text or None
