# SPDX-License-Identifier: Apache-2.0
"""Running steps: what counts as expected, when a flow is tried again, and where the reason of a denial is found."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from enforcer_daemon.model import PodRef
from enforcer_daemon.reasons import Reason
from trireme_lab import runner
from trireme_lab.errors import LabError
from trireme_lab.lab import Lab
from trireme_lab.manifests import ObjectRef
from trireme_lab.probe import Outcome, Probe, ProbeResult
from trireme_lab.report import print_step, summary
from trireme_lab.runner import FlowResult, StepResult, run_steps
from trireme_lab.sandbox import Place
from trireme_lab.scenario import Flow, Scenario, Step
from trireme_lab.spec import LabSpec, NodeSpec, PodSpec, ServicePort, ServiceSpec

WEB = Place("x/web", "web", (ip_address("10.0.0.1"),))
DB = Place("x/db", "db", (ip_address("10.0.0.2"),))
WORLD = LabSpec(
    nodes=(NodeSpec.numbered("a", 1),),
    pods=(PodSpec(PodRef("x", "web"), "a"), PodSpec(PodRef("x", "db"), "a")),
    services=(ServiceSpec("x", "db", (ip_address("10.96.0.1"),), (PodRef("x", "db"),), (ServicePort(80, 5432),)),),
)
BAD_POLICY = {"kind": "NetworkPolicy", "metadata": {"namespace": "x", "name": "bad"}}
REFUSAL = "NetworkPolicy x/bad: spec: must not be bad (no version of it is in force)"
POLICY = {"kind": "NetworkPolicy", "metadata": {"namespace": "x", "name": "p"}}


class FakeLab:
    """A world whose probes end as told, one outcome a try, and whose daemon answers as told."""

    def __init__(self, outcomes: Sequence[Outcome], endpoints: Sequence[dict[str, Any]] = ()) -> None:
        self.spec = WORLD
        self.pods = {PodRef("x", "web"): SimpleNamespace(place=WEB), PodRef("x", "db"): SimpleNamespace(place=DB)}
        self.applied: list[object] = []
        self._outcomes = list(outcomes)
        self.refused: list[str] = []
        self._node = SimpleNamespace(
            has_enforcer=True, endpoints=lambda: endpoints, refused_objects=lambda: list(self.refused)
        )
        self.nodes = {"a": self._node, "b": self._node}

    def place(self, name: str) -> Place:
        return {"x/web": WEB, "x/db": DB}[name]

    def has_pod(self, name: str) -> bool:
        return name in ("x/web", "x/db")

    def pod_node(self, _name: str) -> SimpleNamespace:
        return self._node

    def request(self, source: str, target: str, port: int, version: int = 4) -> Probe:
        address = ip_address("10.96.0.1") if target.startswith("service:") else self.place(target).address(version)
        return Probe(self.place(source).netns, address, port)

    def probe_all(self, probes: Sequence[Probe]) -> list[ProbeResult]:
        return [ProbeResult(self._outcomes.pop(0), started=100.0) for _ in probes]

    def apply(self, *manifests: object) -> bool:
        self.applied += manifests
        if BAD_POLICY in manifests:
            self.refused = [REFUSAL]
        return True

    def remove(self, *_references: object) -> bool:
        raise LabError("no NetworkPolicy x/p to remove")


def _run(lab: FakeLab, step: Step) -> list[FlowResult]:
    (result,) = run_steps(cast(Lab, lab), [step])
    return result.flows


def _flow(*, is_allowed: bool, reason: Reason | None = None, target: str = "x/db", port: int = 5432) -> Flow:
    return Flow("x/web", target, port, is_allowed, reason)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_RETRY_PAUSE_S", 0.0)


@pytest.mark.parametrize(
    ("outcome", "as_allow", "as_deny"),
    [
        (Outcome.CONNECTED, True, False),
        (Outcome.REFUSED, False, True),
        (Outcome.TIMED_OUT, False, True),
        (Outcome.RESET, False, True),
        (Outcome.SILENT, False, False),
        (Outcome.UNREACHABLE, False, False),
    ],
)
def test_what_counts_as_expected(outcome: Outcome, as_allow: bool, as_deny: bool) -> None:
    flows = (_flow(is_allowed=True), _flow(is_allowed=False))
    results = _run(FakeLab([outcome, outcome]), Step(flows=flows))
    assert [item.is_as_expected for item in results] == [as_allow, as_deny]


def test_without_a_change_a_flow_has_one_try() -> None:
    (result,) = _run(FakeLab([Outcome.TIMED_OUT, Outcome.CONNECTED]), Step(flows=(_flow(is_allowed=True),)))
    assert (result.result.outcome, result.tries) == (Outcome.TIMED_OUT, 1)


def test_after_a_change_only_what_disagrees_is_tried_again() -> None:
    lab = FakeLab([Outcome.CONNECTED, Outcome.CONNECTED, Outcome.CONNECTED, Outcome.TIMED_OUT])
    flows = (_flow(is_allowed=True), _flow(is_allowed=False))
    results = _run(lab, Step(apply=(POLICY,), flows=flows))
    assert lab.applied == [POLICY]
    assert [(item.result.outcome, item.tries) for item in results] == [
        (Outcome.CONNECTED, 1),
        (Outcome.TIMED_OUT, 3),
    ]


def _denial(direction: str, address: str, port: int, when: object = 101.0, protocol: int = 6) -> dict[str, Any]:
    facts = {"direction": direction, "address": address, "port": port, "when": when, "protocol": protocol}
    return facts | {"reason": f"{direction}-denied", "rules": ["x/p"]}


@pytest.mark.parametrize(
    ("endpoint", "denial", "found_at"),
    [
        ("web", _denial("egress", "10.0.0.2", 5432), "x/web"),
        ("web", _denial("egress", "10.96.0.1", 80), "x/web"),
        ("db", _denial("ingress", "10.0.0.1", 5432), "x/db"),
        ("db", _denial("ingress", "10.0.0.1", 5432, "1970-01-01T00:01:41+00:00"), "x/db"),
        ("db", _denial("ingress", "10.0.0.1", 5432, 99.0), None),  # of an earlier attempt
        ("db", _denial("ingress", "10.0.0.1", 9090), None),  # of another port
        ("db", _denial("ingress", "10.0.0.9", 5432), None),  # of another peer
        ("db", _denial("ingress", "10.0.0.1", 5432, protocol=17), None),  # of another protocol
        ("web", _denial("ingress", "10.0.0.2", 5432), None),  # of the other direction
    ],
)
def test_the_reason_is_found_at_the_end_that_denied(
    endpoint: str, denial: dict[str, Any], found_at: str | None
) -> None:
    lab = FakeLab([Outcome.TIMED_OUT], [{"namespace": "x", "pod": endpoint, "recent_denials": [denial]}])
    (result,) = _run(lab, Step(flows=(_flow(is_allowed=False, target="service:x/db", port=80),)))
    assert (result.denial.pod if result.denial else None) == found_at
    if result.denial:
        assert (result.denial.reason, result.denial.rules) == (denial["reason"], ("x/p",))


def test_a_denial_for_another_reason_is_not_as_expected() -> None:
    endpoints = [{"pod": "x/db", "recent_denials": [_denial("ingress", "10.0.0.1", 5432)]}]
    for reason, is_expected in ((Reason.INGRESS_DENIED, True), (Reason.UNIDENTIFIED_PEER, False)):
        (result,) = _run(FakeLab([Outcome.TIMED_OUT], endpoints), Step(flows=(_flow(is_allowed=False, reason=reason),)))
        assert result.is_as_expected is is_expected


def test_the_report_names_flow_result_and_reason_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    endpoints = [{"pod": "x/db", "recent_denials": [_denial("ingress", "10.0.0.1", 5432)]}]
    step = Step("a step", apply=(POLICY,), flows=(_flow(is_allowed=False), _flow(is_allowed=True)))
    results = _run(FakeLab([Outcome.TIMED_OUT, Outcome.CONNECTED], endpoints), step)
    for width in (150, 80):
        print_step(Console(width=width), Scenario("", WORLD, (step,)), 1, StepResult(step, results))
        printed = capsys.readouterr().out
        for text in ("1. a step", "applied NetworkPolicy x/p", "x/db:5432", "denied at x/db by x/p", "connected"):
            assert text in printed
        assert max(map(len, printed.splitlines())) <= width
    assert summary(results) == "2 of 2 flows as expected"


def test_a_refused_policy_is_said_with_its_reason_and_nothing_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    lab = FakeLab([Outcome.CONNECTED, Outcome.CONNECTED])
    flows = (_flow(is_allowed=False),)
    steps = (Step(apply=(POLICY, BAD_POLICY), flows=flows), Step("later", flows=flows))
    first, later = run_steps(cast(Lab, lab), steps)
    assert first.refused == (REFUSAL,)
    assert [item.tries for item in first.flows] == [1]
    assert later.refused == ()
    print_step(Console(width=200), Scenario("", WORLD, steps), 1, first)
    printed = capsys.readouterr().out
    assert f"refused {REFUSAL}" in printed
    assert "applied NetworkPolicy x/p" in printed
    assert "applied NetworkPolicy x/bad" not in printed
    assert summary(first.flows, first.refused) == "0 of 1 flows as expected, 1 object refused"


def test_a_port_that_is_closed_is_not_taken_for_a_denial(capsys: pytest.CaptureFixture[str]) -> None:
    step = Step(flows=(_flow(is_allowed=False),))
    results = _run(FakeLab([Outcome.REFUSED]), step)
    print_step(Console(width=150), Scenario("", WORLD, (step,)), 1, StepResult(step, results))
    assert "no enforcer denied it; does anything listen there?" in capsys.readouterr().out


def test_what_fails_in_a_step_names_it() -> None:
    step = Step("take it away", remove=(ObjectRef("NetworkPolicy", "x", "p"),))
    with pytest.raises(LabError, match=r"no NetworkPolicy x/p to remove \(in step 1: take it away\)"):
        _run(FakeLab([]), step)
