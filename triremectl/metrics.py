# SPDX-License-Identifier: Apache-2.0
"""`triremectl metrics`: what this node's daemon has counted, for people and for a Prometheus' text file."""

from __future__ import annotations

from pathlib import Path

import click

from triremectl.output import RUN_DIR, ask


@click.command("metrics")
@RUN_DIR
def command(run_dir: Path) -> None:
    """Print the daemon's metrics in Prometheus' text format."""
    click.echo(ask(run_dir, "metrics"), nl=False)
