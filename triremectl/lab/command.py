# SPDX-License-Identifier: Apache-2.0
"""`triremectl lab`: run a scenario in a world of its own, and clean up after labs that were killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import click
from rich.console import Console

from triremectl.admin_client import AdminError
from triremectl.lab.errors import LabError
from triremectl.lab.lab import Lab
from triremectl.lab.report import print_step, summary
from triremectl.lab.rundir import clean_leftovers
from triremectl.lab.runner import FlowResult, run_steps
from triremectl.lab.scenario import Scenario, load_scenario
from triremectl.lab.tools import Tools
from triremectl.output import make_console

_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.group("lab")
def command() -> None:
    """Try policies in a small world of network namespaces on this machine (as root)."""


@command.command("run")
@click.argument("scenario")
@click.option(
    "--plugin",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CNI plugin to run, a file named trireme. Default: the one installed beside this command.",
)
@click.option("--keep", is_flag=True, help="Keep the world after the last step, until Ctrl-C.")
@click.option("--verbose", is_flag=True, help="Print how long things take, and the daemons' logs.")
def run_command(scenario: str, plugin: Path | None, *, keep: bool, verbose: bool) -> None:
    """Run SCENARIO, a file or the name of a shipped one (demo), and say whether its flows went as expected."""
    _require_root()
    if plugin is not None and plugin.name != "trireme":
        raise click.BadParameter("the file must be named trireme, as CNI finds plugins by name", param_hint="--plugin")
    with _ended_by_signals():
        try:
            story = load_scenario(scenario)
            tools = Tools(probe_timeout_s=story.timeout_s)
            tools = tools if plugin is None else replace(tools, plugin=plugin.resolve())
            results = _run(story, tools, keep=keep, verbose=verbose)
        except (LabError, AdminError) as err:
            raise click.ClickException(str(err)) from err
    click.echo(summary(results))
    sys.exit(0 if all(item.is_as_expected for item in results) else 1)


@command.command("clean")
def clean_command() -> None:
    """Remove what labs left behind that were killed; labs that run are not touched."""
    _require_root()
    for name in clean_leftovers():
        click.echo(f"removed {name}")


def _run(scenario: Scenario, tools: Tools, *, keep: bool, verbose: bool) -> list[FlowResult]:
    console = make_console()
    results: list[FlowResult] = []
    started = time.monotonic()
    with Lab(scenario.world, tools) as lab:
        if scenario.title:
            console.print(scenario.title)
        world = f"{len(lab.nodes)} nodes, {len(lab.pods)} pods, {'with' if scenario.world.enforcer else 'no'} enforcers"
        console.print(f"[dim]{lab.name}: {world}, up after {time.monotonic() - started:.1f} s[/dim]\n")
        for number, (step, outcomes) in enumerate(run_steps(lab, scenario.steps), 1):
            print_step(console, scenario, number, step, outcomes)
            results += outcomes
        if verbose or not all(item.is_as_expected for item in results):
            _print_logs(console, lab, whole=verbose)
        if verbose:
            console.print(f"[dim]{time.monotonic() - started:.1f} s[/dim]")
        if keep:
            _wait_in(console, lab)
    return results


def _print_logs(console: Console, lab: Lab, *, whole: bool) -> None:
    for node in lab.nodes.values():
        if node.has_enforcer:
            console.print(f"\nlog of node {node.name}:", style="bold")
            console.print(node.log_text() if whole else node.daemon.tail(), markup=False, soft_wrap=True)


def _wait_in(console: Console, lab: Lab) -> None:
    console.print("\nThe world stays until Ctrl-C. Its places:")
    for name, netns in lab.namespaces().items():
        console.print(f"  {name}: ip netns exec {netns} bash")
    for node in lab.nodes.values():
        console.print(f"  triremectl --run-dir {node.directories.run} endpoints   # node {node.name}")
    try:
        signal.pause()
    except KeyboardInterrupt:
        return


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP unwind the lab, once: a second one does not disturb the clean-up."""
    received: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        if not received:
            received.append(number)
            raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in _ENDING_SIGNALS}
    try:
        yield
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(128 + (received[0] if received else signal.SIGINT))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _require_root() -> None:
    if os.geteuid() != 0:
        raise click.ClickException("must be root: the lab makes network namespaces")
