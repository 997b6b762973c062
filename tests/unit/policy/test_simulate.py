# SPDX-License-Identifier: Apache-2.0
"""`triremectl simulate` and `triremectl validate`, as they are called."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from triremectl import simulate, validate

CASE: dict[str, Any] = {
    "name": "milk",
    "namespaces": [{"name": "farm", "labels": {}}],
    "pods": [
        {"namespace": "farm", "name": "cow", "labels": {"kind": "cow"}, "ip": "10.1.0.1"},
        {"namespace": "farm", "name": "hen", "labels": {"kind": "hen"}, "ip": "10.1.0.2"},
    ],
    "policies": [
        {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"namespace": "farm", "name": "p"},
         "spec": {"podSelector": {"matchLabels": {"kind": "cow"}}, "ingress": [{"ports": [{"port": 80}]}]}},
    ],
    "probes": [
        {"from": "farm/hen", "to": "farm/cow", "port": 80, "protocol": "TCP", "expected": "allow"},
        {"from": "farm/hen", "to": "farm/cow", "port": 81, "protocol": "TCP", "expected": "deny",
         "denied_by": "ingress"},
    ],
}  # fmt: skip
MANIFESTS = """\
apiVersion: v1
kind: Namespace
metadata: {name: farm}
---
apiVersion: v1
kind: Pod
metadata: {name: cow, namespace: farm, labels: {kind: cow}, creationTimestamp: 2026-01-01T00:00:00Z}
spec: {containers: [{name: c, image: i, ports: [{name: milk, containerPort: 8080}]}]}
status: {podIP: 10.1.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: hen, namespace: farm}
"""
POLICY = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: p, namespace: farm}
spec:
  podSelector: {matchLabels: {kind: cow}}
  ingress: [{ports: [{port: milk}]}]
"""


def run_simulate(*arguments: object, text: str | None = None) -> Result:
    return CliRunner().invoke(simulate.command, [str(argument) for argument in arguments], input=text)


def changed(**probe: object) -> str:
    """Return the case with its first probe changed."""
    return json.dumps({**CASE, "probes": [{**CASE["probes"][0], **probe}, CASE["probes"][1]]})


def test_a_case_gives_a_line_of_verdicts_in_order() -> None:
    result = run_simulate("-", text=json.dumps(CASE) + "\n\n" + json.dumps({**CASE, "name": "again"}) + "\n")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"name": "milk", "verdicts": ["allow", "deny"]},
        {"name": "again", "verdicts": ["allow", "deny"]},
    ]
    assert result.exit_code == 0


def test_packed_files_are_read(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "cases.jsonl.gz", "wt") as file:
        file.write(json.dumps(CASE))
    assert run_simulate(tmp_path / "cases.jsonl.gz").exit_code == 0


def test_an_explanation_names_ends_and_rules() -> None:
    line = json.loads(run_simulate("--explain", text=json.dumps(CASE)).stdout)
    assert line["explanations"][0]["ingress"] == {"allowed": True, "reason": "policy", "rules": ["farm/p[0]"]}
    assert line["explanations"][1] == {
        "from": "farm/hen", "to": "farm/cow", "port": 81, "protocol": "TCP", "verdict": "deny", "denied_by": "ingress",
        "egress": {"allowed": True, "reason": "not-isolated", "rules": []},
        "ingress": {"allowed": False, "reason": "ingress-denied", "rules": ["farm/p"]},
    }  # fmt: skip


def test_check_counts_what_is_as_expected() -> None:
    result = run_simulate("--check", text=json.dumps(CASE))
    assert result.stdout == "2 of 2 probes as expected (1 cases)\n"
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"expected": "deny"}, "milk: farm/hen -> farm/cow TCP 80: expected deny, found allow"),
        ({"port": 82, "expected": "deny", "denied_by": "egress"},
         "milk: farm/hen -> farm/cow TCP 82: expected deny (by egress), found deny (by ingress)"),
    ],
)  # fmt: skip
def test_check_tells_each_difference_with_its_explanation(change: dict[str, Any], line: str) -> None:
    result = run_simulate("--check", text=changed(**change))
    lines = result.stdout.splitlines()
    assert lines[0] == line
    assert lines[1].startswith("  egress of farm/hen: allowed (not-isolated)")
    assert lines[2].startswith("  ingress of farm/cow: ")
    assert lines[3] == "1 of 2 probes as expected (1 cases)"
    assert result.exit_code == 1


