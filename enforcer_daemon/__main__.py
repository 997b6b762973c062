# SPDX-License-Identifier: Apache-2.0
"""The command line of the daemon: `trireme-enforcer --config FILE`."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import uvloop

from enforcer_daemon.daemon.preflight import find_problems
from enforcer_daemon.errors import EnforcerError
from enforcer_daemon.settings import Settings
from enforcer_daemon.settings_effects import warnings_of
from enforcer_daemon.settings_file import load_settings
from enforcer_daemon.telemetry.logs import Logger, open_log

EXIT_FAILED = 1
EXIT_SETTINGS = 2


@click.command()
@click.version_option(package_name="trireme")
@click.option(
    "--config",
    "config",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("/etc/trireme/enforcer.yaml"),
    show_default=True,
    help="Settings; conf/enforcer.yaml shows every key.",
)
@click.option("--node", envvar="TRIREME_NODE", help="This node's name, instead of the settings' (also TRIREME_NODE).")
@click.option(
    "--check-config",
    is_flag=True,
    help="Say what is wrong with the settings and with the files that they name, and end.",
)
@click.option(
    "--uninstall",
    is_flag=True,
    help="Take the rules out of all pods and the guard off the node, and end: nobody evaluates the pods' traffic then.",
)
def main(config: Path, node: str | None, *, check_config: bool, uninstall: bool) -> None:
    """Enforce NetworkPolicy on this node's pods by who they are."""
    try:
        settings = load_settings(config, node)
    except EnforcerError as err:
        click.echo(f"trireme-enforcer: {err}", err=True)
        sys.exit(EXIT_SETTINGS)
    if check_config:
        _check(config, settings)
        return
    if os.geteuid() != 0:
        click.echo("trireme-enforcer: must run as root: it enters the pods' network namespaces", err=True)
        sys.exit(EXIT_FAILED)
    log = open_log(settings.log, node=settings.node)
    if uninstall:
        _uninstall(settings, log)
        return
    # The collector would walk over all that the modules make several times, and all of it stays. Frozen, it is not
    # walked over later either, when packets wait.
    gc.disable()
    from enforcer_daemon.daemon.run import serve

    gc.freeze()
    gc.enable()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings, log))
    except* EnforcerError as group:
        for problem in _leaves(group):
            log.error("cannot go on", error=str(problem))
        sys.exit(EXIT_FAILED)


def _check(config: Path, settings: Settings) -> None:
    problems = find_problems(settings, time.time())
    for warning in warnings_of(settings):
        click.echo(f"{config}: warning: {warning}", err=True)
    for problem in problems:
        click.echo(f"{config}: {problem}", err=True)
    if problems:
        sys.exit(EXIT_SETTINGS)
    click.echo(f"{config}: valid")


def _uninstall(settings: Settings, log: Logger) -> None:
    from enforcer_daemon.daemon.uninstall import uninstall

    try:
        left = uninstall(settings, log)
    except EnforcerError as err:
        left = [str(err)]
    for problem in left:
        log.error("not withdrawn", error=problem)
    if left:
        sys.exit(EXIT_FAILED)
    log.info("withdrawn")


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield what failed in the end, however deep the groups of tasks."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


if __name__ == "__main__":
    main()
