# SPDX-License-Identifier: Apache-2.0
"""NetworkPolicy as plainly as it can be written: straight from manifests, every policy tried, nothing indexed.

It shares no code with the engine, so that the two can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import ip_address, ip_network
from typing import Any

Manifest = dict[str, Any]
World = dict[str, Any]
Pod = dict[str, Any]


def verdict(world: World, policies: list[Manifest], pod: Pod, peer: Pod | None, flow: Manifest) -> bool:
    """Evaluate one end: may `pod` have this flow with `peer` (None: only an address is known)."""
    rules = list(isolating_rules(policies, pod, flow["direction"]))
    if not rules:
        return True
    return bool(allowing(world, policies, pod, peer, flow))


def isolating_rules(policies: list[Manifest], pod: Pod, direction: str) -> Iterator[tuple[str, list[Manifest]]]:
    """Yield name and rules of each policy that isolates the pod."""
    for policy in policies:
        spec = policy["spec"]
        if policy["metadata"]["namespace"] != pod["namespace"]:
            continue
        if direction in types(spec) and selects(spec.get("podSelector"), pod["labels"]):
            yield policy["metadata"]["name"], spec.get(direction.lower()) or []


def types(spec: Manifest) -> list[str]:
    if spec.get("policyTypes"):
        return list(spec["policyTypes"])
    return ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]


def allowing(
    world: World, policies: list[Manifest], pod: Pod, peer: Pod | None, flow: Manifest
) -> set[tuple[str, int]]:
    """Name every rule that allows the flow."""
    found = set()
    for name, rules in isolating_rules(policies, pod, flow["direction"]):
        for index, rule in enumerate(rules):
            peers = rule.get("from" if flow["direction"] == "Ingress" else "to")
            destination = pod if flow["direction"] == "Ingress" else peer
            if peers_match(world, peers, pod, peer, flow["address"]) and ports_match(
                rule.get("ports"), destination, flow
            ):
                found.add((name, index))
    return found


def peers_match(world: World, peers: list[Manifest] | None, pod: Pod, peer: Pod | None, address: str) -> bool:
    if not peers:
        return True
    return any(peer_matches(world, entry, pod, peer, address) for entry in peers)


def peer_matches(world: World, entry: Manifest, pod: Pod, peer: Pod | None, address: str) -> bool:
    block = entry.get("ipBlock")
    if block is not None:
        inside = ip_address(address) in ip_network(block["cidr"])
        return inside and not any(ip_address(address) in ip_network(cidr) for cidr in block.get("except") or [])
    if peer is None:
        return False
    if entry.get("podSelector") is not None and not selects(entry["podSelector"], peer["labels"]):
        return False
    namespaces = entry.get("namespaceSelector")
    if namespaces is None:
        return bool(peer["namespace"] == pod["namespace"] and peer["trust_domain"] == pod["trust_domain"])
    labels = dict(world["namespaces"][peer["namespace"]], **{"trireme.io/trust-domain": peer["trust_domain"]})
    if "trireme.io/trust-domain" not in named_labels(namespaces) and peer["trust_domain"] != pod["trust_domain"]:
        return False
    return selects(namespaces, labels)


def named_labels(selector: Manifest) -> set[str]:
    return {*(selector.get("matchLabels") or {}), *(e["key"] for e in selector.get("matchExpressions") or [])}


def selects(selector: Manifest | None, labels: Mapping[str, str]) -> bool:
    selector = selector or {}
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for entry in selector.get("matchExpressions") or []:
        present = entry["key"] in labels
        listed = present and labels[entry["key"]] in (entry.get("values") or [])
        holds = {"In": listed, "NotIn": not listed, "Exists": present, "DoesNotExist": not present}
        if not holds[entry["operator"]]:
            return False
    return True


def ports_match(ports: list[Manifest] | None, destination: Pod | None, flow: Manifest) -> bool:
    if not ports:
        return True
    if flow["port"] is None:
        return False
    return any(port_matches(entry, destination, flow) for entry in ports)


def port_matches(entry: Manifest, destination: Pod | None, flow: Manifest) -> bool:
    if (entry.get("protocol") or "TCP") != flow["protocol"]:
        return False
    port = entry.get("port")
    if port is None:
        return True
    if isinstance(port, str):
        return destination is not None and (port, flow["port"], flow["protocol"]) in destination["ports"]
    return bool(port <= flow["port"] <= (entry.get("endPort") or port))
