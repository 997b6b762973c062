# SPDX-License-Identifier: Apache-2.0
"""`triremectl reasons`: what the reasons in logs, counters and tables mean."""

from __future__ import annotations

import click
from rich.table import Table

from enforcer_daemon.reasons import Reason
from triremectl.output import make_console, print_json


@click.command("reasons")
@click.argument("reason", required=False)
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(reason: str | None, output: str) -> None:
    """Explain REASON, or all reasons."""
    chosen = [item for item in Reason if reason in (None, item.value)]
    if not chosen:
        raise click.ClickException(f"{reason}: no such reason; `triremectl reasons` lists them all")
    if output == "json":
        print_json({item.value: item.text for item in chosen})
    elif reason is not None:
        click.echo(chosen[0].text)
    else:
        table = Table("reason", "meaning")
        for item in chosen:
            table.add_row(item.value, item.text)
        make_console().print(table)
