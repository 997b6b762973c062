# SPDX-License-Identifier: Apache-2.0
"""The operator's command line: `triremectl`. Each subcommand is imported only when it is called."""

from __future__ import annotations

import importlib

import click

_COMMANDS = {
    "endpoints": "triremectl.endpoints",
    "lab": "trireme_lab.command",
    "metrics": "triremectl.metrics",
    "node": "triremectl.node",
    "reasons": "triremectl.reasons",
    "simulate": "triremectl.simulate",
    "status": "triremectl.status",
    "validate": "triremectl.validate",
}
"""Name of each subcommand and the module whose `command` it is."""


class LazyGroup(click.Group):
    """A group whose members are modules, imported on demand: `triremectl reasons` loads no lab."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        found = importlib.import_module(_COMMANDS[cmd_name]).command
        if not isinstance(found, click.Command):
            raise TypeError(f"{_COMMANDS[cmd_name]}.command is not a click command")
        return found


@click.group(cls=LazyGroup)
@click.version_option(package_name="trireme")
def main() -> None:
    """Look at what Trireme enforces on this node, and try policies before they are in force."""


if __name__ == "__main__":
    main()
