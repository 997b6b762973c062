# SPDX-License-Identifier: Apache-2.0
"""`triremectl status`: is this node's daemon well, and what does it enforce."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from triremectl.output import as_list, as_mapping, as_text, ask, daemon_options, make_console, print_json

_LATER = ("snapshot", "drops", "bundle", "key_problems", "setting_warnings", "closed_endpoints", "unenforced_pods")
"""Keys that get rows or tables of their own."""


@click.command("status")
@click.option("--ignore-objects", is_flag=True, help="Refused objects do not count in the exit status (for probes).")
@daemon_options
def command(run_dir: Path, output: str, *, ignore_objects: bool) -> None:
    """Show the daemon's state.

    Exit status 1 when it is not ready, refuses an object or a key, or its guard is not in place.
    """
    status = as_mapping(ask(run_dir, "status"))
    if output == "json":
        print_json(status)
    else:
        print_status(make_console(), status)
    problems = _node_problems(status) if ignore_objects else _problems(status)
    sys.exit(0 if status.get("ready") is True and not problems else 1)


def _problems(status: Mapping[str, object]) -> list[object]:
    """Return what somebody should mend: refused objects, pods closed or not enforced, and faults of the node."""
    refused = as_list(as_mapping(status.get("snapshot")).get("problems"))
    closed = [f"pod {pod} is closed: {why}" for pod, why in as_mapping(status.get("closed_endpoints")).items()]
    passed = as_list(as_mapping(status.get("unenforced_pods")).get("past"))
    unenforced = [f"pod {pod} is not enforced: it started, and its runtime did not call the plugin" for pod in passed]
    return [*refused, *closed, *unenforced, *_node_problems(status)]


def _node_problems(status: Mapping[str, object]) -> list[object]:
    """Return what an operator should mend on the node: keys, and what the guard cannot do."""
    guard = as_mapping(status.get("guard")).get("problem")
    return [*as_list(status.get("key_problems")), *([guard] if guard else [])]


def print_status(console: Console, status: Mapping[str, object]) -> None:
    """Print every key that the daemon answered, the ones that people look for first."""
    snapshot = as_mapping(status.get("snapshot"))
    rows = {key.replace("_", " "): value for key, value in status.items() if key not in _LATER}
    rows |= {f"snapshot {key}": value for key, value in snapshot.items() if key != "problems"}
    facts = Table(box=None, show_header=False, pad_edge=False)
    for key, value in rows.items():
        text = Text(as_text(value))
        if key == "ready":
            text.stylize("green" if value is True else "bold red")
        facts.add_row(Text(key, style="bold"), text)
    console.print(facts)
    authorities = [as_mapping(authority) for authority in as_list(status.get("bundle"))]
    if authorities:
        table = Table("trusted authority", "trust domain", "not after")
        for authority in authorities:
            table.add_row(*(Text(as_text(authority.get(key))) for key in ("subject", "trust_domain", "not_after")))
        console.print(table)
    drops = {reason: count for reason, count in as_mapping(status.get("drops")).items() if count}
    if drops:
        table = Table("dropped because of", "packets")
        for reason, count in sorted(drops.items()):
            table.add_row(reason, as_text(count))
        console.print(table)
    earlier = as_list(as_mapping(status.get("unenforced_pods")).get("before"))
    if earlier:
        named = ", ".join(map(as_text, earlier))
        console.print(Text(f"warning: not enforced before they are restarted: {named}", style="yellow"), soft_wrap=True)
    warnings = [*as_list(status.get("setting_warnings")), *as_list(as_mapping(status.get("cluster")).get("warnings"))]
    for warning in warnings:
        console.print(Text(f"warning: {as_text(warning)}", style="yellow"), soft_wrap=True)
    for problem in _problems(status):
        console.print(Text(f"problem: {as_text(problem)}", style="bold red"), soft_wrap=True)
