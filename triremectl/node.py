# SPDX-License-Identifier: Apache-2.0
"""`triremectl node`: decide which other nodes this node trusts."""

from __future__ import annotations

from pathlib import Path

import click

from triremectl.output import RUN_DIR, ask


@click.group("node")
def command() -> None:
    """Decide which other nodes this node trusts."""


@command.command("trust")
@RUN_DIR
@click.argument("node")
def trust(run_dir: Path, node: str) -> None:
    """Trust NODE again, which this node denies for false claims.

    The denial also ends by itself. Examine NODE first: its key may be stolen.
    """
    ask(run_dir, "trust", node=node)
    click.echo(f"node {node} is trusted again")
