# SPDX-License-Identifier: Apache-2.0
"""Decodes NetworkPolicy manifests, and refuses what the Kubernetes API server refuses, with its reasons.

Source of the rules: pkg/apis/networking/validation/validation.go of Kubernetes 1.36, and the API's strict decoder.
A manifest is what a YAML or JSON parser gives: mappings with string keys, lists, strings, numbers, booleans, None.
"""

from __future__ import annotations

from collections.abc import Mapping

from enforcer_daemon.model import IPNetwork, Protocol
from enforcer_daemon.policy.complexity import check_policy
from enforcer_daemon.policy.limits import stored_bytes, stored_form
from enforcer_daemon.policy.metadata import check_object_name, read_metadata, read_object, read_selector
from enforcer_daemon.policy.objects import IPBlock, NetworkPolicy, Peer, PodPeer, PortMatch, PortName, PortRange, Rule
from enforcer_daemon.policy.reader import Reader, child
from enforcer_daemon.policy.syntax import check_port_name, check_port_number, parse_cidr

_TYPES = ("Ingress", "Egress")
_PROTOCOLS = {protocol.name: protocol for protocol in (Protocol.TCP, Protocol.UDP, Protocol.SCTP)}


def decode_network_policy(manifest: object, *, mask_host_bits: bool = False) -> NetworkPolicy:
    """Read one NetworkPolicy; raise InvalidObjectError with every problem and its field.

    `mask_host_bits` reads the object as API servers before 1.36 did, for one that was stored then: host bits in CIDRs
    are masked, an exception counts as far as it lies in its block, and values of expressions need not be labels. What
    no API server ever accepted stays a problem. Sources: validation.go of Kubernetes 1.8, 1.15 and 1.36
    (ValidateIPBlock, ParseCIDRSloppy, AllowCIDRsEvenIfInvalid, AllowInvalidLabelValueInSelector).
    """
    if isinstance(manifest, Mapping):
        check_policy(manifest.get("spec"))
    reader = Reader(is_stored=mask_host_bits)
    # Kubernetes 1.24 to 1.27 print an empty status.
    status = ["status"] if isinstance(manifest, Mapping) and manifest.get("status") in (None, {}) else []
    top = read_object(reader, manifest, "networking.k8s.io/v1", "NetworkPolicy", ["spec", *status])
    metadata = read_metadata(reader, top.get("metadata"), check_object_name)
    spec = reader.struct(top.get("spec"), "spec", {"podSelector", "policyTypes", "ingress", "egress"})
    selector = read_selector(reader, spec.get("podSelector"), "spec.podSelector")
    rules = _RuleReader(reader)
    ingress = rules.read_rules(spec.get("ingress"), "spec.ingress", "from")
    egress = rules.read_rules(spec.get("egress"), "spec.egress", "to")
    types = _read_types(reader, spec.get("policyTypes")) or {"Ingress", *(["Egress"] if egress else [])}
    reader.finish()
    return NetworkPolicy(
        namespace=metadata.namespace,
        name=metadata.name,
        pod_selector=selector,
        ingress=ingress if "Ingress" in types else None,
        egress=egress if "Egress" in types else None,
        size=len(stored_bytes(stored_form(metadata.namespace, metadata.name, top.get("spec")))),
    )


def _read_types(reader: Reader, value: object) -> set[str]:
    path = "spec.policyTypes"
    entries = reader.sequence(value, path)
    if len(entries) > len(_TYPES):
        reader.invalid(path, [entry for _, entry in entries], ["may not specify more than two policyTypes"])
        return set()
    types = set()
    for entry_path, entry in entries:
        text = reader.string(entry, entry_path)
        if text in _TYPES:
            types.add(text)
        elif text is not None:
            reader.unsupported(entry_path, text, _TYPES)
    return types


