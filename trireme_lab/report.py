# SPDX-License-Identifier: Apache-2.0
"""What a run of a scenario looks like to people: one table a step, and a last line that counts."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from enforcer_daemon.model import Protocol
from trireme_lab.probe import Outcome
from trireme_lab.runner import FlowResult, StepResult
from trireme_lab.scenario import Flow, Scenario, Step
from triremectl.output import WIDE_COLUMNS, printable


def print_step(console: Console, scenario: Scenario, number: int, result: StepResult) -> None:
    """Print what a step changed and what became of its flows."""
    console.print(Text(f"{number}. {result.step.title or 'step'}", style="bold"))
    for change in _changes(result.step, result.refused):
        console.print(Text(f"   {change}", style="cyan"))
    print_refused(console, result.refused)
    if result.flows:
        if console.width >= WIDE_COLUMNS:
            console.print(_table(scenario, result.flows))
        else:
            _print_lines(console, scenario, result.flows)
    console.print()


def print_refused(console: Console, refused: Sequence[str]) -> None:
    """Print the objects that the enforcers refuse, with the reasons."""
    for problem in refused:
        console.print(Text(f"   refused {printable(problem)}", style="bold red"), soft_wrap=True)


def _changes(step: Step, refused: Sequence[str]) -> list[str]:
    """Return what the step changed; what was refused changed nothing."""
    lines = [f"removed {ref.kind} {ref.namespace}/{ref.name}" for ref in step.remove]
    for manifest in step.apply:
        metadata = manifest["metadata"]
        assert isinstance(metadata, dict)  # noqa: S101 - the scenario was decoded
        namespace = metadata.get("namespace")
        name = f"{manifest['kind']} {namespace + '/' if namespace else ''}{metadata['name']}"
        if not any(problem.startswith(f"{name}: ") for problem in refused):
            lines.append(f"applied {name}")
    for change in (*step.label_namespaces, *step.label_pods):
        text = ", ".join(f"{key}={value}" for key, value in change.labels.items()) or "none"
        lines.append(f"labeled {change.target}: {text}")
    return lines


def _table(scenario: Scenario, results: Sequence[FlowResult]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=True, show_edge=False)
    flows = [flow for step in scenario.steps for flow in step.flows]
    table.add_column("", width=1)
    table.add_column("from", min_width=max(len(flow.source) for flow in flows))
    table.add_column("to", min_width=max(len(_target(flow)) for flow in flows))
    table.add_column("expected", min_width=8)
    table.add_column("got", min_width=len(Outcome.TIMED_OUT.value))
    table.add_column("why", overflow="fold")
    for item in results:
        style = "green" if item.is_as_expected else "bold red"
        mark = "✓" if item.is_as_expected else "✗"
        table.add_row(
            Text(mark, style=style),
            item.flow.source,
            _target(item.flow),
            "allow" if item.flow.is_allowed else "deny",
            Text(_got(item), style="" if item.is_as_expected else style),
            Text(_why(item, scenario), style="dim" if item.is_as_expected else style),
        )
    return table


def _print_lines(console: Console, scenario: Scenario, results: Sequence[FlowResult]) -> None:
    """Print the same as the table does, a flow a line."""
    flows = [flow for step in scenario.steps for flow in step.flows]
    sources, targets = max(len(flow.source) for flow in flows), max(len(_target(flow)) for flow in flows)
    for item in results:
        style = "green" if item.is_as_expected else "bold red"
        line = Text(" ").append("✓" if item.is_as_expected else "✗", style=style)
        line.append(f" {item.flow.source:<{sources}} {_target(item.flow):<{targets}} ")
        line.append(f"{'allow' if item.flow.is_allowed else 'deny':<5} ")
        console.print(line.append(_got(item), style="" if item.is_as_expected else style), soft_wrap=True)
        if why := _why(item, scenario):
            console.print(Padding(Text(why, style="dim" if item.is_as_expected else style), (0, 0, 0, 5), expand=False))


def _target(flow: Flow) -> str:
    address = f"[{flow.target}]" if flow.target.count(":") > 1 else flow.target
    extras = ["UDP"] if flow.protocol is Protocol.UDP else []
    extras += ["IPv6"] if flow.version == 6 else []
    return f"{address}:{flow.port}" + (f" {' '.join(extras)}" if extras else "")


def _got(item: FlowResult) -> str:
    tries = f" (try {item.tries})" if item.tries > 1 else ""
    return item.result.outcome.value + tries


def _why(item: FlowResult, scenario: Scenario) -> str:
    if item.denial is None:
        if scenario.spec.enforcer and item.result.outcome.is_denied:
            doubt = "; does anything listen there?" if item.result.outcome is Outcome.REFUSED else ""
            return f"no enforcer denied it{doubt}"
        answered = item.result.banner
        return f"answered by {answered}" if answered and answered != item.flow.target else ""
    rules = f" by {', '.join(item.denial.rules)}" if item.denial.rules else ""
    missing = ""
    if item.flow.reason is not None and item.denial.reason != item.flow.reason.value:
        missing = f"; expected {item.flow.reason.value}"
    return f"{item.denial.reason} at {item.denial.pod}{rules}{missing}"


def summary(results: Sequence[FlowResult], refused: Sequence[str] = ()) -> str:
    """Return the last line of a run."""
    line = f"{sum(item.is_as_expected for item in results)} of {len(results)} flows as expected"
    return f"{line}, {len(refused)} {'object' if len(refused) == 1 else 'objects'} refused" if refused else line
