# SPDX-License-Identifier: Apache-2.0
"""The commands that show a daemon's answers, against a daemon that answers from a dictionary."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from enforcer_daemon.reasons import Reason
from triremectl.__main__ import main

Daemon = Callable[[dict[str, object]], Path]

ENDPOINT: dict[str, Any] = {
    "pod": "web",
    "namespace": "shop",
    "ifname": "eth0",
    "ips": ["10.244.1.2"],
    "state": "enforced",
    "labels": {"app": "web"},
    "identity_bytes": 700,
    "budget_bytes": 1300,
    "isolated": {"ingress": True, "egress": False},
    "policies": ["shop/default-deny"],
    "recent_denials": [
        {
            "when": 0,
            "direction": "ingress",
            "peer": None,
            "address": "203.0.113.9",
            "port": 80,
            "reason": "unidentified-peer",
            "rules": ["shop/default-deny"],
        }
    ],
}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """Start something that answers each command from a dictionary; gives its run directory."""
    listener = socket.socket(socket.AF_UNIX)
    threads: list[threading.Thread] = []

    def start(answers: dict[str, object]) -> Path:
        listener.bind(str(tmp_path / "admin.sock"))
        listener.listen()

        def answer_one() -> None:
            connection, _ = listener.accept()
            with connection:
                question = json.loads(connection.makefile("rb").readline())
                connection.sendall(json.dumps({"ok": True, "result": answers[question["command"]]}).encode() + b"\n")

        threads.append(threading.Thread(target=answer_one, daemon=True))
        threads[-1].start()
        return tmp_path

    with listener:
        yield start
        for thread in threads:
            thread.join(5)


def _run(*argv: str) -> Result:
    return CliRunner().invoke(main, argv, env={"COLUMNS": "200"}, catch_exceptions=False)


def test_status_shows_what_the_daemon_says_and_fails_on_problems(daemon: Daemon) -> None:
    snapshot = {"generation": 7, "policies": 3, "problems": ["x.yaml:1: spec: unknown field"]}
    run_dir = daemon({"status": {"node": "a", "ready": True, "snapshot": snapshot, "drops": {"policy": 0, "x": 4}}})
    result = _run("status", "--run-dir", str(run_dir))
    assert result.exit_code == 1
    for text in ("node", "ready", "yes", "snapshot generation", "7", "problem: x.yaml:1: spec: unknown field"):
        assert text in result.stdout
    assert "policy " not in result.stdout  # nothing was dropped for it


def test_status_shows_whom_the_node_trusts_and_fails_on_problems_with_keys(daemon: Daemon) -> None:
    authority = {"subject": "CN=trireme one", "trust_domain": "one.example", "not_after": "2036-11-19T00:00:00+00:00"}
    answer = {"ready": True, "bundle": [authority], "key_problems": ["credentials.trustBundle: /x: no start line"]}
    result = _run("status", "--run-dir", str(daemon({"status": answer})))
    assert result.exit_code == 1
    for text in (*authority.values(), "problem: credentials.trustBundle: /x: no start line"):
        assert text in result.stdout


def test_status_warns_of_settings_without_failing(daemon: Daemon) -> None:
    answer = {"ready": True, "setting_warnings": ["policyDir: is null"], "cluster": {"warnings": ["Service x/y: z"]}}
    result = _run("status", "--run-dir", str(daemon({"status": answer})))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-2:] == ["warning: policyDir: is null", "warning: Service x/y: z"]


def test_status_of_a_daemon_that_is_well_exits_0(daemon: Daemon) -> None:
    assert _run("status", "--run-dir", str(daemon({"status": {"ready": True}}))).exit_code == 0


def test_status_as_json_is_the_answer_itself(daemon: Daemon) -> None:
    result = _run("status", "--output", "json", "--run-dir", str(daemon({"status": {"ready": False, "new": [1]}})))
    assert json.loads(result.stdout) == {"ready": False, "new": [1]}
    assert result.exit_code == 1


def test_endpoints_shows_a_row_for_each_pod(daemon: Daemon) -> None:
    result = _run("endpoints", "--run-dir", str(daemon({"endpoints": [ENDPOINT, {"pod": "x/bare"}]})))
    assert result.exit_code == 0
    for text in ("shop/web", "10.244.1.2", "ingress", "shop/default-deny", "700 of 1300 bytes", "app=web", "x/bare"):
        assert text in result.stdout
    assert "unidentified-peer" not in result.stdout


def test_endpoints_of_one_pod_shows_its_denials(daemon: Daemon) -> None:
    result = _run("endpoints", "shop/web", "--run-dir", str(daemon({"endpoints": [ENDPOINT]})))
    for text in ("1970-01-01T00:00:00.000+00:00", "203.0.113.9", "unidentified-peer"):
        assert text in result.stdout


@pytest.mark.parametrize("columns", ["80", "200"])
def test_nothing_is_cut_off_on_a_narrow_console(daemon: Daemon, columns: str) -> None:
    denial = {
        **ENDPOINT["recent_denials"][0],
        "when": "2026-01-02T03:04:05.678901+00:00",
        "protocol": 17,
        "detail": "why so",
    }
    run_dir = daemon({"endpoints": [{**ENDPOINT, "recent_denials": [denial]}]})
    result = CliRunner().invoke(main, ["endpoints", "shop/web", "--run-dir", str(run_dir)], env={"COLUMNS": columns})
    for text in (
        *("10.244.1.2", "enforced", "700 of 1300 bytes", "app=web"),
        *("2026-01-02T03:04:05.678+00:00", "203.0.113.9", "UDP 80", "unidentified-peer: why so", "shop/default-deny"),
    ):
        assert text in result.stdout
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= int(columns)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"snapshot": {"problems": ["x.yaml:1: spec: unknown field"]}}, 0),
        ({"key_problems": ["the certificate has expired"]}, 1),
        ({"guard": {"problem": "gone"}}, 1),
        ({"ready": False}, 1),
    ],
)
def test_a_refused_object_does_not_make_a_node_unready(
    daemon: Daemon, status: dict[str, object], expected: int
) -> None:
    run_dir = daemon({"status": {"ready": True, **status}})
    assert _run("status", "--ignore-objects", "--run-dir", str(run_dir)).exit_code == expected


def test_a_pod_without_denials_sends_people_to_the_other_end(daemon: Daemon) -> None:
    run_dir = daemon({"endpoints": [{**ENDPOINT, "recent_denials": []}]})
    assert "known on its node" in _run("endpoints", "shop/web", "--run-dir", str(run_dir)).stdout


def test_a_pod_is_named_with_its_namespace(tmp_path: Path) -> None:
    result = _run("endpoints", "web", "--run-dir", str(tmp_path))
    assert (result.exit_code, "POD: must be NAMESPACE/NAME" in result.stderr) == (2, True)


def test_a_node_without_pods_says_so(daemon: Daemon) -> None:
    result = _run("endpoints", "--run-dir", str(daemon({"endpoints": []})))
    assert (result.exit_code, result.stdout) == (0, "no pods are enforced on this node\n")


def test_a_problem_stays_on_one_line(daemon: Daemon) -> None:
    problem = "x.yaml:1: spec: " + "very " * 40 + "wrong"
    run_dir = daemon({"status": {"ready": True, "snapshot": {"problems": [problem]}}})
    assert f"problem: {problem}" in _run("status", "--run-dir", str(run_dir)).stdout.splitlines()


def test_endpoints_of_an_unknown_pod_is_an_error(daemon: Daemon) -> None:
    result = _run("endpoints", "shop/none", "--run-dir", str(daemon({"endpoints": [ENDPOINT]})))
    assert result.exit_code == 1
    assert "shop/none: not among the pods that this node enforces" in result.stderr


def test_no_daemon_is_said_in_words(tmp_path: Path) -> None:
    result = _run("status", "--run-dir", str(tmp_path))
    assert result.exit_code == 1
    assert "Is the enforcer running" in result.stderr


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_is_explained(reason: Reason) -> None:
    assert _run("reasons", reason.value).stdout.strip() == reason.text


def test_reasons_lists_them_all() -> None:
    assert set(json.loads(_run("reasons", "--output", "json").stdout)) == {reason.value for reason in Reason}
    assert _run("reasons", "mood").exit_code == 1


def test_every_subcommand_loads() -> None:
    for name in ("status", "endpoints", "reasons", "simulate", "validate", "lab"):
        assert _run(name, "--help").exit_code == 0


def test_a_denied_node_is_trusted_again(daemon: Daemon) -> None:
    result = _run("node", "trust", "--run-dir", str(daemon({"trust": {"trusted": "b"}})), "b")
    assert (result.exit_code, result.stdout) == (0, "node b is trusted again\n")
    assert _run("release", "b").exit_code == 2


def test_metrics_are_printed_as_they_are(daemon: Daemon) -> None:
    result = _run("metrics", "--run-dir", str(daemon({"metrics": "trireme_endpoints 1.0\n"})))
    assert (result.stdout, result.exit_code) == ("trireme_endpoints 1.0\n", 0)


def test_endpoints_tells_pods_without_labels_from_pods_of_which_none_are_known(daemon: Daemon) -> None:
    pods = [{"pod": "x/bare", "are_labels_known": True}, {"pod": "x/unknown", "are_labels_known": False}]
    result = _run("endpoints", "--run-dir", str(daemon({"endpoints": pods})))
    bare, unknown = (next(line for line in result.stdout.splitlines() if name in line) for name in ("bare", "unknown"))
    assert "not known" in unknown
    assert "not known" not in bare


@pytest.mark.parametrize(
    ("peer", "shown"),
    [
        ("x/\x1b[2J\x1b]0;owned\x07", r"x/\x1b[2J\x1b]0;owned\x07"),
        ("x/[/b] [red]", "x/[/b] [red]"),
        ("x/one\ntwo", r"x/one\ntwo"),
        ("x/\u202eneves", r"x/\u202eneves"),
        ("x/é", "x/é"),
    ],
)
def test_a_peers_name_does_not_steer_the_terminal(daemon: Daemon, peer: str, shown: str) -> None:
    denials = [{"when": 0, "direction": "ingress", "peer": peer, "reason": "ingress-denied"}]
    run_dir = daemon({"endpoints": [{**ENDPOINT, "recent_denials": denials}]})
    result = _run("endpoints", "--denials", "--run-dir", str(run_dir))
    assert result.exit_code == 0
    assert f" {shown} " in result.output
