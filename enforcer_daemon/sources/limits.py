# SPDX-License-Identifier: Apache-2.0
"""Limits that the objects of some manifests exceed together: what the daemon would report of them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from enforcer_daemon.model import Direction, Identity
from enforcer_daemon.policy import NetworkPolicy, Pod, compile_snapshot
from enforcer_daemon.policy.evaluate import CompiledRules
from enforcer_daemon.sources.manifests import KubernetesObject, ObjectKey, Problem, assemble


def limit_problems(found: Mapping[ObjectKey, tuple[str, KubernetesObject]]) -> Iterator[Problem]:
    """Yield what exceeds a limit: namespaces, policies by themselves, and the pods that are among the objects."""
    policies = {key: (file, entry) for key, (file, entry) in found.items() if isinstance(entry, NetworkPolicy)}
    snapshot = compile_snapshot([policy for _, policy in policies.values()], 1)
    large = {}
    for key, (file, policy) in policies.items():
        if key.namespace not in large and (problem := snapshot.problem_of(key.namespace)):
            large[key.namespace] = Problem(file, 0, f"Namespace {key.namespace}", "", problem)
        for direction in Direction:
            # Without the names of ports, which only a pod gives numbers.
            if problem := CompiledRules([policy], direction).kernel_rules({}).problem:
                yield Problem(file, 0, str(key), "", problem)
    yield from large.values()
    state = assemble((entry for _, entry in found.values()), ())
    for key, (file, entry) in found.items():
        if isinstance(entry, Pod) and entry.ref in state.pods and key.namespace not in large:
            labels = state.labels_of(key.namespace)
            identity = Identity(entry.ref, entry.ips, entry.labels, labels, entry.node, named_ports=entry.named_ports)
            yield from (Problem(file, 0, str(key), "", text) for text in snapshot.pod_policy(identity).problems)
