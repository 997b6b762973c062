# SPDX-License-Identifier: Apache-2.0
"""`triremectl release`: believe a node again that was denied for false claims."""

from __future__ import annotations

from pathlib import Path

import click

from triremectl.output import RUN_DIR, ask


@click.command("release")
@RUN_DIR
@click.argument("node")
def command(run_dir: Path, node: str) -> None:
    """Believe a denied NODE again on this node.

    Its denial would else end by itself. Examine NODE first: its key may be stolen.
    """
    ask(run_dir, "release", node=node)
    click.echo(f"node {node} is believed again")