def test_check_without_anything_expected_fails() -> None:
    result = run_simulate("--check", text=json.dumps({**CASE, "probes": []}))
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "-:1: not JSON: Expecting"),
        (changed(**{"from": "farm/pig"}), "no pod farm/pig"),
        (changed(to="10.0.0"), "10.0.0: must be NAMESPACE/POD or an IP address"),
        (changed(to="2001:db8::1"), "no addresses of one family"),
        (changed(protocol="ICMP"), "probes[0].protocol: Unsupported value"),
        (changed(expected="maybe"), "probes[0].expected: Unsupported value"),
        (json.dumps({**CASE, "policies": [{"kind": "NetworkPolicy"}]}), "policies[0].metadata.name: Required value"),
        (json.dumps({**CASE, "pods": [{"ip": "x"}]}), "pods[0].ip: Invalid value"),
    ],
)
def test_a_case_that_cannot_be_judged_is_named(text: str, message: str) -> None:
    result = run_simulate(text=text)
    assert result.exit_code == 1
    assert message in result.stderr


CLUSTER_CASE: dict[str, Any] = {
    **CASE,
    "nodes": [{"name": "n1", "ip": "192.168.0.11", "labels": {"role": "edge"}}],
    "policies": [
        *CASE["policies"],
        {"apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy", "metadata": {"name": "top"},
         "spec": {"tier": "Admin", "priority": 0, "subject": {"namespaces": {}}, "egress": [
             {"action": "Deny", "to": [{"nodes": {"matchLabels": {"role": "edge"}}}]},
             {"name": "cows", "action": "Pass", "to": [{"pods": {"podSelector": {"matchLabels": {"kind": "cow"}}}}]},
         ]}},
    ],
    "probes": [
        {"from": "farm/hen", "to": "192.168.0.11", "port": 80, "expected": "deny", "denied_by": "egress"},
        {"from": "farm/hen", "to": "farm/cow", "port": 80, "expected": "deny"},
    ],
}  # fmt: skip


def test_rules_of_cluster_policies_are_explained() -> None:
    result = run_simulate("--explain", text=json.dumps(CLUSTER_CASE))

    node, cow = json.loads(result.output)["explanations"]
    assert node["egress"]["clusterRules"] == ["cluster policy Admin/top rule 0 (Deny)"]
    assert cow["egress"]["clusterRules"] == ['cluster policy Admin/top rule 1 "cows" (Pass)']
    assert "clusterRules" not in cow["ingress"]


def test_check_tells_which_cluster_policies_were_asked() -> None:
    result = run_simulate("--check", text=json.dumps(CLUSTER_CASE))

    assert result.exit_code == 1
    assert "1 of 2 probes as expected" in result.output
    assert 'egress of farm/hen: allowed (not-isolated); cluster policy Admin/top rule 1 "cows" (Pass)' in result.output


def test_domain_names_in_a_case_have_no_answer() -> None:
    spec = {"tier": "Admin", "priority": 0, "subject": {"namespaces": {}},
            "egress": [{"action": "Accept", "to": [{"domainNames": ["a.example"]}]}]}  # fmt: skip
    policy = {**CLUSTER_CASE["policies"][1], "spec": spec}

    result = run_simulate(text=json.dumps({**CLUSTER_CASE, "policies": [policy]}))

    assert result.exit_code == 1
    assert "domainNames cannot be evaluated" in result.output


def test_nodes_may_be_a_list_or_a_map() -> None:
    for nodes in ([{"name": "n1", "ip": "192.168.0.1"}], {"n1": "192.168.0.1"}, {"n1": {"ips": ["192.168.0.1"]}}):
        pods = [{**pod, "node": "n1"} for pod in CASE["pods"]]
        probe = {"from": "192.168.0.1", "to": "farm/cow", "port": 81, "protocol": "TCP"}
        result = run_simulate(text=json.dumps({**CASE, "nodes": nodes, "pods": pods, "probes": [probe]}))
        assert json.loads(result.stdout)["verdicts"] == ["allow"]


@pytest.fixture
def manifests(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "p.yaml").write_text(POLICY)
    (tmp_path / "pods.yaml").write_text(MANIFESTS)
    return tmp_path / "policies", tmp_path / "pods.yaml"


@pytest.mark.parametrize(
    ("port", "answer"),
    [("8080", "allowed"), ("milk", "allowed"), ("80", "denied by ingress"), ("x", "denied by ingress")],
)
def test_one_question_about_manifests(manifests: tuple[Path, Path], port: str, answer: str) -> None:
    policies, pods = manifests
    result = run_simulate(
        "--policies", policies, "--pods", pods, "--from", "farm/hen", "--to", "farm/cow", "--port", port
    )
    assert result.stdout.splitlines()[0] == f"farm/hen -> farm/cow TCP {port}: {answer}"
    assert result.stderr == ""
    assert result.exit_code == (0 if answer == "allowed" else 1)
    assert ("has no TCP port with the name x" in result.stdout) == (port == "x")


