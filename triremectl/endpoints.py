# SPDX-License-Identifier: Apache-2.0
"""`triremectl endpoints`: the pods that this node's daemon enforces, and whom they refused lately."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from enforcer_daemon.model import protocol_name
from triremectl.output import (
    WIDE_COLUMNS,
    as_list,
    as_mapping,
    as_text,
    ask,
    daemon_options,
    make_console,
    print_json,
)

_COLUMNS = ("pod", "interface", "addresses", "state", "isolated", "policies", "identity", "labels")


@click.command("endpoints")
@click.argument("pod", required=False)
@click.option("--denials", is_flag=True, help="Also show the recent denials of each pod.")
@daemon_options
def command(run_dir: Path, output: str, pod: str | None, *, denials: bool) -> None:
    """Show the enforced pods of this node. With POD (NAMESPACE/NAME): that one alone, with its recent denials."""
    if pod is not None and "/" not in pod:
        raise click.BadParameter("must be NAMESPACE/NAME", param_hint="POD")
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
    """Print one row an endpoint, or on a narrow console a line for each of its facts."""
    rows = [_facts(endpoint) for endpoint in sorted(endpoints, key=pod_name)]
    if not rows:
        console.print("no pods are enforced on this node")
    elif console.width >= WIDE_COLUMNS:
        table = Table(*_COLUMNS)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    else:
        for row in rows:
            block = Table(box=None, show_header=False, pad_edge=False)
            for name, fact in zip(_COLUMNS, row, strict=True):
                block.add_row(Text(name, style="bold"), fact)
            console.print(block, "")


def _facts(endpoint: Mapping[str, object]) -> tuple[Text, ...]:
    """What the columns say of an endpoint."""
    state, problem = as_text(endpoint.get("state")), endpoint.get("problem")
    return (
        Text(pod_name(endpoint)),
        Text(as_text(endpoint.get("ifname"))),
        Text("\n".join(map(as_text, as_list(endpoint.get("ips")))) or "-"),
        _state(state, problem, endpoint.get("guard"), as_mapping(endpoint.get("leases"))),
        Text(_isolated(as_mapping(endpoint.get("isolated")))),
        Text("\n".join(map(as_text, as_list(endpoint.get("policies")))) or "-"),
        _identity_size(endpoint),
        _labels(endpoint),
    )


def _state(state: str, problem: object, guard: object, leases: Mapping[str, object]) -> Text:
    """Return how the pod is enforced, what the guard on the node cannot see of it, and which peers are not heard."""
    text = Text(f"{state}: {problem}" if problem else state, style="" if state in ("-", "enforced") else "bold red")
    if guard:
        text.append(f"\nguard: {guard}", style="yellow")
    if unanswered := leases.get("unanswered"):
        pairs = as_text(leases.get("pairs"))
        told = f"\nleases: {unanswered} of {pairs} peers never answered; silence ends none of their flows"
        text.append(told, style="yellow")
    return text


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
    """Print the recent denials of the endpoints, newest last; on a narrow console two lines each."""
    rows = [
        _denial(pod_name(endpoint), as_mapping(item))
        for endpoint in endpoints
        for item in as_list(endpoint.get("recent_denials"))
    ]
    if not rows:
        console.print("no recent denials by these pods; what the other end denied is known on its node")
    elif console.width >= WIDE_COLUMNS:
        table = Table("when", "pod", "direction", "peer", "address", "port", "reason", "decided by")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    else:
        for when, pod, direction, peer, address, port, reason, rules in rows:
            preposition = "to" if direction == "egress" else "from"
            console.print(Text(f"{when} {direction} of {pod} {preposition} {peer} {address} {port}"), soft_wrap=True)
            console.print(Padding(Text(f"{reason} by {rules}"), (0, 0, 0, 2), expand=False))


def _denial(pod: str, denial: Mapping[str, object]) -> tuple[str, ...]:
    """What the columns say of a denial."""
    protocol, detail = denial.get("protocol"), denial.get("detail")
    port = as_text(denial.get("port"))
    reason = as_text(denial.get("reason"))
    return (
        _time_text(denial.get("when")),
        pod,
        *(as_text(denial.get(key)) for key in ("direction", "peer", "address")),
        f"{protocol_name(protocol)} {port}" if isinstance(protocol, int) else port,
        f"{reason}: {as_text(detail)}" if detail else reason,
        as_text(denial.get("rules")),
    )


def _time_text(when: object) -> str:
    if isinstance(when, int | float) and not isinstance(when, bool):
        return datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds")
    try:
        return datetime.fromisoformat(str(when)).isoformat(timespec="milliseconds")
    except ValueError:
        return as_text(when)
