# SPDX-License-Identifier: Apache-2.0
"""How large an object may be that is decoded: counted on the manifest, before anything is made of it.

The cost of an object grows with its elements, and any user of a namespace writes some. The limits are far above what
clusters have: the longest lists in use are published address ranges of clouds, of some ten thousand entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from enforcer_daemon.errors import PolicyError
from enforcer_daemon.policy.reader import InvalidObjectError, child

MAX_POLICY_ELEMENTS = 16_384
"""Rules, peers, exceptions, ports, requirements and their values of one NetworkPolicy: about half a second of work."""
MAX_POD_ELEMENTS = 4_096
"""Labels, containers and ports of one pod."""
_Counted = Iterator[tuple[str, int]]


def check_policy(spec: object) -> None:
    """Raise InvalidObjectError if the spec of a NetworkPolicy has too many elements; names the list that does it."""
    _limit(_policy_elements(spec), MAX_POLICY_ELEMENTS, "rules, peers, exceptions, ports, requirements and values")


def check_cluster_policy(spec: object) -> None:
    """Raise InvalidObjectError if the selectors of a ClusterNetworkPolicy are too large; its lists the CRD limits."""
    _limit(_cluster_policy_elements(spec), MAX_POLICY_ELEMENTS, "requirements and values")


def check_pod(metadata: object, spec: object) -> None:
    """Raise InvalidObjectError if a pod has too many labels, containers and ports."""
    _limit(_pod_elements(metadata, spec), MAX_POD_ELEMENTS, "labels, containers and ports")


def _limit(counted: _Counted, limit: int, what: str) -> None:
    total = 0
    for path, count in counted:
        total += count
        if total > limit:
            message = f"Too many: the object has more than {limit} {what}, which is the limit"
            raise InvalidObjectError([PolicyError(path, message)])


def _policy_elements(spec: object) -> _Counted:
    if not isinstance(spec, Mapping):
        return
    yield from _selector(spec.get("podSelector"), "spec.podSelector")
    for field, peers_field in (("ingress", "from"), ("egress", "to")):
        rules = _entries(spec.get(field))
        yield f"spec.{field}", len(rules)
        for index, rule in enumerate(rules):
            path = f"spec.{field}[{index}]"
            if not isinstance(rule, Mapping):
                continue
            yield f"{path}.ports", len(_entries(rule.get("ports")))
            peers = _entries(rule.get(peers_field))
            yield f"{path}.{peers_field}", len(peers)
            for number, peer in enumerate(peers):
                if isinstance(peer, Mapping):
                    yield from _peer(peer, f"{path}.{peers_field}[{number}]")


def _peer(peer: Mapping[str, object], path: str) -> _Counted:
    for field, value in peer.items():
        if field == "ipBlock":
            excepts = value.get("except") if isinstance(value, Mapping) else None
            yield f"{path}.ipBlock.except", len(_entries(excepts))
        else:
            yield from _selector(value, child(path, str(field)))


def _cluster_policy_elements(spec: object) -> _Counted:
    if not isinstance(spec, Mapping):
        return
    yield from _cluster_peer(spec.get("subject"), "spec.subject")
    for field, peers_field in (("ingress", "from"), ("egress", "to")):
        rules = _entries(spec.get(field))
        yield f"spec.{field}", len(rules)
        for index, rule in enumerate(rules):
            if not isinstance(rule, Mapping):
                continue
            path = f"spec.{field}[{index}]"
            yield f"{path}.protocols", len(_entries(rule.get("protocols")))
            peers = _entries(rule.get(peers_field))
            yield f"{path}.{peers_field}", len(peers)
            for number, peer in enumerate(peers):
                yield from _cluster_peer(peer, f"{path}.{peers_field}[{number}]")


def _cluster_peer(peer: object, path: str) -> _Counted:
    for field, value in peer.items() if isinstance(peer, Mapping) else ():
        where = child(path, str(field))
        yield where, len(_entries(value))
        yield from _selector(value, where)
        if field == "pods" and isinstance(value, Mapping):
            for name in ("namespaceSelector", "podSelector"):
                yield from _selector(value.get(name), child(where, name))


def _selector(selector: object, path: str) -> _Counted:
    if not isinstance(selector, Mapping):
        return
    labels = selector.get("matchLabels")
    yield f"{path}.matchLabels", len(labels) if isinstance(labels, Mapping) else 0
    expressions = _entries(selector.get("matchExpressions"))
    yield f"{path}.matchExpressions", len(expressions)
    for index, expression in enumerate(expressions):
        values = expression.get("values") if isinstance(expression, Mapping) else None
        yield f"{path}.matchExpressions[{index}].values", len(_entries(values))


def _pod_elements(metadata: object, spec: object) -> _Counted:
    labels = metadata.get("labels") if isinstance(metadata, Mapping) else None
    yield "metadata.labels", len(labels) if isinstance(labels, Mapping) else 0
    for field in ("containers", "initContainers"):
        containers = _entries(spec.get(field) if isinstance(spec, Mapping) else None)
        yield f"spec.{field}", len(containers)
        for index, container in enumerate(containers):
            ports = container.get("ports") if isinstance(container, Mapping) else None
            yield f"spec.{field}[{index}].ports", len(_entries(ports))


def _entries(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else ()
