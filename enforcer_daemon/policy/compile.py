# SPDX-License-Identifier: Apache-2.0
"""Compiles all NetworkPolicies into a snapshot that finds a pod's policies by index, not by trying all.

A snapshot never changes what it answers. It compiles a namespace when a pod of it is first asked for, and keeps what it
compiled, because a node has pods of few namespaces.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from enforcer_daemon.model import Direction, Identity
from enforcer_daemon.policy.evaluate import CompiledRules, DirectionPolicy, PodPolicy
from enforcer_daemon.policy.objects import NetworkPolicy
from enforcer_daemon.policy.tables import LabelTable

MAX_COMPILED_SETS = 4_096
"""Sets of policies of one namespace that stay compiled. A set is what selects some pod of this node, so a node has
fewer of them than pods; the bound is for those who ask about many pods, and beyond it all are compiled anew."""

_CompiledSet = tuple[CompiledRules, CompiledRules]


class _NamespacePolicies:
    """The policies of one namespace, by the labels of the pods that they select."""

    def __init__(self, policies: tuple[NetworkPolicy, ...]) -> None:
        self.policies = policies
        self._by_labels: LabelTable[int] = LabelTable(
            ((policy.pod_selector,), index) for index, policy in enumerate(policies)
        )
        self._compiled: dict[tuple[int, ...], _CompiledSet] = {}

    def rules_for(self, identity: Identity) -> _CompiledSet:
        policies = self.policies
        selecting = tuple(
            sorted(
                index
                for index in self._by_labels.find(identity.labels)
                if policies[index].pod_selector.matches(identity.labels)
            )
        )
        compiled = self._compiled.get(selecting)
        if compiled is None:
            chosen = [policies[index] for index in selecting]
            compiled = (CompiledRules(chosen, Direction.INGRESS), CompiledRules(chosen, Direction.EGRESS))
            if len(self._compiled) >= MAX_COMPILED_SETS:
                self._compiled.clear()
            self._compiled[selecting] = compiled
        return compiled


_NO_RULES: _CompiledSet = (CompiledRules((), Direction.INGRESS), CompiledRules((), Direction.EGRESS))


class PolicySnapshot:
    """All policies at one moment."""

    __slots__ = ("_compiled", "_policies", "generation")

    def __init__(self, policies: Iterable[NetworkPolicy], generation: int, previous: PolicySnapshot | None) -> None:
        self.generation = generation
        grouped: dict[str, list[NetworkPolicy]] = {}
        for policy in policies:
            grouped.setdefault(policy.namespace, []).append(policy)
        by_name = attrgetter("name")
        self._policies = {namespace: tuple(sorted(group, key=by_name)) for namespace, group in grouped.items()}
        kept: dict[str, _NamespacePolicies] = {} if previous is None else previous._compiled
        self._compiled: dict[str, _NamespacePolicies] = {
            name: old for name, old in kept.items() if old.policies == self._policies.get(name)
        }

    @property
    def policies(self) -> tuple[NetworkPolicy, ...]:
        """All policies, by namespace and name."""
        return tuple(policy for _, group in sorted(self._policies.items()) for policy in group)

    def pod_policy(self, identity: Identity) -> PodPolicy:
        """Give what selects this pod; its cost does not grow with the number of policies that do not."""
        namespace = identity.pod.namespace
        policies = self._policies.get(namespace)
        if policies is None:
            ingress, egress = _NO_RULES
        else:
            compiled = self._compiled.get(namespace)
            if compiled is None:
                compiled = self._compiled[namespace] = _NamespacePolicies(policies)
            ingress, egress = compiled.rules_for(identity)
        return PodPolicy(identity, DirectionPolicy(ingress, identity), DirectionPolicy(egress, identity))


def compile_snapshot(
    policies: Iterable[NetworkPolicy], generation: int, previous: PolicySnapshot | None = None
) -> PolicySnapshot:
    """Compile the policies; namespaces that are as in `previous` are taken over from it."""
    return PolicySnapshot(policies, generation, previous)
