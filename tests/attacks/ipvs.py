# SPDX-License-Identifier: Apache-2.0
"""What kube-proxy puts on a node in IPVS mode, for `ip -batch`, `ipset restore`, iptables-restore and ipvsadm. Pure.

ClusterIPs are addresses of the dummy interface kube-ipvs0, so that what goes to them is delivered locally, where IPVS
translates it. Virtual servers for ClusterIPs, and for node ports on each address of the node; sets that say who is
masqueraded; filters of what no virtual server takes. Left out is what no test needs: load balancers, health checks, and
`--random-fully`, so that a masqueraded packet keeps the source port by which a test knows it. Source:
kubernetes/kubernetes, pkg/proxy/ipvs/proxier.go (writeIptablesRules, syncProxyRules) and ipset.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from enforcer_daemon.model import IPAddress, IPNetwork
from tests.attacks.kube_proxy import Front, Target

DUMMY = "kube-ipvs0"
SYSCTLS = {
    "net/ipv4/vs/conntrack": "1",
    "net/ipv4/vs/expire_nodest_conn": "1",
    "net/ipv4/vs/expire_quiescent_template": "1",
}
_MARK = "0x4000/0x4000"
_PROTOCOLS = ("tcp", "udp")
_LOOPBACKS = {4: "127.0.0.0/8", 6: "::1/128"}


def set_name(name: str, version: int) -> str:
    """Return the name of one of kube-proxy's sets; those of IPv6 have names of their own."""
    return f"KUBE-{name}" if version == 4 else f"KUBE-6-{name}"


def link_lines(fronts: Iterable[Front]) -> list[str]:
    """Make the dummy interface with the ClusterIPs of all fronts; kube-proxy leaves it down."""
    addresses = [address for front in fronts for address in (*front.addresses, *front.external)]
    return [
        f"link add {DUMMY} type dummy",
        *(f"address add {address}/{address.max_prefixlen} dev {DUMMY}" for address in addresses),
    ]


def server_lines(fronts: Iterable[Front], node_addresses: Sequence[IPAddress]) -> list[str]:
    """Make the virtual servers and their backends, which get their packets by NAT, in turn."""
    lines = []
    for front in fronts:
        virtual = [(address, front.port) for address in (*front.addresses, *front.external)]
        if front.node_port:
            virtual += [(address, front.node_port) for address in node_addresses]
        for address, port in virtual:
            for flag in ("-t", "-u"):
                server = f"{flag} {_end((address, port))}"
                lines.append(f"-A {server} -s rr")
                lines += [f"-a {server} -r {_end(target)} -m -w 1" for target in front.targets_of(address.version)]
    return lines


def set_lines(fronts: Sequence[Front], own_pods: Sequence[IPNetwork], version: int) -> list[str]:
    """Make the sets; `own_pods` are the networks of the node's own pods, which may reach themselves by a Service."""
    addresses = [(front, a) for front in fronts for a in front.addresses if a.version == version]
    external = [(front, a) for front in fronts for a in front.external if a.version == version]
    loops = [
        f"{address},{protocol}:{port},{address}"
        for front in fronts
        for address, port in front.targets_of(version)
        for protocol in _PROTOCOLS
        if any(address in network for network in own_pods if network.version == version)
    ]
    family = f"family inet{'6' if version == 6 else ''}"
    sets = {
        ("LOOP-BACK", f"hash:ip,port,ip {family}"): loops,
        ("CLUSTER-IP", f"hash:ip,port {family}"): list(_services(addresses)),
        ("EXTERNAL-IP", f"hash:ip,port {family}"): list(_services(external)),
        ("IPVS-IPS", f"hash:ip {family}"): [str(address) for _, address in (*addresses, *external)],
    }
    for protocol in ("TCP", "UDP"):
        ports = "bitmap:port range 0-65535"
        sets["NODE-PORT-" + protocol, ports] = [str(front.node_port) for front in fronts if front.node_port]
        sets["NODE-PORT-LOCAL-" + protocol, ports] = [
            str(front.node_port) for front in fronts if front.node_port and front.keeps_source
        ]
    lines = []
    for (name, kind), elements in sets.items():
        lines.append(f"create {set_name(name, version)} {kind}")
        lines += [f"add {set_name(name, version)} {element}" for element in dict.fromkeys(elements)]
    return lines


