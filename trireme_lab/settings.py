# SPDX-License-Identifier: Apache-2.0
"""The settings file of a lab node's daemon. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trireme_lab.network import pod_networks
from trireme_lab.node import NodeDirectories
from trireme_lab.spec import SERVICE_NETWORKS, LabSpec, NodeSpec


def daemon_settings(
    spec: LabSpec, node: NodeSpec, directories: NodeDirectories, authority: tuple[Path, Path]
) -> dict[str, object]:
    """Return what to write for a node; `authority` is the lab's CA: certificate and key, the same for all nodes."""
    has_node_ports = any(port.node_port is not None for service in spec.services for port in service.ports)
    external = [address for service in spec.services for address in service.external_ips]
    node_addresses = [address for node in spec.nodes for address in node.addresses]
    virtual = [*(node_addresses if has_node_ports else ()), *external]
    certificate, key = authority
    settings: dict[str, object] = {
        "node": node.name,
        "stateDir": str(directories.state),
        "policyDir": str(directories.policy),
        "credentials": {"caCertificate": str(certificate), "caKey": str(key)},
        "networks": {
            "enforced": [str(network) for network in pod_networks(spec.nodes)],
            "virtual": [
                *(str(network) for network in SERVICE_NETWORKS),
                *(f"{address}/{address.max_prefixlen}" for address in virtual),
            ],
            # Node ports and external addresses rewrite the source to the node's address, whatever pod dialed them.
            "masquerade": list(map(str, node_addresses)) if virtual else [],
        },
        "registration": {"runDir": str(directories.run), "cniResultsDir": str(directories.cni / "cache" / "results")},
    }
    return overlay(settings, spec.settings)


def overlay(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    """Return `below` with the values of `above` laid over it, group by group."""
    merged = dict(below)
    for key, value in above.items():
        base = merged.get(key)
        merged[key] = overlay(base, value) if isinstance(base, Mapping) and isinstance(value, Mapping) else value
    return merged
