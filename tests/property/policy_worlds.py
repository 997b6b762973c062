# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for small worlds in which much matches: few labels, few ports, nested networks."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

from hypothesis import strategies as st

from enforcer_daemon.model import Identity, NamedPort, PodRef, Protocol

NAMESPACES = ["x", "y", "z"]
KEYS = ["app", "tier", "kubernetes.io/metadata.name", "trireme.io/trust-domain"]
VALUES = ["", "a", "b", "x", "other.example"]
PORT_NAMES = ["web", "dns"]
PORTS = [1, 53, 79, 80, 81, 443, 8080, 65_535]
PROTOCOLS = ["TCP", "UDP", "SCTP"]
ADDRESSES = ["10.0.0.1", "10.0.0.9", "10.0.1.1", "192.0.2.1", "2001:db8::1", "2001:db8:1::1"]
NETWORKS: dict[str, list[str]] = {
    "0.0.0.0/0": ["10.0.0.0/8", "192.0.2.0/24"],
    "10.0.0.0/8": ["10.0.0.0/24", "10.0.1.0/31", "10.0.0.9/32"],
    "10.0.0.0/24": ["10.0.0.0/28", "10.0.0.1/32"],
    "10.0.0.1/32": [],
    "::/0": ["2001:db8::/32"],
    "2001:db8::/32": ["2001:db8::/64", "2001:db8:1::1/128"],
}

labels = st.dictionaries(st.sampled_from(KEYS[:3]), st.sampled_from(VALUES), max_size=2)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return the strategy's values, or None."""
    return st.one_of(st.none(), strategy)


def without_nones(tree: dict[str, Any]) -> dict[str, Any]:
    """Leave out the fields that are None."""
    return {key: value for key, value in tree.items() if value is not None}


expressions = st.one_of(
    st.fixed_dictionaries({
        "key": st.sampled_from(KEYS),
        "operator": st.sampled_from(["In", "NotIn"]),
        "values": st.lists(st.sampled_from(VALUES), min_size=1, max_size=2),
    }),
    st.fixed_dictionaries({"key": st.sampled_from(KEYS), "operator": st.sampled_from(["Exists", "DoesNotExist"])}),
)  # fmt: skip
selectors = st.fixed_dictionaries({
    "matchLabels": maybe(st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=2)),
    "matchExpressions": maybe(st.lists(expressions, max_size=2)),
}).map(without_nones)  # fmt: skip

blocks = st.sampled_from(sorted(NETWORKS)).flatmap(
    lambda cidr: st.fixed_dictionaries(
        {
            "cidr": st.just(cidr),
            "except": maybe(st.lists(st.sampled_from(NETWORKS[cidr]), max_size=2) if NETWORKS[cidr] else st.just([])),
        }
    ).map(without_nones)
)
peers = st.one_of(
    st.fixed_dictionaries({"podSelector": selectors}),
    st.fixed_dictionaries({"namespaceSelector": selectors}),
    st.fixed_dictionaries({"podSelector": selectors, "namespaceSelector": selectors}),
    st.fixed_dictionaries({"ipBlock": blocks}),
)
ranges = st.tuples(st.sampled_from(PORTS), st.sampled_from(PORTS)).map(
    lambda ends: {"port": min(ends), "endPort": max(ends)}
)
ports = st.tuples(
    maybe(st.sampled_from(PROTOCOLS)),
    st.one_of(
        st.just({}),
        ranges,
        st.sampled_from(PORTS).map(lambda n: {"port": n}),
        st.sampled_from(PORT_NAMES).map(lambda n: {"port": n}),
    ),
).map(lambda pair: without_nones({"protocol": pair[0], **pair[1]}))


def rules(peers_field: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return entries of spec.ingress or spec.egress."""
    return st.fixed_dictionaries({
        peers_field: maybe(st.lists(peers, max_size=3)),
        "ports": maybe(st.lists(ports, max_size=3)),
    }).map(without_nones)  # fmt: skip


specs = st.fixed_dictionaries({
    "podSelector": maybe(selectors),
    "policyTypes": maybe(st.lists(st.sampled_from(["Ingress", "Egress"]), max_size=2)),
    "ingress": maybe(st.lists(rules("from"), max_size=2)),
    "egress": maybe(st.lists(rules("to"), max_size=2)),
}).map(without_nones)  # fmt: skip


@st.composite
def policies(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Return some NetworkPolicies, most of them in the first namespace."""
    namespaces = st.sampled_from(["x", *NAMESPACES])
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": f"p{index}", "namespace": draw(namespaces)},
            "spec": spec,
        }
        for index, spec in enumerate(draw(st.lists(specs, max_size=6)))
    ]


pods = st.fixed_dictionaries({
    "namespace": st.sampled_from(NAMESPACES),
    "labels": labels,
    "trust_domain": st.sampled_from(["cluster.local", "cluster.local", "other.example"]),
    "ports": st.lists(
        st.tuples(st.sampled_from(PORT_NAMES), st.sampled_from(PORTS), st.sampled_from(PROTOCOLS)), max_size=4
    ),
})  # fmt: skip
flows = st.fixed_dictionaries({
    "direction": st.sampled_from(["Ingress", "Egress"]),
    "address": st.sampled_from(ADDRESSES),
    "port": maybe(st.sampled_from(PORTS)),
    "protocol": st.sampled_from(PROTOCOLS),
})  # fmt: skip


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Any]:
    """Return namespaces with labels; each has the label of its name."""
    return {"namespaces": {n: {**draw(labels), "kubernetes.io/metadata.name": n} for n in NAMESPACES}}


def identity(world: dict[str, Any], pod: dict[str, Any], address: str) -> Identity:
    """Return the identity of a generated pod; its namespace labels claim another trust domain, in vain."""
    return Identity(
        pod=PodRef(pod["namespace"], "pod"),
        ips=(ip_address(address),),
        labels=pod["labels"],
        namespace_labels={**world["namespaces"][pod["namespace"]], "trireme.io/trust-domain": "b"},
        node="n",
        trust_domain=pod["trust_domain"],
        named_ports=tuple(NamedPort(name, number, Protocol[protocol]) for name, number, protocol in pod["ports"]),
    )