def iptables_text(cluster: IPNetwork) -> str:
    """Render the rules around the sets; what does not come from the cluster's pods is masqueraded to a ClusterIP."""
    version = cluster.version

    def in_set(name: str, what: str) -> str:
        return f"-m set --match-set {set_name(name, version)} {what}"

    nat = [
        "-A PREROUTING -j KUBE-SERVICES",
        "-A OUTPUT -j KUBE-SERVICES",
        "-A POSTROUTING -j KUBE-POSTROUTING",
        f"-A KUBE-SERVICES -s {_LOOPBACKS[version]} -j RETURN",
        f"-A KUBE-SERVICES {in_set('CLUSTER-IP', 'dst,dst')} ! -s {cluster} -j KUBE-MARK-MASQ",
        f"-A KUBE-SERVICES {in_set('EXTERNAL-IP', 'dst,dst')} -j KUBE-MARK-MASQ",
        "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT",
        f"-A KUBE-SERVICES {in_set('CLUSTER-IP', 'dst,dst')} -j ACCEPT",
        *(
            f"-A KUBE-NODE-PORT -p {protocol} {in_set(f'{name}-{protocol.upper()}', 'dst')} -j {target}"
            for protocol in _PROTOCOLS
            for name, target in (("NODE-PORT-LOCAL", "RETURN"), ("NODE-PORT", "KUBE-MARK-MASQ"))
        ),
        f"-A KUBE-MARK-MASQ -j MARK --or-mark {_MARK.partition('/')[0]}",
        f"-A KUBE-POSTROUTING {in_set('LOOP-BACK', 'dst,dst,src')} -j MASQUERADE",
        f"-A KUBE-POSTROUTING -m mark ! --mark {_MARK} -j RETURN",
        f"-A KUBE-POSTROUTING -j MARK --xor-mark {_MARK.partition('/')[0]}",
        "-A KUBE-POSTROUTING -j MASQUERADE",
    ]
    filters = [
        "-A INPUT -j KUBE-IPVS-FILTER",
        "-A FORWARD -j KUBE-FORWARD",
        f"-A KUBE-FORWARD -m mark --mark {_MARK} -j ACCEPT",
        "-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        f"-A KUBE-IPVS-FILTER {in_set('CLUSTER-IP', 'dst,dst')} -j RETURN",
        f"-A KUBE-IPVS-FILTER {in_set('EXTERNAL-IP', 'dst,dst')} -j RETURN",
        f"-A KUBE-IPVS-FILTER -m conntrack --ctstate NEW {in_set('IPVS-IPS', 'dst')} -j REJECT",
    ]
    nat_chains = ("KUBE-SERVICES", "KUBE-NODE-PORT", "KUBE-MARK-MASQ", "KUBE-POSTROUTING")
    filter_chains = ("KUBE-FORWARD", "KUBE-IPVS-FILTER")
    return "\n".join(
        [
            *("*nat", *(f":{chain} - [0:0]" for chain in nat_chains), *nat, "COMMIT"),
            *("*filter", *(f":{chain} - [0:0]" for chain in filter_chains), *filters, "COMMIT", ""),
        ]
    )


def _end(target: Target) -> str:
    address, port = target
    return f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}"


def _services(addresses: Iterable[tuple[Front, IPAddress]]) -> Iterator[str]:
    for front, address in addresses:
        yield from (f"{address},{protocol}:{front.port}" for protocol in _PROTOCOLS)
