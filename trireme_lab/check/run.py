# SPDX-License-Identifier: Apache-2.0
"""Runs cases in a lab: puts each in force, dials its probes all at once, and compares what came of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, replace

from enforcer_daemon.model import IPAddress, Protocol
from trireme_lab.check.dial import Dial, Unprobed, dial_of
from trireme_lab.check.objects import case_file, put_in_force
from trireme_lab.check.plan import Layout, SharedLab, spec_of
from trireme_lab.lab import Lab
from trireme_lab.probe import Probe as LabProbe
from trireme_lab.probe import ProbeResult
from trireme_lab.scenario import Flow
from trireme_lab.spec import PortSpec
from trireme_lab.tools import Tools
from trireme_lab.why import Denial, find_denial
from triremectl.cases import Case, Probe

PATIENT_TIMEOUT_S = 3.0
"""Of the second try of a connection that must be allowed: what the Kubernetes end-to-end suite allows."""

QUIET_S = 0.3
"""Of the first try of datagrams: what is let through is answered in milliseconds, at first contact in tens of them."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A probe of a case, and what came of it on the wire."""

    probe: Probe
    dial: Dial
    result: ProbeResult
    tries: int = 1
    denial: Denial | None = None
    """What an enforcer said of a connection that should have been allowed."""

    @property
    def is_as_expected(self) -> bool:
        outcome = self.result.outcome
        return outcome.is_allowed if self.probe.expected == "allow" else outcome.is_denied


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What came of a case."""

    case: Case
    attempts: tuple[Attempt, ...]
    unprobed: Counter[str]
    """How many probes were not tried, by the reason."""


def run_lab(
    shared: SharedLab, tools: Tools, deny_with: str, protocols: Collection[Protocol]
) -> Generator[CaseResult, None, None]:
    """Start a lab for the cases of one shared and run them in order; yield each result as soon as it is known."""
    with Lab(spec_of(shared.layout, deny_with), tools) as lab:
        runner = _CaseRunner(lab, shared.layout, protocols)
        for case in shared.cases:
            yield runner.run(case)


class _CaseRunner:
    def __init__(self, lab: Lab, layout: Layout, protocols: Collection[Protocol]) -> None:
        self._lab = lab
        self._layout = layout
        self._protocols = protocols
        self._listening: set[tuple[str, IPAddress, int, Protocol]] = set()
        self._turn = 0
        self._pods = {name: frozenset(spec.pod for spec in lab.spec.pods if spec.node == name) for name in lab.nodes}

    def run(self, case: Case) -> CaseResult:
        dials, unprobed = self._dials(case)
        self._turn += 1
        files = {name: case_file(case, pods, self._turn) for name, pods in self._pods.items()}
        put_in_force(files, self._lab.nodes)
        for _, dial in dials:
            self._listen(dial)
        return CaseResult(case, tuple(self._try_all(dials)), unprobed)

    def _dials(self, case: Case) -> tuple[list[tuple[Probe, Dial]], Counter[str]]:
        dials: list[tuple[Probe, Dial]] = []
        unprobed: Counter[str] = Counter()
        for probe in case.probes:
            if probe.expected is None:
                continue
            if probe.protocol not in self._protocols:
                unprobed[probe.protocol.name] += 1
                continue
            dial = dial_of(self._layout, case, probe)
            if isinstance(dial, Unprobed):
                unprobed[dial.value] += 1
            else:
                dials.append((probe, dial))
        return dials, unprobed

    def _listen(self, dial: Dial) -> None:
        end = dial.target, dial.address, dial.port, dial.protocol
        if end not in self._listening:
            self._lab.listen(dial.target, PortSpec(dial.port, dial.protocol), dial.address)
            self._listening.add(end)

    def _try_all(self, dials: Sequence[tuple[Probe, Dial]]) -> list[Attempt]:
        probes = [self._lab_probe(dial) for _, dial in dials]
        attempts = [
            Attempt(probe, dial, result)
            for (probe, dial), result in zip(dials, self._dial_all(probes, QUIET_S), strict=True)
        ]
        # A denial is final at once. What is allowed may have lost a packet to a short timeout.
        again = [i for i, a in enumerate(attempts) if a.probe.expected == "allow" and not a.is_as_expected]
        patient = [replace(probes[i], timeout_s=max(PATIENT_TIMEOUT_S, probes[i].timeout_s)) for i in again]
        for i, probe, result in zip(again, patient, self._dial_all(patient, PATIENT_TIMEOUT_S), strict=True):
            denial = find_denial(self._lab, _flow(attempts[i].dial), probe, result)
            attempts[i] = replace(attempts[i], result=result, tries=2, denial=denial)
        return attempts

    def _dial_all(self, probes: Sequence[LabProbe], quiet_s: float) -> list[ProbeResult]:
        """Try TCP and then UDP, so that the datagrams' short wait is not spent on connections."""
        tcp = iter(self._lab.probe_all([probe for probe in probes if probe.protocol is Protocol.TCP]))
        udp = iter(self._lab.ask_all([probe for probe in probes if probe.protocol is Protocol.UDP], quiet_s))
        return [next(tcp if probe.protocol is Protocol.TCP else udp) for probe in probes]

    def _lab_probe(self, dial: Dial) -> LabProbe:
        netns = self._lab.place(dial.source).netns
        timeout_s = self._lab.tools.probe_timeout_s
        return LabProbe(netns, dial.address, dial.port, dial.protocol, timeout_s, dial.source_address)


def _flow(dial: Dial) -> Flow:
    version = dial.address.version
    return Flow(dial.source, dial.target, dial.port, is_allowed=True, protocol=dial.protocol, version=version)
