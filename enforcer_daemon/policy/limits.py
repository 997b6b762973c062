# SPDX-License-Identifier: Apache-2.0
"""Limits on what policies come to together: of a namespace, and of one pod. Pure.

A single object is limited where it is decoded (`complexity`). These functions alone decide about sums: the snapshot,
the daemon's status and Events, `triremectl validate` and `triremectl simulate` all show what they return.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from enforcer_daemon.model import Direction
from enforcer_daemon.policy.address_rules import AddressRule, size_of
from enforcer_daemon.policy.objects import AnyPolicy

MAX_NAMESPACE_BYTES = 4 * 1024 * 1024
"""Policies of one namespace, as they are stored: some ten thousand. Decoded and compiled they take about twenty times
as much memory and some seconds."""
MAX_KERNEL_RULES = 256
MAX_KERNEL_SPANS = 65_536
"""Rules by address of one pod in one direction that the kernel is given, and spans of addresses and ports in them. A
rule is one allowance of addresses on ports that no other shares; a span is what an ipBlock leaves, or some ports."""
_MAX_NAMED = 10
"""Policies that a problem names."""


def stored_form(namespace: str, name: str, spec: object) -> dict[str, object]:
    """Return what is stored of a NetworkPolicy."""
    return {"metadata": {"name": name, "namespace": namespace}, "spec": spec}


def stored_bytes(form: Mapping[str, object]) -> bytes:
    """Return an object as it is stored; the length is what counts against MAX_NAMESPACE_BYTES."""
    return json.dumps(form, separators=(",", ":")).encode()


def namespace_problem(policies: Iterable[AnyPolicy]) -> str:
    """Return what is wrong with the policies of one namespace together; empty if nothing is."""
    total = sum(policy.size for policy in policies)
    if total <= MAX_NAMESPACE_BYTES:
        return ""
    return (
        f"the namespace's NetworkPolicies take {total} bytes as JSON, more than the limit of {MAX_NAMESPACE_BYTES}: "
        "all of its pods are isolated, and nothing is allowed"
    )


def address_rules_problem(rules: Sequence[AddressRule], direction: Direction, policies: Sequence[object]) -> str:
    """Return what is wrong with a pod's rules by address in one direction; empty if nothing is."""
    if len(rules) <= MAX_KERNEL_RULES and size_of(rules) <= MAX_KERNEL_SPANS:
        return ""
    named = ", ".join(map(str, policies[:_MAX_NAMED]))
    more = f" and {len(policies) - _MAX_NAMED} more" if len(policies) > _MAX_NAMED else ""
    whom = "" if direction is Direction.EGRESS else " to masqueraded flows"
    return (
        f"{direction.value} by address: {len(rules)} rules with {size_of(rules)} ranges, more than the limit of "
        f"{MAX_KERNEL_RULES} rules or {MAX_KERNEL_SPANS} ranges: nothing is allowed by address{whom}; policies: "
        f"{named}{more}"
    )