class _RuleReader:
    """Reads the rules of one policy."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def read_rules(self, value: object, path: str, peers_field: str) -> tuple[Rule, ...]:
        rules = []
        for rule_path, entry in self._reader.sequence(value, path):
            tree = self._reader.struct(entry, rule_path, {peers_field, "ports"})
            ports = [
                self._read_port(port, port_path)
                for port_path, port in self._reader.sequence(tree.get("ports"), child(rule_path, "ports"))
            ]
            peers = [
                self._read_peer(peer, peer_path)
                for peer_path, peer in self._reader.sequence(tree.get(peers_field), child(rule_path, peers_field))
            ]
            # A peer or port at fault is None, and the policy is then refused as a whole.
            rules.append(
                Rule(
                    tuple(peer for peer in peers if peer is not None), tuple(port for port in ports if port is not None)
                )
            )
        return tuple(rules)

    def _read_peer(self, value: object, path: str) -> Peer | None:
        reader = self._reader
        tree = reader.struct(value, path, {"podSelector", "namespaceSelector", "ipBlock"})
        pods, namespaces, block = (tree.get(field) for field in ("podSelector", "namespaceSelector", "ipBlock"))
        if pods is None and namespaces is None and block is None:
            reader.refuse(path, "Required value: must specify a peer")
            return None
        pod_selector = read_selector(reader, pods, child(path, "podSelector"))
        namespace_selector = read_selector(reader, namespaces, child(path, "namespaceSelector"))
        if block is None:
            return PodPeer(pod_selector, None if namespaces is None else namespace_selector)
        if pods is not None or namespaces is not None:
            reader.refuse(path, "Forbidden: may not specify both ipBlock and another peer")
        return self._read_block(block, child(path, "ipBlock"))

    def _read_block(self, value: object, path: str) -> IPBlock | None:
        tree = self._reader.struct(value, path, {"cidr", "except"})
        network = self._read_cidr(tree.get("cidr"), child(path, "cidr"), is_required=True)
        excepts = []
        for entry_path, entry in self._reader.sequence(tree.get("except"), child(path, "except")):
            exception = self._read_cidr(entry, entry_path)
            if network is None or exception is None:
                continue
            if exception == network or not _is_within(exception, network):
                if self._reader.is_stored:
                    # As sets: one that covers the block leaves nothing of it, one outside takes nothing away.
                    excepts += [network] if _is_within(network, exception) else []
                    continue
                self._reader.invalid(entry_path, entry, ["must be a strict subset of `cidr`"])
            excepts.append(exception)
        return None if network is None else IPBlock(network, tuple(excepts))

    def _read_cidr(self, value: object, path: str, *, is_required: bool = False) -> IPNetwork | None:
        text = self._reader.string(value, path)
        if text is None:
            return None
        if is_required and not text:
            self._reader.refuse(path, "Required value")
            return None
        network, complaints = parse_cidr(text, mask_host_bits=self._reader.is_stored)
        self._reader.invalid(path, text, complaints)
        return network

    def _read_port(self, value: object, path: str) -> PortMatch | None:
        reader = self._reader
        tree = reader.struct(value, path, {"protocol", "port", "endPort"})
        protocol = self._read_protocol(tree.get("protocol"), child(path, "protocol"))
        last = reader.integer(tree.get("endPort"), child(path, "endPort"))
        port = tree.get("port")
        if isinstance(port, str):
            return self._read_named_port(port, last, protocol, path)
        if port is None:
            if last is not None:
                complaint = "may not be specified when `port` is not specified"
                reader.invalid(child(path, "endPort"), last, [complaint])
            return PortRange(protocol)
        first = reader.integer(port, child(path, "port"))
        return None if first is None else self._read_range(first, last, protocol, path)

    def _read_protocol(self, value: object, path: str) -> Protocol:
        text = self._reader.string(value, path)
        if value is not None and text is not None and text not in _PROTOCOLS:
            self._reader.unsupported(path, text, _PROTOCOLS)
        return _PROTOCOLS.get(text or "", Protocol.TCP)

    def _read_named_port(self, name: str, last: int | None, protocol: Protocol, path: str) -> PortName:
        if last is not None:
            self._reader.invalid(child(path, "endPort"), last, ["may not be specified when `port` is non-numeric"])
        self._reader.invalid(child(path, "port"), name, check_port_name(name))
        return PortName(protocol, name)

    def _read_range(self, first: int, last: int | None, protocol: Protocol, path: str) -> PortRange:
        self._reader.invalid(child(path, "port"), first, check_port_number(first))
        if last is None:
            return PortRange(protocol, first, first)
        if last < first:
            # The API server shows the port here, not the endPort.
            self._reader.invalid(child(path, "endPort"), first, ["must be greater than or equal to `port`"])
        self._reader.invalid(child(path, "endPort"), last, check_port_number(last))
        return PortRange(protocol, first, last)


def _is_within(inner: IPNetwork, outer: IPNetwork) -> bool:
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]
