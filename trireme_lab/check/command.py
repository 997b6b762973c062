# SPDX-License-Identifier: Apache-2.0
"""`triremectl lab check`: cases with the verdicts expected of them, tried by real connections."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path

import click

from enforcer_daemon.model import Protocol
from trireme_lab.check.plan import sample, share_labs
from trireme_lab.check.run import run_lab
from trireme_lab.check.score import Score
from trireme_lab.errors import ScenarioError
from trireme_lab.tools import Tools
from triremectl.cases import Case
from triremectl.simulate import read_cases

PROBED_PROTOCOLS = (Protocol.TCP, Protocol.UDP)


def load_cases(files: Sequence[Path], count: int | None, seed: int) -> list[Case]:
    """Read the cases, or a sample of them; raise ScenarioError if a probe's ends are unknown."""
    cases = list(read_cases(files))
    chosen = cases if count is None else sample(cases, count, seed)
    for case in chosen:
        for probe in case.probes:
            try:
                case.cluster.evaluate(probe)
            except ValueError as err:
                raise ScenarioError(f"{case.name}: {probe}: {err}") from err
    return chosen


def check(
    cases: Sequence[Case],
    tools: Tools,
    deny_with: str,
    protocols: Collection[Protocol] = PROBED_PROTOCOLS,
    *,
    is_verbose: bool = False,
) -> Score:
    """Run the cases, printing each difference as soon as it is known, then the counts."""
    score = Score()
    started = time.monotonic()
    for number, shared in enumerate(share_labs(cases), 1):
        if is_verbose:
            places = f"{len(shared.layout.pods)} pods, {len(shared.cases)} cases"
            click.echo(f"shared {number} ({places}) after {time.monotonic() - started:.1f} s", err=True)
        with closing(run_lab(shared, tools, deny_with, protocols)) as results:  # the lab ends here, whatever happens
            for result in results:
                for line in score.add(result):
                    click.echo(line)
    for line in score.summary():
        click.echo(line)
    return score