def ask(manifests: tuple[Path, Path], source: str = "farm/hen", to: str = "farm/cow", port: str = "8080") -> Result:
    policies, pods = manifests
    return run_simulate("--policies", policies, "--pods", pods, "--from", source, "--to", to, "--port", port)


def test_a_rule_by_address_meets_a_stand_in_for_an_address_that_the_manifest_lacks(
    manifests: tuple[Path, Path],
) -> None:
    policy = manifests[0] / "p.yaml"
    policy.write_text(POLICY.replace("[{ports", "[{from: [{ipBlock: {cidr: 10.0.0.0/8}}], ports"))
    result = ask(manifests)
    assert result.stderr == "farm/hen has no address in its manifest; ipBlock rules see 198.18.0.1\n"
    assert ask(manifests, source="10.1.2.3").stderr == ""


@pytest.mark.parametrize("port", ["0", "-1", "65536", "99999"])
def test_a_number_that_is_no_port_has_no_answer(manifests: tuple[Path, Path], port: str) -> None:
    result = ask(manifests, port=port)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--port: must be 1 to 65535, or a name" in result.stderr


@pytest.mark.parametrize("end", ["hen", "10.0.0"])
def test_an_end_that_is_nothing_is_said_with_what_it_may_be(manifests: tuple[Path, Path], end: str) -> None:
    result = ask(manifests, source=end)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Error: {end}: must be NAMESPACE/POD or an IP address" in result.stderr


def test_a_port_has_its_name_at_the_pods_address_too(manifests: tuple[Path, Path]) -> None:
    assert "no TCP port" not in ask(manifests, to="10.1.0.1", port="milk").stdout
    assert "10.1.0.1 has no TCP port with the name beer" in ask(manifests, to="10.1.0.1", port="beer").stdout


def test_pods_may_be_a_directory(manifests: tuple[Path, Path]) -> None:
    policies, pods = manifests
    (policies.parent / "pods").mkdir()
    assert ask((policies, pods.rename(policies.parent / "pods" / "all.yaml").parent)).exit_code == 0


def test_one_question_answered_for_programs(manifests: tuple[Path, Path]) -> None:
    policies, pods = manifests
    result = run_simulate(
        "--policies", policies, "--pods", pods, "--from", "farm/hen", "--to", "farm/cow", "--port", "x",
        "--output", "json",
    )  # fmt: skip
    answer = json.loads(result.stdout)
    assert (answer["verdict"], answer["denied_by"], result.exit_code) == ("deny", "ingress", 1)
    assert answer["ingress"]["rules"], "the policies that isolate the pod"
    assert "no TCP port" in answer["note"]


def test_a_question_about_bad_manifests_is_not_answered(manifests: tuple[Path, Path]) -> None:
    policies, pods = manifests
    (policies / "q.yaml").write_text(POLICY.replace("milk", "Milk"))
    result = run_simulate(
        "--policies", policies, "--pods", pods, "--from", "farm/hen", "--to", "farm/cow", "--port", "1"
    )
    assert result.exit_code == 2
    assert "spec.ingress[0].ports[0].port" in result.stderr


def test_options_that_do_not_go_together_are_refused() -> None:
    assert run_simulate("--port", "80").exit_code == 2
    assert run_simulate("--policies", "x", "--port", "80").exit_code == 2
    assert run_simulate("--policies", "x", "--check").exit_code == 2


def run_validate(*paths: object, text: str | None = None) -> Result:
    return CliRunner().invoke(validate.command, [str(path) for path in paths], input=text)


def test_valid_manifests_are_counted(manifests: tuple[Path, Path]) -> None:
    result = run_validate(*manifests)
    assert result.stdout == "4 valid, 0 refused, in 2 files\n"
    assert result.exit_code == 0


def test_each_problem_names_file_line_object_and_field(manifests: tuple[Path, Path]) -> None:
    policies, _ = manifests
    (policies / "p.yaml").write_text(POLICY + "  policyTypes: [Both]\n---\n" + POLICY.replace("name: p", "name: q"))
    result = run_validate(policies)
    lines = result.stdout.splitlines()
    place = f"{policies / 'p.yaml'}:7: NetworkPolicy farm/p: spec.policyTypes[0]: Unsupported value"
    assert lines[0].startswith(place)
    assert lines[1] == "1 valid, 1 refused, in 1 file"
    assert result.exit_code == 1


def test_standard_input_is_validated() -> None:
    assert run_validate("-", text=POLICY).exit_code == 0
    assert run_validate("-", text=POLICY.replace("kind: N", "kind: n")).exit_code == 1


def test_a_path_that_holds_nothing_is_an_error(tmp_path: Path) -> None:
    assert run_validate(tmp_path).exit_code == 1
    result = run_validate(tmp_path / "absent.yaml")
    assert result.exit_code == 1
    assert "cannot be read: No such file" in result.stdout
