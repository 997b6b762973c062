# SPDX-License-Identifier: Apache-2.0
"""Rules as kube-proxy and NodeLocal DNS put them on a node, in the form of iptables and of nft. Pure.

Chains, hooks, marks and their order are kube-proxy's: translation in prerouting and output, masquerade by a mark in
postrouting, node ports for local destinations after the Services. Source: kubernetes/kubernetes, pkg/proxy/iptables and
pkg/proxy/nftables; NodeLocal DNS: kubernetes/dns, cmd/node-cache (rules that keep its addresses untracked).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from enforcer_daemon.model import IPAddress

_MARK = "0x4000"
_PROTOCOLS = ("tcp", "udp")
Target = tuple[IPAddress, int]


@dataclass(frozen=True, slots=True)
class Front:
    """What a Service is reached by, and what it leads to: for TCP and UDP alike."""

    name: str
    addresses: tuple[IPAddress, ...]
    port: int
    targets: tuple[Target, ...]
    """Address and port of each backend: pods, nodes, or machines outside."""
    node_port: int = 0
    external: tuple[IPAddress, ...] = ()
    """External addresses; clients of these are masqueraded."""
    keeps_source: bool = False
    """Whether clients of the node port keep their address (externalTrafficPolicy: Local); for IPVS alone."""

    def targets_of(self, version: int) -> list[Target]:
        return [target for target in self.targets if target[0].version == version]


def _of(addresses: Iterable[IPAddress], version: int) -> list[IPAddress]:
    return [address for address in addresses if address.version == version]


def iptables_text(fronts: Sequence[Front], local_dns: Sequence[IPAddress], version: int) -> str:
    """Render what iptables-restore (or ip6tables-restore) reads, for one IP version."""
    chains, dispatch, services = ["KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-MARK-MASQ", "KUBE-POSTROUTING"], [], []
    node_ports: list[str] = []
    for front in fronts:
        targets = front.targets_of(version)
        for protocol in _PROTOCOLS if targets else ():
            own = f"KUBE-SVC-{front.name}-{protocol}".upper()
            outer = f"KUBE-EXT-{front.name}-{protocol}".upper()
            chains += [own, outer]
            match = f"-p {protocol} -m {protocol} --dport"
            dispatch += [
                f"-A KUBE-SERVICES -d {a} {match} {front.port} -j {own}" for a in _of(front.addresses, version)
            ]
            dispatch += [
                f"-A KUBE-SERVICES -d {a} {match} {front.port} -j {outer}" for a in _of(front.external, version)
            ]
            if front.node_port:
                node_ports.append(f"-A KUBE-NODEPORTS {match} {front.node_port} -j {outer}")
            services += [f"-A {outer} -j KUBE-MARK-MASQ", f"-A {outer} -j {own}"]
            for number, (address, port) in enumerate(targets):
                end = f"KUBE-SEP-{front.name}-{protocol}-{number}".upper()
                chains.append(end)
                left = len(targets) - number
                chance = f"-m statistic --mode random --probability {1 / left:.5f} " if left > 1 else ""
                to = f"{address}:{port}" if version == 4 else f"[{address}]:{port}"
                services += [
                    f"-A {own} {chance}-j {end}",
                    f"-A {end} -s {address} -j KUBE-MARK-MASQ",
                    f"-A {end} -p {protocol} -m {protocol} -j DNAT --to-destination {to}",
                ]
    nat = [
        "-A PREROUTING -j KUBE-SERVICES",
        "-A OUTPUT -j KUBE-SERVICES",
        "-A POSTROUTING -j KUBE-POSTROUTING",
        f"-A KUBE-MARK-MASQ -j MARK --or-mark {_MARK}",
        f"-A KUBE-POSTROUTING -m mark ! --mark {_MARK}/{_MARK} -j RETURN",
        f"-A KUBE-POSTROUTING -j MARK --xor-mark {_MARK}",
        "-A KUBE-POSTROUTING -j MASQUERADE",
        *dispatch,
        "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS",
        *node_ports,
        *services,
    ]
    raw = [
        rule
        for address in _of(local_dns, version)
        for protocol in _PROTOCOLS
        for rule in (
            f"-A PREROUTING -d {address} -p {protocol} -m {protocol} --dport 53 -j CT --notrack",
            f"-A OUTPUT -s {address} -p {protocol} -m {protocol} --sport 53 -j CT --notrack",
            f"-A OUTPUT -d {address} -p {protocol} -m {protocol} --dport 53 -j CT --notrack",
        )
    ]
    declared = [f":{chain} - [0:0]" for chain in chains]
    return "\n".join(["*raw", *raw, "COMMIT", "*nat", *declared, *nat, "COMMIT", ""])


def nft_text(fronts: Sequence[Front], local_dns: Sequence[IPAddress], version: int) -> str:
    """Render what `nft -f` reads, for one IP version: a table of its own, as kube-proxy's."""
    family = "ip" if version == 4 else "ip6"
    dispatch, node_ports, chains = [], [], []
    for front in fronts:
        targets = front.targets_of(version)
        for protocol in _PROTOCOLS if targets else ():
            own = f"service-{front.name}-{protocol}"
            key = f". {protocol} . {front.port} : goto"
            dispatch += [f"{address} {key} {own}" for address in _of(front.addresses, version)]
            dispatch += [f"{address} {key} external-{own}" for address in _of(front.external, version)]
            if front.node_port:
                node_ports.append(f"{protocol} . {front.node_port} : goto external-{own}")
            choices = ", ".join(f"{number} : goto end-{own}-{number}" for number in range(len(targets)))
            chains += [f"  chain external-{own} {{", f"    meta mark set mark or {_MARK}", f"    goto {own}", "  }"]
            chains += [f"  chain {own} {{", f"    numgen random mod {len(targets)} vmap {{ {choices} }}", "  }"]
            for number, (address, port) in enumerate(targets):
                to = f"{address}:{port}" if version == 4 else f"[{address}]:{port}"
                chains += [
                    f"  chain end-{own}-{number} {{",
                    f"    {family} saddr {address} meta mark set mark or {_MARK}",
                    f"    meta l4proto {protocol} dnat to {to}",
                    "  }",
                ]
    kind = "ipv4_addr" if version == 4 else "ipv6_addr"
    dns = ", ".join(map(str, _of(local_dns, version)))
    untracked = [
        "  chain untracked-in {",
        "    type filter hook prerouting priority raw",
        f"    {family} daddr {{ {dns} }} meta l4proto {{ tcp, udp }} th dport 53 notrack",
        "  }",
        "  chain untracked-out {",
        "    type filter hook output priority raw",
        f"    {family} saddr {{ {dns} }} meta l4proto {{ tcp, udp }} th sport 53 notrack",
        f"    {family} daddr {{ {dns} }} meta l4proto {{ tcp, udp }} th dport 53 notrack",
        "  }",
    ]
    return "\n".join(
        [
            f"table {family} kube-proxy {{",
            f"  map service-ips {{ type {kind} . inet_proto . inet_service : verdict",
            f"    elements = {{ {', '.join(dispatch)} }} }}",
            "  map service-nodeports { type inet_proto . inet_service : verdict",
            f"    elements = {{ {', '.join(node_ports)} }} }}",
            *chains,
            "  chain services {",
            f"    {family} daddr . meta l4proto . th dport vmap @service-ips",
            "    fib daddr type local meta l4proto . th dport vmap @service-nodeports",
            "  }",
            "  chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }",
            "  chain nat-output { type nat hook output priority -100; jump services; }",
            "  chain nat-postrouting {",
            "    type nat hook postrouting priority srcnat",
            f"    mark & {_MARK} != 0 meta mark set mark ^ {_MARK} masquerade fully-random",
            "  }",
            *untracked,
            "}",
            "",
        ]
    )


def removal(version: int) -> str:
    """Render what `nft -f` reads to remove the table again."""
    table = f"table {'ip' if version == 4 else 'ip6'} kube-proxy"
    return f"{table}\ndelete {table}\n"
