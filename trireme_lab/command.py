# SPDX-License-Identifier: Apache-2.0
"""`triremectl lab`: run a scenario in a lab of its own, and clean up after labs that were killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

import click
from rich.console import Console

from trireme_lab.check.command import PROBED_PROTOCOLS, check, load_cases
from trireme_lab.errors import LabError
from trireme_lab.lab import Lab
from trireme_lab.report import print_refused, print_step, summary
from trireme_lab.rundir import clean_leftovers
from trireme_lab.runner import FlowResult, refused_objects, run_steps
from trireme_lab.scenario import Scenario, load_scenario
from trireme_lab.tools import Tools
from triremectl.admin_client import AdminError
from triremectl.output import make_console

_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GLANCE_S = 0.5
"""How long a kept world waits before it looks again whether it should end."""


@click.group("lab")
def command() -> None:
    """Try policies by real packets in a lab of its own (as root)."""


_plugin_option = click.option(
    "--plugin",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CNI plugin to run, a file named trireme. Default: the one installed beside this command.",
)


@command.command("run")
@click.argument("scenario")
@_plugin_option
@click.option("--keep", is_flag=True, help="Keep the lab after the last step, until Ctrl-C.")
@click.option("--verbose", is_flag=True, help="Print how long things take, and the daemons' logs.")
def run_command(scenario: str, plugin: Path | None, *, keep: bool, verbose: bool) -> None:
    """Run a story of flows and changes.

    SCENARIO is a file, or the name of a shipped one (demo). Exit status 0: all flows went as expected, and no object
    was refused.
    """
    _require_root()
    tools = _tools(plugin)
    with _ended_by_signals():
        try:
            story = load_scenario(scenario)
            results, refused = _run(story, replace(tools, probe_timeout_s=story.timeout_s), keep=keep, verbose=verbose)
        except (LabError, AdminError) as err:
            raise click.ClickException(str(err)) from err
    click.echo(summary(results, refused))
    sys.exit(0 if not refused and all(item.is_as_expected for item in results) else 1)


@command.command("check")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, allow_dash=True))
@click.option("--sample", "count", type=click.IntRange(min=1), help="Run only about this many cases.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which ones --sample chooses.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.05),
    default=1.0,
    show_default=True,
    help="How long a connection may take, in seconds; one that must be allowed has a second, longer try.",
)
@click.option(
    "--deny-with",
    type=click.Choice(["drop", "reset"]),
    default="reset",
    show_default=True,
    help="What denied connections see; with drop, each takes the whole timeout.",
)
@click.option(
    "--protocol",
    "protocols",
    type=click.Choice([protocol.name for protocol in PROBED_PROTOCOLS]),
    multiple=True,
    help="Try probes of this protocol alone; may be repeated. Default: all of them.",
)
@_plugin_option
@click.option("--verbose", is_flag=True, help="Say which lab is up, and when.")
def check_command(files: tuple[Path, ...], *, count: int | None, seed: int, timeout: float, deny_with: str,
                  protocols: tuple[str, ...], plugin: Path | None, verbose: bool) -> None:  # fmt: skip
    """Try the probes of cases by real connections.

    What comes of them is compared with what the cases expect. FILES hold one case a line, as for `simulate --check`
    (.gz is unpacked; - is standard input). Exit status 1 on any difference.
    """
    _require_root()
    tools = replace(_tools(plugin), probe_timeout_s=timeout)
    with _ended_by_signals():
        try:
            cases = load_cases(files, count, seed)
            chosen = [protocol for protocol in PROBED_PROTOCOLS if not protocols or protocol.name in protocols]
            score = check(cases, tools, deny_with, chosen, is_verbose=verbose)
        except (LabError, AdminError) as err:
            raise click.ClickException(str(err)) from err
    sys.exit(0 if score.is_passed else 1)


@command.command("clean")
def clean_command() -> None:
    """Remove what killed labs left behind. Labs that run are not touched."""
    _require_root()
    for name in clean_leftovers():
        click.echo(f"removed {name}")


def _tools(plugin: Path | None) -> Tools:
    if plugin is None:
        return Tools()
    if plugin.name != "trireme":
        raise click.BadParameter("the file must be named trireme, as CNI finds plugins by name", param_hint="--plugin")
    return Tools(plugin=plugin.resolve())


def _run(scenario: Scenario, tools: Tools, *, keep: bool, verbose: bool) -> tuple[list[FlowResult], list[str]]:
    """Return what came of all flows, and the objects that were refused."""
    console = make_console()
    results: list[FlowResult] = []
    started = time.monotonic()
    with Lab(scenario.spec, tools) as lab:
        if scenario.title:
            console.print(scenario.title)
        size = f"{len(lab.nodes)} nodes, {len(lab.pods)} pods, {'with' if scenario.spec.enforcer else 'no'} enforcers"
        console.print(f"{lab.name}: {size}, up after {time.monotonic() - started:.1f} s\n", style="dim")
        refused = list(refused_objects(lab))
        print_refused(console, refused)
        for number, result in enumerate(run_steps(lab, scenario.steps), 1):
            print_step(console, scenario, number, result)
            results += result.flows
            refused += result.refused
        if verbose or not all(item.is_as_expected for item in results):
            _print_logs(console, lab, whole=verbose)
        if verbose:
            console.print(f"{time.monotonic() - started:.1f} s", style="dim")
        if keep:
            _wait_in(console, lab)
    return results, refused


def _print_logs(console: Console, lab: Lab, *, whole: bool) -> None:
    for node in lab.nodes.values():
        if node.has_enforcer:
            console.print(f"\nlog of node {node.name}:", style="bold")
            console.print(node.log_text() if whole else node.daemon.tail(), markup=False, soft_wrap=True)


def _wait_in(console: Console, lab: Lab) -> None:
    console.print("\nThe lab stays until Ctrl-C. Its places:")
    for name, netns in lab.namespaces().items():
        console.print(f"  {name}: ip netns exec {netns} bash")
    for node in lab.nodes.values():
        console.print(f"  triremectl endpoints --run-dir {node.directories.run}   # node {node.name}")
    with suppress(KeyboardInterrupt):
        while True:  # A signal that comes just before the wait would not end a pause().
            time.sleep(_GLANCE_S)


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
