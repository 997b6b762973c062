# SPDX-License-Identifier: Apache-2.0
"""What a check of cases says: each difference with its explanation, and at the end what was counted. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from enforcer_daemon.model import Protocol
from trireme_lab.check.run import Attempt, CaseResult
from triremectl.cases import Case
from triremectl.simulate import in_words

_PROTOCOLS = tuple(protocol.name for protocol in Protocol)


@dataclass(slots=True)
class Score:
    """Counts of all cases so far."""

    cases: int = 0
    probes: int = 0
    right: int = 0
    retried: int = 0
    unprobed: Counter[str] = field(default_factory=Counter)

    @property
    def is_passed(self) -> bool:
        """Return whether there were probes, and all as expected."""
        return self.right == self.probes > 0

    def add(self, result: CaseResult) -> list[str]:
        """Count a case; return the lines that tell its differences."""
        self.cases += 1
        self.unprobed += result.unprobed
        lines: list[str] = []
        for attempt in result.attempts:
            self.probes += 1
            self.right += attempt.is_as_expected
            self.retried += attempt.tries > 1 and attempt.is_as_expected
            if not attempt.is_as_expected:
                lines += difference(result.case, attempt)
        return lines

    def summary(self) -> list[str]:
        """Return the last lines of a check."""
        unprobed = Counter(self.unprobed)
        protocols = [f"{count} {name}" for name in _PROTOCOLS if (count := unprobed.pop(name, 0))]
        lines = [f"{' and '.join(protocols)} probes not probed"] if protocols else []
        lines += [f"{count} probes not probed: {reason}" for reason, count in sorted(unprobed.items())]
        lines += [f"{self.retried} allowed probes took a second try"] if self.retried else []
        return [*lines, f"{self.right} of {self.probes} probes as expected ({self.cases} cases)"]


def difference(case: Case, attempt: Attempt) -> list[str]:
    """Return what was expected and what happened, what the policies say, and what an enforcer said."""
    probe = attempt.probe
    expected = f"{probe.expected} (by {probe.denied_by})" if probe.denied_by else probe.expected
    lines = [f"{case.name}: {probe}: expected {expected}, found {attempt.result.outcome.value}"]
    lines += [f"  {line}" for line in in_words(probe, case.cluster.evaluate(probe, explain=True))]
    if attempt.denial is not None:
        rules = f" by {', '.join(attempt.denial.rules)}" if attempt.denial.rules else ""
        lines.append(
            f"  the enforcer of {attempt.denial.pod}: {attempt.denial.reason} ({attempt.denial.direction}){rules}"
        )
    return lines
