# SPDX-License-Identifier: Apache-2.0
"""One function decides each limit: the snapshot, the daemon's reports and the commands all tell what it returns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import structlog
from click.testing import CliRunner
from structlog.testing import capture_logs

from enforcer_daemon.daemon.clusterstate import compile_state, with_large_namespaces
from enforcer_daemon.daemon.endpoint import Endpoint
from enforcer_daemon.daemon.policylimits import PolicyLimits
from enforcer_daemon.daemon.preflight import find_problems
from enforcer_daemon.kube.resources import NETWORK_POLICIES
from enforcer_daemon.kube.table import Table, read_entry
from enforcer_daemon.model import Identity, PodRef
from enforcer_daemon.policy import compile_snapshot, decode_network_policy
from enforcer_daemon.settings import Settings
from enforcer_daemon.sources.manifests import ClusterState
from triremectl.__main__ import main

HEAD = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "farm", "name": "cow", "labels": {"app": "cow"}}}
POD |= {"spec": {"containers": []}, "status": {"podIPs": [{"ip": "10.1.0.1"}]}}
ADDRESS_LIMIT = "more than the limit of 256 rules or 65536 ranges: nothing is allowed by address"
BYTES_LIMIT = "more than the limit of 300: all of its pods are isolated, and nothing is allowed"


def policy(name: str, numbers: Iterable[int]) -> dict[str, Any]:
    """Egress to a network and a port for each number; no two share either."""
    rules = [
        {"to": [{"ipBlock": {"cidr": f"10.{n >> 8}.{n % 256}.0/24"}}], "ports": [{"port": 1 + n}]} for n in numbers
    ]
    spec = {"podSelector": {"matchLabels": {"app": "cow"}}, "policyTypes": ["Egress"], "egress": rules}
    return {**HEAD, "metadata": {"namespace": "farm", "name": name}, "spec": spec}


def write(place: Path, *manifests: Mapping[str, object]) -> None:
    (place / "all.json").write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests}))


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return result.exit_code, result.output


def question(place: Path, destination: str, port: int) -> tuple[int, str]:
    return run("simulate", "--policies", place, "--from", "farm/cow", "--to", destination, "--port", port)


def test_a_policy_counts_alike_from_a_file_and_from_the_api_server() -> None:
    manifest = policy("a", range(3))
    table: Table[Any] = Table(NETWORK_POLICIES)
    table.put(cast(Any, read_entry(NETWORK_POLICIES, manifest, {})))
    [stored] = table.values()
    assert stored.size == decode_network_policy(manifest).size > 0


def test_validate_names_a_pod_whose_policies_exceed_the_limit_together(tmp_path: Path) -> None:
    write(tmp_path, policy("a", range(200)), policy("b", range(100, 256)), POD)
    assert run("validate", tmp_path)[0] == 0
    write(tmp_path, policy("a", range(200)), policy("b", range(100, 257)), POD)
    code, output = run("validate", tmp_path)
    assert code == 1
    assert f"Pod farm/cow: egress by address: 257 rules with 771 ranges, {ADDRESS_LIMIT}; policies: " in output
    assert "farm/a, farm/b" in output


def test_validate_names_a_policy_that_exceeds_the_limit_by_itself(tmp_path: Path) -> None:
    write(tmp_path, policy("big", range(257)))
    code, output = run("validate", tmp_path)
    assert code == 1
    assert f"NetworkPolicy farm/big: egress by address: 257 rules with 771 ranges, {ADDRESS_LIMIT}" in output


def test_a_check_of_the_settings_names_what_the_policy_directory_exceeds(tmp_path: Path) -> None:
    write(tmp_path, policy("big", range(257)))
    settings = Settings("node-1", state_dir=tmp_path, policy_dir=tmp_path)
    found = [problem for problem in find_problems(settings, 0.0) if problem.startswith("policyDir: ")]
    assert len(found) == 1
    assert f"NetworkPolicy farm/big: egress by address: 257 rules with 771 ranges, {ADDRESS_LIMIT}" in found[0]


def test_simulate_decides_as_the_guard_and_the_enforcer_do(tmp_path: Path) -> None:
    write(tmp_path, policy("a", range(256)), POD)
    assert question(tmp_path, "10.0.3.3", 4)[0] == 0
    write(tmp_path, policy("big", range(257)), POD)
    code, output = question(tmp_path, "10.0.3.3", 4)
    assert code == 1
    assert f"limit exceeded: egress by address: 257 rules with 771 ranges, {ADDRESS_LIMIT}" in output


def test_a_namespace_above_its_limit_is_named_alike_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = policy("a", [1]), policy("b", [2])
    sizes = [decode_network_policy(manifest).size for manifest in manifests]
    assert max(sizes) <= 300 < sum(sizes)
    monkeypatch.setattr("enforcer_daemon.policy.limits.MAX_NAMESPACE_BYTES", 300)
    told = f"the namespace's NetworkPolicies take {sum(sizes)} bytes as JSON, {BYTES_LIMIT}"
    write(tmp_path, *manifests, POD)
    code, output = run("validate", tmp_path)
    assert (code, f"Namespace farm: {told}" in output) == (1, True)
    code, output = question(tmp_path, "10.0.1.1", 2)
    assert (code, f"limit exceeded: {told}" in output) == (1, True)
    state = ClusterState(tuple(decode_network_policy(manifest) for manifest in manifests))
    compiled = with_large_namespaces(compile_state(state, Settings("node-1"), None), ["farm"])
    assert [problem.message for problem in compiled.cluster.problems] == [told] == list(compiled.large.values())


class FakeEndpoint:
    """A pod with policies."""

    def __init__(self, *manifests: dict[str, Any]) -> None:
        self.identity = Identity(PodRef("farm", "cow"), (), {"app": "cow"}, {}, "node-1")
        self.policy = compile_snapshot(map(decode_network_policy, manifests), 1).pod_policy(self.identity)
        self.sandbox = self
        self.requests = "requests of farm/cow"


class FakeAnnouncements:
    """Keeps what is announced."""

    def __init__(self) -> None:
        self.noted: list[tuple[object, str]] = []

    def note_policy_limit(self, requests: object, text: str) -> None:
        self.noted.append((requests, text))


def test_the_daemon_tells_of_a_pod_above_its_limit_while_it_lasts() -> None:
    endpoints = [FakeEndpoint(policy("big", range(257)))]
    announced = FakeAnnouncements()
    limits = PolicyLimits(lambda: cast(Iterable[Endpoint], endpoints), cast(Any, announced), structlog.get_logger())
    [problem] = limits.problems()
    assert problem.object == "Pod farm/cow"
    assert problem.message.startswith(f"egress by address: 257 rules with 771 ranges, {ADDRESS_LIMIT}")
    with capture_logs() as logs:
        for _ in range(2):
            limits.report(None)
    assert announced.noted == [("requests of farm/cow", problem.message)] * 2  # A state, which the book tells once.
    assert [entry["event"] for entry in logs].count("policy limit exceeded") == 1
    endpoints[:] = [FakeEndpoint(policy("a", [1]))]
    limits.report(None)
    assert (limits.problems(), len(announced.noted)) == ([], 2)
