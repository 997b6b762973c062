# SPDX-License-Identifier: Apache-2.0
"""Decodes ClusterNetworkPolicy manifests, and refuses what the CustomResourceDefinition refuses, with its reasons.

Source of the rules: the CRDs of network-policy-api v0.2.0 (policy.networking.k8s.io/v1alpha2), standard and
experimental channel. The CRDs check neither label syntax nor operators of selectors; a new object with such a fault is
refused all the same, and in a stored object the selector counts as not understood.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_network

from enforcer_daemon.model import IPNetwork, Protocol
from enforcer_daemon.policy.cluster_objects import (
    Action,
    AnyonePeer,
    Channel,
    ClusterNetworkPolicy,
    ClusterPeer,
    ClusterRule,
    DomainNamesPeer,
    NetworksPeer,
    NodesPeer,
    Subject,
    Tier,
)
from enforcer_daemon.policy.complexity import check_cluster_policy
from enforcer_daemon.policy.crd import SchemaReader
from enforcer_daemon.policy.metadata import check_object_name, read_metadata, read_object, read_selector
from enforcer_daemon.policy.objects import EVERYTHING, LAST_PORT, PodPeer, PortMatch, PortName, PortRange, Selector
from enforcer_daemon.policy.reader import Reader, child

API_VERSION = "policy.networking.k8s.io/v1alpha2"
MAX_ITEMS = 25
"""Entries of every list of the spec: the budget of the CRD's validation expressions."""
_MAX_PRIORITY = 1_000
_MAX_NAME = 100
_MAX_CIDR = 43
_PROTOCOLS = {"tcp": Protocol.TCP, "udp": Protocol.UDP, "sctp": Protocol.SCTP}
_PROTOCOL_FIELDS = (*_PROTOCOLS, "destinationNamedPort")
_INGRESS_PEERS = ("namespaces", "pods")
_EGRESS_PEERS = {
    Channel.STANDARD: (*_INGRESS_PEERS, "networks"),
    Channel.EXPERIMENTAL: (*_INGRESS_PEERS, "networks", "nodes", "domainNames"),
}
# The range A-z is the CRD's own: it takes [ \ ] ^ _ and ` too.
_DOMAIN_NAME = r"^(\*\.)?([a-zA-z0-9]([-a-zA-Z0-9_]*[a-zA-Z0-9])?\.)+[a-zA-z0-9]([-a-zA-Z0-9_]*[a-zA-Z0-9])?\.?$"
_domain_name = re.compile(_DOMAIN_NAME.removesuffix("$"), re.ASCII)
_prefix_length = re.compile("0|[1-9][0-9]{0,2}", re.ASCII)


def decode_cluster_policy(
    manifest: object, channel: Channel = Channel.STANDARD, *, is_stored: bool = False
) -> ClusterNetworkPolicy:
    """Read one ClusterNetworkPolicy; raise InvalidObjectError with every problem and its field.

    `is_stored` reads an object that an API server has, of whatever version of the CRD: a peer without a known field, or
    with a selector that has no meaning, closes its rule instead of being a problem. A subject or protocol that is not
    understood stays a problem, since nothing says which pods or ports it is for.
    """
    if isinstance(manifest, Mapping):
        check_cluster_policy(manifest.get("spec"))
    reader = Reader(is_stored=is_stored)
    top = read_object(reader, manifest, API_VERSION, "ClusterNetworkPolicy", ["spec", "status"])
    metadata = read_metadata(reader, top.get("metadata"), check_object_name)
    given = top.get("metadata")
    if isinstance(given, Mapping) and given.get("namespace"):
        reader.refuse("metadata.namespace", "Forbidden: not allowed on this type")
    if "spec" not in top:
        reader.refuse("spec", "Required value")
        reader.finish()
    policy = _SpecReader(reader, channel).read(metadata.name, top.get("spec"))
    reader.finish()
    return policy


