# SPDX-License-Identifier: Apache-2.0
"""`triremectl endpoints`: the pods that this node's daemon enforces, and whom they refused lately."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from triremectl.output import as_list, as_mapping, as_text, ask, daemon_options, make_console, print_json


@click.command("endpoints")
@click.argument("pod", required=False)
@click.option("--denials", is_flag=True, help="Also show the recent denials of each pod.")
@daemon_options
def command(run_dir: Path, output: str, pod: str | None, *, denials: bool) -> None:
    """Show the enforced pods of this node; with POD (NAMESPACE/NAME), that one alone, with its denials."""
    endpoints = [as_mapping(item) for item in as_list(ask(run_dir, "endpoints"))]
    if pod is not None:
        endpoints = [endpoint for endpoint in endpoints if pod_name(endpoint) == pod]
        if not endpoints:
            raise click.ClickException(f"{pod}: not among the pods that this node enforces")
    if output == "json":
        print_json(endpoints)
        return
    console = make_console()
    print_endpoints(console, endpoints)
    if denials or pod is not None:
        print_denials(console, endpoints)


def pod_name(endpoint: Mapping[str, object]) -> str:
    """Return NAMESPACE/NAME of an endpoint's pod."""
    name = as_text(endpoint.get("pod"))
    return name if "/" in name else f"{as_text(endpoint.get('namespace'))}/{name}"


def print_endpoints(console: Console, endpoints: Iterable[Mapping[str, object]]) -> None:
    """Print one row an endpoint."""
    table = Table("pod", "interface", "addresses", "state", "isolated", "policies", "identity", "labels")
    for endpoint in sorted(endpoints, key=pod_name):
        state, problem = as_text(endpoint.get("state")), endpoint.get("problem")
        table.add_row(
            pod_name(endpoint),
            as_text(endpoint.get("ifname")),
            "\n".join(map(as_text, as_list(endpoint.get("ips")))) or "-",
            _state(state, problem, endpoint.get("guard")),
            _isolated(as_mapping(endpoint.get("isolated"))),
            "\n".join(map(as_text, as_list(endpoint.get("policies")))) or "-",
            _identity_size(endpoint),
            _labels(endpoint),
        )
    console.print(table)


def _state(state: str, problem: object, guard: object) -> Text:
    """Say how the pod is enforced, and what the guard on the node cannot see of it."""
    text = Text(f"{state}: {problem}" if problem else state, style="" if state in ("-", "enforced") else "bold red")
    return text.append(f"\nguard: {guard}", style="yellow") if guard else text


def _labels(endpoint: Mapping[str, object]) -> Text:
    if endpoint.get("are_labels_known") is False:
        return Text("not known: policies that select by label do not reach it", style="bold red")
    return Text(as_text(endpoint.get("labels")))


def _isolated(isolated: Mapping[str, object]) -> str:
    return ", ".join(direction for direction, is_isolated in isolated.items() if is_isolated) or "no"


def _identity_size(endpoint: Mapping[str, object]) -> Text:
    """How much of what a handshake packet can carry the pod's identity takes."""
    size, budget = endpoint.get("identity_bytes"), endpoint.get("budget_bytes")
    if size is None or budget is None:
        return Text(as_text(size))
    is_too_large = isinstance(size, int) and isinstance(budget, int) and size > budget
    return Text(f"{as_text(size)} of {as_text(budget)} bytes", style="bold red" if is_too_large else "")


def print_denials(console: Console, endpoints: Iterable[Mapping[str, object]]) -> None:
    """Print the recent denials of the endpoints, newest last."""
    table = Table("when", "pod", "direction", "peer", "address", "port", "reason", "decided by")
    for endpoint in endpoints:
        for item in as_list(endpoint.get("recent_denials")):
            denial = as_mapping(item)
            peer, rules = denial.get("peer"), denial.get("rules")
            address, port = denial.get("address"), denial.get("port")
            when = _time_text(denial.get("when"))
            facts = (denial.get("direction"), peer, address, port, denial.get("reason"), rules)
            table.add_row(when, pod_name(endpoint), *map(as_text, facts))
    if table.row_count:
        console.print(table)
    else:
        console.print("no recent denials")


def _time_text(when: object) -> str:
    if isinstance(when, int | float) and not isinstance(when, bool):
        return datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds")
    return as_text(when)
