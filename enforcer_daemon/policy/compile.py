# SPDX-License-Identifier: Apache-2.0
"""Compiles all NetworkPolicies into a snapshot that finds a pod's policies by index, not by trying all.

A snapshot never changes what it answers. It compiles a namespace when a pod of it is first asked for, and keeps what it
compiled, because a node has pods of few namespaces. Made after another one, it looks at the namespaces of the objects
that are not the very same as before, and shares the rest: a change costs little however many policies there are.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from operator import attrgetter

from enforcer_daemon.model import Direction, Identity
from enforcer_daemon.policy.evaluate import CompiledRules, DirectionPolicy, PodPolicy
from enforcer_daemon.policy.limits import namespace_problem
from enforcer_daemon.policy.objects import AnyPolicy, NetworkPolicy
from enforcer_daemon.policy.tables import LabelTable

MAX_COMPILED_SETS = 4_096
"""Sets of policies of one namespace that stay compiled. A set is what selects some pod of this node, so a node has
fewer of them than pods; the bound is for those who ask about many pods, and beyond it all are compiled anew."""

_BY_NAME = attrgetter("name")

_CompiledSet = tuple[CompiledRules, CompiledRules]


class _NamespacePolicies:
    """The policies of one namespace, by the labels of the pods that they select."""

    def __init__(self, listed: tuple[AnyPolicy, ...]) -> None:
        self.listed = listed
        self._policies = policies = loaded(listed)
        self._by_labels: LabelTable[int] = LabelTable(
            ((policy.pod_selector,), index) for index, policy in enumerate(policies)
        )
        self._compiled: dict[tuple[int, ...], _CompiledSet] = {}

    def rules_for(self, identity: Identity) -> _CompiledSet:
        policies = self._policies
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


def loaded(listed: Sequence[AnyPolicy]) -> tuple[NetworkPolicy, ...]:
    """Decode the policies of one namespace; where they are too large, isolate all of its pods instead."""
    if namespace_problem(listed):
        return (NetworkPolicy(listed[0].namespace, "policies-too-large", ingress=(), egress=()),)
    return tuple(policy.load() for policy in listed)


_NO_RULES: _CompiledSet = (CompiledRules((), Direction.INGRESS), CompiledRules((), Direction.EGRESS))


_Grouped = dict[str, tuple[AnyPolicy, ...]]


class PolicySnapshot:
    """All policies at one moment."""

    __slots__ = ("_by_id", "_compiled", "_policies", "generation")

    def __init__(
        self,
        policies: Iterable[AnyPolicy],
        generation: int,
        previous: PolicySnapshot | None,
        keep: Container[str] | None,
    ) -> None:
        self.generation = generation
        listed = list(policies)
        # An object is the same one as long as somebody holds it, which every snapshot does. All of this is one step for
        # the interpreter, whereas grouping takes several for each policy.
        self._by_id: dict[int, AnyPolicy] = dict(zip(map(id, listed), listed, strict=True))
        self._policies: _Grouped = {}
        self._compiled: dict[str, _NamespacePolicies] = {}
        changed = self._by_id
        if previous is not None:
            changed = self._take_over(previous)
        grouped: dict[str, list[AnyPolicy]] = {}
        for policy in changed.values():
            grouped.setdefault(policy.namespace, []).append(policy)
        for namespace, group in grouped.items():
            self._policies[namespace] = tuple(sorted(group, key=_BY_NAME))
        if previous is not None:
            for namespace, old in list(previous._compiled.items()):  # A thread may compile another meanwhile.
                if keep is not None and namespace not in keep:
                    for policy in old.listed:
                        policy.unload()
                elif old.listed == self._policies.get(namespace):
                    self._compiled[namespace] = old

    def _take_over(self, previous: PolicySnapshot) -> dict[int, AnyPolicy]:
        """Take the namespaces without a change; give the policies of the others."""
        before, now = previous._by_id, self._by_id
        gone, new = before.keys() - now.keys(), now.keys() - before.keys()
        touched = {before[number].namespace for number in gone} | {now[number].namespace for number in new}
        self._policies = dict(previous._policies)
        left = [policy for namespace in touched for policy in self._policies.pop(namespace, ())]
        changed = {id(policy): policy for policy in left if id(policy) in now}
        return changed | {number: now[number] for number in new}

    @property
    def policies(self) -> tuple[AnyPolicy, ...]:
        """All policies, by namespace and name."""
        return tuple(policy for _, group in sorted(self._policies.items()) for policy in group)

    def has_same(self, other: PolicySnapshot, namespace: str) -> bool:
        """Return whether a namespace has the very same policies in both."""
        ours, theirs = self._policies.get(namespace), other._policies.get(namespace)
        return ours is theirs or ours == theirs

    def size_of(self, namespace: str) -> int:
        """Return the bytes of a namespace's policies, as far as they are known."""
        return sum(policy.size for policy in self._policies.get(namespace, ()))

    def problem_of(self, namespace: str) -> str:
        """Return what is wrong with a namespace's policies together; empty if nothing is."""
        return namespace_problem(self._policies.get(namespace, ()))

    def pod_policy(self, identity: Identity) -> PodPolicy:
        """Return what selects this pod; its cost does not grow with the number of policies that do not."""
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
    policies: Iterable[AnyPolicy],
    generation: int,
    previous: PolicySnapshot | None = None,
    keep: Container[str] | None = None,
) -> PolicySnapshot:
    """Compile the policies, no two of one name; namespaces that are as in `previous` are taken over from it.

    What was compiled of a namespace that is not in `keep` is given up; None: nothing is.
    """
    return PolicySnapshot(policies, generation, previous, keep)