class _SpecReader:
    """Reads the spec of one policy."""

    def __init__(self, reader: Reader, channel: Channel) -> None:
        self._reader = reader
        self._schema = SchemaReader(reader)
        self._channel = channel

    def read(self, name: str, value: object) -> ClusterNetworkPolicy:
        schema = self._schema
        fields = ("tier", "priority", "subject", "ingress", "egress")
        spec = schema.struct(value, "spec", fields, required=("priority", "subject", "tier"))
        tier = schema.choice(spec["tier"], "spec.tier", Tier) if "tier" in spec else None
        priority = None
        if "priority" in spec:
            priority = schema.integer(spec["priority"], "spec.priority", 0, _MAX_PRIORITY)
        subject = self._read_subject(spec["subject"], "spec.subject") if "subject" in spec else None
        return ClusterNetworkPolicy(
            name=name,
            # What is at fault has been noted, and the object is then refused.
            tier=tier or Tier.ADMIN,
            priority=priority or 0,
            subject=subject or Subject(EVERYTHING, EVERYTHING),
            ingress=self._read_rules(spec, "ingress", "from", _INGRESS_PEERS),
            egress=self._read_rules(spec, "egress", "to", _EGRESS_PEERS[self._channel]),
        )

    def _read_subject(self, value: object, path: str) -> Subject | None:
        chosen = self._schema.one_of(value, path, _INGRESS_PEERS)
        if chosen is None:
            return None
        peer = self._read_pods(self._reader, *chosen, child(path, chosen[0]))
        return None if peer is None else Subject(peer.namespace_selector or EVERYTHING, peer.pod_selector)

    def _read_rules(
        self, spec: Mapping[str, object], field: str, peers_field: str, peer_fields: tuple[str, ...]
    ) -> tuple[ClusterRule, ...]:
        if field not in spec:
            return ()
        rules = []
        for path, entry in self._schema.items(spec[field], f"spec.{field}", MAX_ITEMS):
            rule = self._read_rule(entry, path, peers_field, peer_fields)
            if rule is not None:
                rules.append(rule)
        return tuple(rules)

    def _read_rule(
        self, value: object, path: str, peers_field: str, peer_fields: tuple[str, ...]
    ) -> ClusterRule | None:
        schema = self._schema
        fields = ("name", "action", peers_field, "protocols")
        tree = schema.struct(value, path, fields, required=("action", peers_field))
        name = schema.string(tree["name"], child(path, "name"), _MAX_NAME) if "name" in tree else ""
        action = schema.choice(tree["action"], child(path, "action"), Action) if "action" in tree else None
        ports = self._read_protocols(tree["protocols"], child(path, "protocols")) if "protocols" in tree else ()
        peers: list[ClusterPeer | None] = []
        if peers_field in tree:
            entries = schema.items(tree[peers_field], child(path, peers_field), MAX_ITEMS, least=1)
            peers = [self._read_peer(entry, entry_path, peer_fields) for entry_path, entry in entries]
            self._check_named_ports(tree, path, entries)
        if action is None:
            return None
        known = tuple(peer for peer in peers if peer is not None)
        if len(known) == len(peers):
            return ClusterRule(action, known, ports, name or "")
        return _closed(action, name or "")

    def _check_named_ports(self, tree: Mapping[str, object], path: str, entries: list[tuple[str, object]]) -> None:
        protocols = tree.get("protocols")
        if self._channel is Channel.STANDARD or self._reader.is_stored or not isinstance(protocols, list | tuple):
            return
        by_address = {"networks", "nodes", "domainNames"}
        if any(isinstance(peer, Mapping) and by_address & peer.keys() for _, peer in entries) and any(
            isinstance(entry, Mapping) and "destinationNamedPort" in entry for entry in protocols
        ):
            complaint = (
                "networks/nodes/domainNames peer cannot be set with namedPorts since there are no namedPorts for "
                "networks/nodes/domainNames"
            )
            self._reader.invalid(path, "object", [complaint])

    def _read_peer(self, value: object, path: str, fields: tuple[str, ...]) -> ClusterPeer | None:
        """Read a peer; None: it is not understood, and for a new object that is a problem too."""
        reader = Reader(is_stored=True) if self._reader.is_stored else self._reader
        schema, found = SchemaReader(reader), len(reader.problems)
        chosen = schema.one_of(value, path, fields)
        peer = None if chosen is None else self._read_chosen(reader, *chosen, path)
        return peer if len(reader.problems) == found else None

    def _read_chosen(self, reader: Reader, field: str, value: object, path: str) -> ClusterPeer | None:
        schema, path = SchemaReader(reader), child(path, field)
        match field:
            case "networks":
                entries = schema.string_set(value, path, MAX_ITEMS)
                networks = [_read_network(reader, text, entry_path) for entry_path, text in entries]
                return NetworksPeer(tuple(network for network in networks if network is not None))
            case "nodes":
                return NodesPeer(_read_selector(reader, value, path))
            case "domainNames":
                names = schema.string_set(value, path, MAX_ITEMS)
                for entry_path, text in names:
                    if not _domain_name.fullmatch(text):
                        reader.invalid(entry_path, text, [f"{entry_path} in body should match '{_DOMAIN_NAME}'"])
                return DomainNamesPeer(tuple(text for _, text in names))
            case _:
                return self._read_pods(reader, field, value, path)

    def _read_pods(self, reader: Reader, field: str, value: object, path: str) -> PodPeer | None:
        if field == "namespaces":
            return PodPeer(EVERYTHING, _read_selector(reader, value, path))
        fields = ("namespaceSelector", "podSelector")
        tree = SchemaReader(reader).struct(value, path, fields, required=("podSelector",))
        selectors = {name: _read_selector(reader, tree[name], child(path, name)) for name in fields if name in tree}
        return PodPeer(selectors.get("podSelector", EVERYTHING), selectors.get("namespaceSelector", EVERYTHING))

    def _read_protocols(self, value: object, path: str) -> tuple[PortMatch, ...]:
        ports: list[PortMatch] = []
        for entry_path, entry in self._schema.items(value, path, MAX_ITEMS, least=1):
            chosen = self._schema.one_of(entry, entry_path, _PROTOCOL_FIELDS)
            if chosen is None:
                continue
            field, entry = chosen
            if field == "destinationNamedPort":
                name = self._schema.string(entry, child(entry_path, field))
                ports += [] if name is None else [PortName(protocol, name) for protocol in _PROTOCOLS.values()]
                continue
            span = self._read_ports(entry, child(entry_path, field))
            ports += [] if span is None else [PortRange(_PROTOCOLS[field], *span)]
        return tuple(ports)

    def _read_ports(self, value: object, path: str) -> tuple[int, int] | None:
        schema = self._schema
        found = schema.one_of(value, path, ("destinationPort",))
        path = child(path, "destinationPort")
        chosen = None if found is None else schema.one_of(found[1], path, ("number", "range"))
        if chosen is None:
            return None
        field, entry = chosen
        path = child(path, field)
        if field == "number":
            number = schema.integer(entry, path, 1, LAST_PORT)
            return None if number is None else (number, number)
        tree = schema.struct(entry, path, ("start", "end"), required=("end", "start"))
        ends = [
            schema.integer(tree[name], child(path, name), 1, LAST_PORT) if name in tree else None
            for name in ("start", "end")
        ]
        first, last = ends
        if first is None or last is None:
            return None
        if first >= last:
            self._reader.invalid(path, "object", ["Start port must be less than End port"])
        return first, last


