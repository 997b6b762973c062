# SPDX-License-Identifier: Apache-2.0
"""`triremectl validate` of cluster policies, and that nothing which enforces takes them silently."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from enforcer_daemon.sources.manifests import decode_file
from triremectl.__main__ import main

POLICY = """apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: lockdown}
spec:
  tier: Admin
  priority: 0
  subject: {namespaces: {}}
  egress:
  - action: Deny
    to:
    - PEER
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """Return the path of a policy with a peer of the experimental channel."""
    path = tmp_path / "lockdown.yaml"
    path.write_text(POLICY.replace("PEER", "nodes: {}"))
    return path


def test_a_field_of_the_other_channel_is_named_with_its_line(policy: Path) -> None:
    result = CliRunner().invoke(main, ["validate", str(policy)])

    field = "spec.egress[0].to[0].nodes"
    assert result.exit_code == 1
    assert f'{policy}:11: ClusterNetworkPolicy lockdown: {field}: unknown field "{field}"' in result.output


def test_the_experimental_channel_accepts_it_with_a_note(policy: Path) -> None:
    result = CliRunner().invoke(main, ["validate", "--experimental", str(policy)])

    assert result.exit_code == 0
    assert "1 valid, 0 refused" in result.output
    assert "1 of them ClusterNetworkPolicy, which this enforcer does not enforce" in result.output


def test_a_typed_list_of_cluster_policies_is_read(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    item = """{metadata: {name: a}, spec: {tier: Baseline, priority: 1, subject: {namespaces: {}}}}"""
    path.write_text(f"apiVersion: v1\nkind: ClusterNetworkPolicyList\nitems: [{item}]\n")

    result = CliRunner().invoke(main, ["validate", str(path)])

    assert result.exit_code == 0


def test_a_directory_in_force_refuses_the_kind() -> None:
    (entry,) = decode_file("a.yaml", POLICY.replace("PEER", "namespaces: {}").encode()).entries

    assert entry.object is None
    assert "is not read here" in entry.problems[0].message


def test_simulate_has_no_answer_with_cluster_policies(policy: Path) -> None:
    arguments = ["simulate", "--policies", str(policy), "--from", "10.0.0.1", "--to", "10.0.0.2", "--port", "80"]

    result = CliRunner().invoke(main, arguments)

    assert result.exit_code == 2
    assert 'Invalid value: "ClusterNetworkPolicy": is not read here' in result.output
