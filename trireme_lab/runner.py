# SPDX-License-Identifier: Apache-2.0
"""Runs a scenario's steps in a lab and compares what happened with what was expected."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from trireme_lab.errors import LabError
from trireme_lab.lab import Lab
from trireme_lab.probe import Probe, ProbeResult
from trireme_lab.scenario import Flow, Step, in_step
from trireme_lab.why import Denial, find_denial

CONVERGENCE_S = 10.0
"""How long a flow may disagree after a change, seconds: what the Kubernetes end-to-end suite allows."""
_RETRY_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class FlowResult:
    """A flow, what came of it, and why."""

    flow: Flow
    probe: Probe
    result: ProbeResult
    tries: int
    denial: Denial | None
    """What an enforcer said about a denied flow; None: nobody said anything."""

    @property
    def is_as_expected(self) -> bool:
        return _agrees(self.flow, self.result) and self._has_expected_reason

    @property
    def _has_expected_reason(self) -> bool:
        if self.flow.reason is None:
            return True
        return self.denial is not None and self.denial.reason == self.flow.reason.value


class StepResult(NamedTuple):
    """What a step led to."""

    step: Step
    flows: list[FlowResult]
    refused: tuple[str, ...] = ()
    """Objects that the enforcers refuse since this step, each with the field and the reason."""


def run_steps(lab: Lab, steps: Sequence[Step]) -> Iterator[StepResult]:
    """Run the steps in order; yield each with its results as soon as they are known. A LabError names the step."""
    refused = refused_objects(lab)
    for number, step in enumerate(steps, 1):
        before = refused
        try:
            is_changed = _change(lab, step)
            refused = refused_objects(lab)
            new = tuple(problem for problem in refused if problem not in before)
            # Nothing follows a change of policy where there are no enforcers, or where they refuse it.
            is_patient = is_changed and lab.spec.enforcer and not new
            flows = _run_flows(lab, step.flows, CONVERGENCE_S if is_patient else 0.0)
        except LabError as err:
            raise LabError(f"{err}{in_step(number, step.title)}") from err
        yield StepResult(step, flows, new)


def refused_objects(lab: Lab) -> tuple[str, ...]:
    """Return the objects that enforcers refuse now, each once, with the field and the reason."""
    if not lab.spec.enforcer:
        return ()
    return tuple(dict.fromkeys(problem for node in lab.nodes.values() for problem in node.refused_objects()))


def _change(lab: Lab, step: Step) -> bool:
    if step.remove:
        lab.remove(*step.remove)
    if step.apply:
        lab.apply(*step.apply)
    for change in step.label_namespaces:
        lab.label_namespace(change.target, change.labels)
    for change in step.label_pods:
        lab.label(change.target, change.labels)
    return bool(step.remove or step.apply or step.label_namespaces or step.label_pods)


def _run_flows(lab: Lab, flows: Sequence[Flow], patience_s: float) -> list[FlowResult]:
    """Try all flows at once; after a change, those that disagree again until they agree or patience ends."""
    probes = [_probe_of(lab, flow) for flow in flows]
    results = lab.probe_all(probes)
    tries = [1] * len(flows)
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        wrong = [i for i, flow in enumerate(flows) if not _agrees(flow, results[i])]
        if not wrong:
            break
        time.sleep(_RETRY_PAUSE_S)
        for i, result in zip(wrong, lab.probe_all([probes[i] for i in wrong]), strict=True):
            results[i] = result
            tries[i] += 1
    return [
        FlowResult(flow, probe, result, count, find_denial(lab, flow, probe, result))
        for flow, probe, result, count in zip(flows, probes, results, tries, strict=True)
    ]


def _probe_of(lab: Lab, flow: Flow) -> Probe:
    return replace(lab.request(flow.source, flow.target, flow.port, flow.version), protocol=flow.protocol)


def _agrees(flow: Flow, result: ProbeResult) -> bool:
    return result.outcome.is_allowed if flow.is_allowed else result.outcome.is_denied