def _closed(action: Action, name: str) -> ClusterRule:
    """Return what stands for a rule with a peer that is not understood."""
    if action is Action.ACCEPT:
        return ClusterRule(action, (), name=name, is_understood=False)
    return ClusterRule(Action.DENY, (AnyonePeer(),), name=name, is_understood=False)


def _read_selector(reader: Reader, value: object, path: str) -> Selector:
    """Read a selector whose parts may not be null, unlike those of built-in types."""
    schema = SchemaReader(reader)
    tree = schema.struct(value, path, ("matchLabels", "matchExpressions"))
    if not isinstance(value, Mapping):
        return EVERYTHING
    for name, expected in (("matchLabels", Mapping), ("matchExpressions", list | tuple)):
        if name in tree and not isinstance(tree[name], expected):
            schema.wrong_type(child(path, name), tree[name], "object" if expected is Mapping else "array")
            return EVERYTHING
    found = len(reader.problems)
    expressions = tree.get("matchExpressions", ())
    for index, entry in enumerate(expressions if isinstance(expressions, list | tuple) else ()):
        entry_path = f"{child(path, 'matchExpressions')}[{index}]"
        schema.struct(entry, entry_path, ("key", "operator", "values"), required=("key", "operator"))
    if len(reader.problems) > found:
        return EVERYTHING
    return read_selector(reader, tree, path)


def _read_network(reader: Reader, text: str, path: str) -> IPNetwork | None:
    """Read a CIDR as the expression isCIDR does: bits beyond the prefix are accepted, IPv4-mapped IPv6 is not."""
    if len(text) > _MAX_CIDR:
        reader.refuse(path, f"Too long: may not be more than {_MAX_CIDR} bytes")
        return None
    address, _, digits = text.rpartition("/")
    if _prefix_length.fullmatch(digits) and "%" not in address:
        for family in (IPv4Address, IPv6Address):
            try:
                parsed = family(address)
            except ValueError:
                continue
            is_mapped = isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None
            if not is_mapped and int(digits) <= parsed.max_prefixlen:
                return ip_network((parsed, int(digits)), strict=False)
    reader.invalid(path, text, ["Invalid CIDR format provided"])
    return None
