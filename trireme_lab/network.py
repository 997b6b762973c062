# SPDX-License-Identifier: Apache-2.0
"""How nodes and hosts are connected: pure; steps for links.py, and lines for `nft -f`.

The fabric is a router. Each node and host hangs on a point-to-point link of its own, owns its addresses as /32 and
/128, and sends everything to the fabric; the fabric has a route for each address and for each node's pod networks.
No link, address or route is ever in the machine's own namespace, so that several labs stand side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import ip_interface, ip_network
from pathlib import Path

from enforcer_daemon.model import IPAddress, IPNetwork
from trireme_lab.links import AddAddress, AddBridge, AddRoute, AddVeth, SetUp, Step
from trireme_lab.spec import NodeSpec, ServicePort, ServiceSpec

UPLINK = "eth0"
_FABRIC_V4 = ip_interface("169.254.0.1/32")
_FABRIC_V6 = ip_interface("fe80::1/64")
"""The fabric's addresses on each of its links: the gateways of nodes and hosts."""
POD_BRIDGE = "trireme0"
"""The bridge of conf/10-trireme.conflist."""
ROUTED_GATEWAY_V6 = "fe80::2"
"""The node's address on the bridge of pods that have routes of their own. They have none for IPv4: the reference
plugins cannot give a pod a gateway outside its network, so the node answers ARP for all it has routes to."""
ROUTED_BRIDGE_SYSCTLS = {
    f"net/ipv4/conf/{POD_BRIDGE}/proxy_arp": "1",
    f"net/ipv4/neigh/{POD_BRIDGE}/proxy_delay": "0",
}
"""To be set once the bridge is there."""
MASQUERADE_MARK = "0x4000"
"""kube-proxy's mark for packets whose source must be rewritten."""

ROUTER_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    # An address of a router that is still being probed for duplicates answers no neighbor for up to two seconds.
    "net/ipv6/conf/default/accept_dad": "0",
}
"""To be set before a router has links, which take over the defaults."""


def fabric_steps(port: int, netns: Path, addresses: Sequence[IPAddress], networks: Sequence[IPNetwork]) -> list[Step]:
    """Connect a namespace to the fabric's link number `port`; to be carried out in the fabric's namespace."""
    link = f"port{port}"
    steps: list[Step] = [AddVeth(link, UPLINK, netns)]
    steps += [AddAddress(address, link) for address in (_FABRIC_V4, _FABRIC_V6)]
    steps.append(SetUp(link))
    steps += [AddRoute(ip_network(address), link) for address in addresses]
    for network in networks:
        via = next((a for a in addresses if a.version == network.version), None)
        if via is not None:
            steps.append(AddRoute(network, link, via, is_onlink=True))
    return steps


def uplink_steps(addresses: Sequence[IPAddress]) -> list[Step]:
    """Set up a node's or host's end of its link; to be carried out in its own namespace."""
    steps: list[Step] = [SetUp("lo")]
    steps += [AddAddress(ip_interface(address), UPLINK) for address in addresses]
    steps.append(SetUp(UPLINK))
    if any(address.version == 4 for address in addresses):
        steps.append(AddRoute(ip_network(_FABRIC_V4.ip), UPLINK))
        steps.append(AddRoute(ip_network("0.0.0.0/0"), UPLINK, _FABRIC_V4.ip))
    if any(address.version == 6 for address in addresses):
        steps.append(AddRoute(ip_network("::/0"), UPLINK, _FABRIC_V6.ip))
    return steps


def routed_bridge_steps(node: NodeSpec) -> list[Step]:
    """Make the bridge of a node whose pods have routes of their own; to be carried out in the node's namespace."""
    gateway = ip_interface(f"{ROUTED_GATEWAY_V6}/64")
    steps: list[Step] = [AddBridge(POD_BRIDGE), AddAddress(gateway, POD_BRIDGE), SetUp(POD_BRIDGE)]
    for network in node.pod_networks:
        source = next((a for a in node.addresses if a.version == network.version), None)
        steps.append(AddRoute(network, POD_BRIDGE, source=source))
    return steps


