# SPDX-License-Identifier: Apache-2.0
"""Objects beyond a stated size are refused before they are decoded, and name the list that is too long."""

from __future__ import annotations

from typing import Any

import pytest

from enforcer_daemon.kube.resources import NETWORK_POLICIES, PODS
from enforcer_daemon.kube.table import Entry, read_entry
from enforcer_daemon.policy import InvalidObjectError, decode_network_policy, decode_pod
from enforcer_daemon.policy.complexity import MAX_POD_ELEMENTS, MAX_POLICY_ELEMENTS
from enforcer_daemon.policy.objects import EVERYTHING, NetworkPolicy
from enforcer_daemon.policy.reader import MAX_MESSAGE, MAX_PROBLEMS

MANY = MAX_POLICY_ELEMENTS + 1
BLOCK = {"ipBlock": {"cidr": "10.0.0.0/8"}}


def policy(**spec: Any) -> dict[str, Any]:
    metadata = {"name": "p", "namespace": "x"}
    spec = {"podSelector": {}, **spec}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


def expression(count: int) -> dict[str, Any]:
    return {"matchExpressions": [{"key": "k", "operator": "In", "values": [f"v{n}" for n in range(count)]}]}


TOO_MANY: dict[str, dict[str, Any]] = {
    "spec.ingress": {"ingress": [{}] * MANY},
    "spec.ingress[0].from": {"ingress": [{"from": [BLOCK] * MANY}]},
    "spec.egress[1].ports": {"egress": [{"to": [BLOCK] * 9_000}, {"ports": [{"port": 1}] * 9_000}]},
    "spec.ingress[0].from[0].ipBlock.except": {
        "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"] * MANY}}]}]
    },
    "spec.ingress[0].from[0].podSelector.matchLabels": {
        "ingress": [{"from": [{"podSelector": {"matchLabels": {f"k{n}": "" for n in range(MANY)}}}]}]
    },
    "spec.ingress[0].from[0].namespaceSelector.matchExpressions[0].values": {
        "ingress": [{"from": [{"namespaceSelector": expression(MANY)}]}]
    },
    "spec.podSelector.matchExpressions[0].values": {"podSelector": expression(MANY)},
}


@pytest.mark.parametrize("field", TOO_MANY)
def test_a_policy_beyond_the_limit_names_its_longest_list(field: str) -> None:
    with pytest.raises(InvalidObjectError, match=str(MAX_POLICY_ELEMENTS)) as refused:
        decode_network_policy(policy(**TOO_MANY[field]))
    assert refused.value.field == field


def test_thousands_of_blocks_are_within_the_limit() -> None:
    blocks = [{"ipBlock": {"cidr": f"10.{n // 256}.{n % 256}.0/24"}} for n in range(10_000)]
    (rule,) = decode_network_policy(policy(ingress=[{"from": blocks}])).ingress or ()
    assert len(rule.peers) == 10_000


@pytest.mark.parametrize(
    ("spec", "selects_all"),
    [
        ({"podSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"from": [BLOCK] * MANY}]}, False),
        ({"podSelector": expression(MANY)}, True),
    ],
)
def test_whom_a_refused_policy_selects_is_isolated(spec: dict[str, Any], *, selects_all: bool) -> None:
    entry = read_entry(NETWORK_POLICIES, policy(**spec), {})
    assert isinstance(entry, Entry)
    assert isinstance(entry.value, NetworkPolicy)
    assert (entry.value.pod_selector == EVERYTHING) is selects_all
    assert entry.value.ingress == ()
    assert entry.problems[0].has_earlier is False


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({"labels": {f"k{n}": "" for n in range(MAX_POD_ELEMENTS + 1)}}, "metadata.labels"),
        ({"ports": [{"name": "a", "containerPort": 1}] * MAX_POD_ELEMENTS}, "spec.containers[0].ports"),
    ],
)
def test_a_pod_beyond_the_limit_is_refused(parts: dict[str, Any], field: str) -> None:
    metadata = {"name": "p", "namespace": "x", "uid": "u", "labels": parts.get("labels", {})}
    container = {"name": "c", "ports": parts.get("ports", [])}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [container]}}
    with pytest.raises(InvalidObjectError) as refused:
        decode_pod(pod)
    assert refused.value.field == field
    entry = read_entry(PODS, pod, {})
    assert isinstance(entry, Entry)
    assert entry.value is None


def test_problems_of_one_object_are_bounded_in_number_and_length() -> None:
    with pytest.raises(InvalidObjectError) as refused:
        decode_network_policy(policy(ingress=[{"from": [{"ipBlock": {"cidr": "x" * 100_000}}] * 10_000}]))
    assert len(refused.value.problems) == MAX_PROBLEMS
    assert max(len(problem.message) for problem in refused.value.problems) <= MAX_MESSAGE + 3
