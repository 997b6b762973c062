# SPDX-License-Identifier: Apache-2.0
"""What the commands that ask the daemon have in common: their options, the question, and plain values as text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import click
from rich.console import Console

from triremectl.admin_client import AdminError, call

_WIDTH_WITHOUT_TERMINAL = 160
WIDE_COLUMNS = 120
"""A console that is narrower shows rows of many columns as lines below one another."""

F = TypeVar("F", bound=Callable[..., object])


RUN_DIR = click.option(
    "--run-dir",
    type=click.Path(path_type=Path, readable=False),  # Who may not ask is told so by the socket.
    default=Path("/run/trireme"),
    show_default=True,
    help="The daemon's registration.runDir.",
)
"""Of every command that asks the daemon."""


def make_console() -> Console:
    """Return a console; where neither a terminal nor COLUMNS tells its width, one wide enough for our tables."""
    console = Console(highlight=False, emoji=False, markup=False)
    if console.is_terminal or os.environ.get("COLUMNS", "").isdecimal():
        return console
    return Console(highlight=False, emoji=False, markup=False, width=_WIDTH_WITHOUT_TERMINAL)


def daemon_options(function: F) -> F:
    """Add --run-dir and --output to a command."""
    function = click.option(
        "--output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="For people or programs.",
    )(function)
    return RUN_DIR(function)


def ask(run_dir: Path, question: str, **arguments: object) -> object:
    """Ask the daemon; a failure ends the command with the reason and exit status 1."""
    try:
        return call(run_dir, question, **arguments)
    except AdminError as err:
        raise click.ClickException(printable(str(err))) from err


def print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, sort_keys=True))


def printable(text: str) -> str:
    """Show what would steer a terminal, or turn a line round: names come from other nodes and other clusters."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def as_text(value: object) -> str:
    """Put a JSON value on one line, as people write it; an absent one is a dash."""
    if value is None or value == "" or value == [] or value == {}:
        return "-"
    match value:
        case bool():
            return "yes" if value else "no"
        case Mapping():
            return ", ".join(f"{as_text(key)}={as_text(item)}" for key, item in value.items())
        case str():
            return printable(value)
        case Sequence():
            return ", ".join(map(as_text, value))
        case _:
            return str(value)


def as_mapping(value: object) -> Mapping[str, object]:
    """Return the value if it is a JSON object, else an empty one: the daemon may be of another version."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: object) -> Sequence[object]:
    """Return the value if it is a JSON array, else an empty one."""
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()