def node_rules(services: Sequence[tuple[ServiceSpec, Sequence[IPAddress]]]) -> str:
    """Render what kube-proxy and a strict primary plugin do on a node.

    `services` pairs each Service with the addresses of its endpoints. The order of hooks and the marks are
    kube-proxy's; packets that conntrack calls invalid are dropped, as Calico does.
    """
    rules: list[str] = []
    chains: list[str] = []
    for index, (service, backends) in enumerate(services):
        for port in service.ports:
            for version in (4, 6):
                chain = f"svc-{index}-{port.protocol.name.lower()}-{port.port}-v{version}"
                endpoints = [address for address in backends if address.version == version]
                fronts = [address for address in service.addresses if address.version == version]
                external = [address for address in service.external_ips if address.version == version]
                if endpoints and (fronts or external):
                    rules += _dispatch(chain, port, fronts, external)
                    chains += _service_chains(chain, port, endpoints)
    return "\n".join([*_skeleton(rules), *chains, "}", ""])


def _skeleton(dispatch: Iterable[str]) -> list[str]:
    return [
        "table inet lab",
        "delete table inet lab",
        "table inet lab {",
        "  chain forward {",
        "    type filter hook forward priority filter",
        "    ct state invalid counter drop",
        "  }",
        "  chain prerouting {",
        "    type nat hook prerouting priority dstnat",
        "    jump services",
        "  }",
        "  chain output {",
        "    type nat hook output priority -100",
        "    jump services",
        "  }",
        "  chain postrouting {",
        "    type nat hook postrouting priority srcnat",
        f"    meta mark & {MASQUERADE_MARK} == {MASQUERADE_MARK} jump rewrite-source",
        "  }",
        "  chain rewrite-source {",
        f"    meta mark set meta mark ^ {MASQUERADE_MARK}",
        "    masquerade",
        "  }",
        "  chain services {",
        *(f"    {rule}" for rule in dispatch),
        "  }",
    ]


def _dispatch(chain: str, port: ServicePort, fronts: Sequence[IPAddress], external: Sequence[IPAddress]) -> list[str]:
    family = "ip" if (*fronts, *external)[0].version == 4 else "ip6"
    protocol = port.protocol.name.lower()
    masquerade = f"meta mark set meta mark | {MASQUERADE_MARK} "
    rules = []
    for addresses, mark in ((fronts, ""), (external, masquerade)):
        if addresses:
            listed = ", ".join(map(str, addresses))
            rules.append(f"{family} daddr {{ {listed} }} {protocol} dport {port.port} {mark}goto {chain}")
    if fronts and port.node_port is not None:
        rules.append(
            f"meta nfproto {'ipv4' if family == 'ip' else 'ipv6'} fib daddr type local {protocol} dport "
            f"{port.node_port} {masquerade}goto {chain}"
        )
    return rules


def _service_chains(chain: str, port: ServicePort, endpoints: Sequence[IPAddress]) -> list[str]:
    family = "ip" if endpoints[0].version == 4 else "ip6"
    lines: list[str] = []
    for number, address in enumerate(endpoints):
        target = str(address) if family == "ip" else f"[{address}]"
        lines += [
            f"  chain {chain}-ep{number} {{",
            # The pod dialed itself: without a foreign source it would answer itself past the translation.
            f"    {family} saddr {address} meta mark set meta mark | {MASQUERADE_MARK}",
            f"    meta l4proto {port.protocol.name.lower()} dnat {family} to {target}:{port.target_port}",
            "  }",
        ]
    choices = ", ".join(f"{number} : goto {chain}-ep{number}" for number in range(len(endpoints)))
    lines += [f"  chain {chain} {{", f"    numgen random mod {len(endpoints)} vmap {{ {choices} }}", "  }"]
    return lines


def pod_networks(nodes: Iterable[NodeSpec]) -> list[IPNetwork]:
    """Return the pod networks of all nodes: the enforced networks."""
    return [network for node in nodes for network in node.pod_networks]
