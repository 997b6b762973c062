# SPDX-License-Identifier: Apache-2.0
"""Which networks hold enforced pods, and which addresses lead to them, from what the cluster says of itself. Pure.

What the settings name is not discovered: `networks.enforced` stands in for the nodes' podCIDRs, `networks.virtual` for
ServiceCIDRs, external and load balancer addresses, and the nodes' own addresses, which count where a Service has a node
port.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network

from enforcer_daemon.kube.resources import NodeNetworks, ServiceAddresses
from enforcer_daemon.model import IPNetwork
from enforcer_daemon.settings import NetworkSettings


def discover(
    configured: NetworkSettings,
    nodes: Iterable[NodeNetworks],
    service_cidrs: Iterable[tuple[IPNetwork, ...]],
    services: Iterable[ServiceAddresses],
) -> NetworkSettings:
    """Give the networks in force."""
    known, offered = list(nodes), list(services)
    enforced = configured.enforced or _collapsed(network for node in known for network in node.pod_cidrs)
    virtual = configured.virtual
    if not virtual:
        addresses = [address for service in offered for address in service.addresses]
        if any(service.has_node_ports for service in offered):
            addresses += [address for node in known for address in node.addresses]
        single = (ip_network(address) for address in addresses)
        virtual = _collapsed((*(network for cidrs in service_cidrs for network in cidrs), *single))
    return replace(configured, enforced=enforced, virtual=virtual)


def missing_networks(configured: NetworkSettings, node: str, nodes: Iterable[NodeNetworks]) -> str:
    """Say why this node's own pods are in no enforced network; empty where they are."""
    if configured.enforced or any(found.name == node and found.pod_cidrs for found in nodes):
        return ""
    return f"node {node} has no podCIDRs: set networks.enforced to the networks of the cluster's pods"


def _collapsed(networks: Iterable[IPNetwork]) -> tuple[IPNetwork, ...]:
    known = set(networks)
    fours = [network for network in known if isinstance(network, IPv4Network)]
    sixes = [network for network in known if isinstance(network, IPv6Network)]
    return (*collapse_addresses(fours), *collapse_addresses(sixes))
