# SPDX-License-Identifier: Apache-2.0
"""Limits that the manifests at hand exceed together, as the daemon would enforce them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from enforcer_daemon.model import Direction
from enforcer_daemon.policy import NetworkPolicy, Pod
from enforcer_daemon.policy.evaluate import CompiledRules
from enforcer_daemon.policy.limits import namespace_problem
from enforcer_daemon.sources.manifests import KubernetesObject, ObjectKey, Problem, assemble
from triremectl.cases import CaseCluster


def limit_problems(found: Mapping[ObjectKey, tuple[str, KubernetesObject]]) -> Iterator[Problem]:
    """Return what exceeds a limit: namespaces, policies by themselves, and the pods that are among the objects."""
    state = assemble((entry for _, entry in found.values()), ())
    policies = {key: (file, entry) for key, (file, entry) in found.items() if isinstance(entry, NetworkPolicy)}
    by_namespace: dict[str, list[tuple[str, NetworkPolicy]]] = {}
    for key, (file, policy) in policies.items():
        by_namespace.setdefault(key.namespace, []).append((file, policy))
    large = {name: problem for name, of in by_namespace.items() if (problem := namespace_problem(p for _, p in of))}
    for namespace, problem in large.items():
        yield Problem(by_namespace[namespace][0][0], 0, f"Namespace {namespace}", "", problem)
    for key, (file, policy) in policies.items():
        for direction in Direction:
            # Without the names of ports, which only a pod gives numbers.
            if problem := CompiledRules([policy], direction).kernel_rules({}).problem:
                yield Problem(file, 0, str(key), "", problem)
    pods = CaseCluster(state.pods.values(), state.namespaces, [policy for _, policy in policies.values()])
    for key, (file, entry) in found.items():
        if isinstance(entry, Pod) and entry.ref in state.pods and key.namespace not in large:
            yield from (Problem(file, 0, str(key), "", problem) for problem in pods.limits_of(entry.ref))
