# SPDX-License-Identifier: Apache-2.0
"""`trireme-install`: put the CNI plugin on this node, keep it there, take it away, say what is wrong."""

from __future__ import annotations

import asyncio
import importlib.metadata
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from trireme_install.bundle import Bundle, launcher_bundle, read_bundle, remove_bundle
from trireme_install.directory import locked
from trireme_install.doctor import Level, diagnose
from trireme_install.errors import InstallError
from trireme_install.examination import examine
from trireme_install.layouts import LAYOUTS, runtime_configs
from trireme_install.node import Keeper, Target, install, is_ready, remove
from trireme_install.plan import OWNED_NAME, Mode, Outcome, Wanted

DEFAULT_RUN_DIR = "/run/trireme"
"""As the plugin's own default; only another one is written into our entry."""
_IMAGE_BUNDLE = Path("/opt/trireme/plugin")
"""Where the container image has the bundle."""
_MARKS = {Level.OK: "ok     ", Level.WARNING: "warning", Level.PROBLEM: "PROBLEM"}
_PATH = click.Path(path_type=Path)
_ready_file = click.option(
    "--ready-file", type=_PATH, default="/run/trireme/installed", show_default=True, help="Touched while all is well."
)
_poll_s = click.option(
    "--poll",
    "poll_s",
    type=click.FloatRange(0.05, 3600),
    default=10.0,
    show_default=True,
    help="Seconds between looks.",
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where things are on this node, as this process sees them."""

    conf_dir: Path
    bin_dir: Path
    runtime_configs: tuple[Path, ...]


@click.group(context_settings={"max_content_width": 120})
@click.option(
    "--layout",
    type=click.Choice(sorted(LAYOUTS)),
    default="default",
    show_default=True,
    metavar="NAME",
    help=f"Where the distribution has the two directories: {', '.join(sorted(LAYOUTS))}.",
)
@click.option("--conf-dir", type=_PATH, help="The runtime's net.d, instead of the layout's.")
@click.option("--bin-dir", type=_PATH, help="The runtime's plugin directory, instead of the layout's.")
@click.version_option(package_name="trireme")
@click.pass_context
def main(context: click.Context, layout: str, conf_dir: Path | None, bin_dir: Path | None) -> None:
    """Install the CNI plugin `trireme` on this node."""
    known = LAYOUTS[layout]
    context.obj = Place(conf_dir or known.conf_dir, bin_dir or known.bin_dir, runtime_configs(layout))


def _entry_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command the options that say what is installed."""
    for option in (
        click.option("--log-file", type=_PATH, help="Where the plugin logs (the entry's logFile)."),
        click.option(
            "--add-timeout",
            type=click.FloatRange(0, 120, min_open=True),
            help="How long an ADD may take, in seconds (the entry's addTimeoutSeconds). Default: 10.",
        ),
        click.option("--exclude-namespace", "excluded", multiple=True, help="Its pods are passed through; repeatable."),
        click.option(
            "--run-dir", type=_PATH, default=DEFAULT_RUN_DIR, show_default=True, help="The enforcer's runDir."
        ),
        click.option("--bundle", "bundle_dir", type=_PATH, help="Directory of the plugin's bundle (make plugin)."),
        click.option("--owned-name", default=OWNED_NAME, show_default=True, help="Name of our copy, mode owned."),
        click.option(
            "--mode",
            type=click.Choice([m.value for m in Mode]),
            default=Mode.MERGE.value,
            show_default=True,
            help="Our entry in the primary's list, in our copy of it, or as a drop-in.",
        ),
    ):
        command = option(command)
    return command


@main.command("install")
@_entry_options
@click.pass_obj
def install_once(place: Place, /, **options: Any) -> None:
    """Install once: the program first, the chain last.

    Exit status 0: installed; 1: an operator has to act; 3: there is no primary network yet.
    """
    with _reported(), _alone(place.conf_dir):
        plan = install(_target(place, options), _say)
        _say(f"{plan.outcome.value}: {plan.message}")
        _conclude(plan.outcome)


@main.command()
@_entry_options
@_ready_file
@_poll_s
@click.pass_obj
def run(place: Place, /, ready_file: Path, poll_s: float, **options: Any) -> None:
    """Install, and keep it so until stopped. What is installed stays when this ends."""
    with _reported(), _alone(place.conf_dir):
        ready_file.unlink(missing_ok=True)  # of an earlier run
        keeper = Keeper(_target(place, options), ready_file, poll_s, _say)
        asyncio.run(_until_stopped(keeper))


@main.command()
@_ready_file
@_poll_s
def ready(ready_file: Path, poll_s: float) -> None:
    """Tell a probe whether `run` found all well lately."""
    if not is_ready(ready_file, poll_s):
        _say(f"not ready: {ready_file} was not touched lately; `trireme-install run` says why on its standard error")
        sys.exit(1)


@main.command()
@click.option("--binary", is_flag=True, help="Remove the program too. Pods that still name it then cannot be deleted.")
@click.option("--stay", is_flag=True, help="Do not end when done, but wait to be stopped (for a DaemonSet).")
@_ready_file
@click.pass_obj
def uninstall(place: Place, *, binary: bool, stay: bool, ready_file: Path) -> None:
    """Take the plugin out of the chain.

    The program stays, for pods that are still to be deleted.
    """
    with _reported():
        with _alone(place.conf_dir):
            plan = remove(place.conf_dir, _say)
            _say(plan.message)
            if binary and plan.outcome is Outcome.INSTALLED:
                remove_bundle(place.bin_dir)
                _say(f"the plugin is no longer in {place.bin_dir}")
        if stay and plan.outcome is Outcome.INSTALLED:
            signals = {signal.SIGTERM, signal.SIGINT}
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            ready_file.touch()
            signal.sigwait(signals)
        _conclude(plan.outcome)


@main.command()
@click.option("--run-dir", type=_PATH, default=DEFAULT_RUN_DIR, show_default=True, help="The enforcer's runDir.")
@click.pass_obj
def doctor(place: Place, run_dir: Path) -> None:
    """Say what this node's runtime does with a new pod.

    Exit status 1 where something is wrong.
    """
    with _reported():
        findings = diagnose(examine(place.conf_dir, place.bin_dir, run_dir, place.runtime_configs))
    for finding in findings:
        click.echo(f"{_MARKS[finding.level]}  {finding.text}")
    sys.exit(1 if any(finding.level is Level.PROBLEM for finding in findings) else 0)


def _target(place: Place, options: dict[str, Any]) -> Target:
    settings: dict[str, Any] = {}
    if str(options["run_dir"]) != DEFAULT_RUN_DIR:
        settings["runDir"] = str(options["run_dir"])
    if options["excluded"]:
        settings["excludedNamespaces"] = list(options["excluded"])
    if options["add_timeout"] is not None:
        settings["addTimeoutSeconds"] = options["add_timeout"]
    if options["log_file"] is not None:
        settings["logFile"] = str(options["log_file"])
    wanted = Wanted(Mode(options["mode"]), settings, options["owned_name"])
    return Target(place.conf_dir, place.bin_dir, _bundle(options["bundle_dir"]), wanted, place.runtime_configs)


def _bundle(directory: Path | None) -> Bundle:
    version = importlib.metadata.version("trireme")
    if directory is None and not _IMAGE_BUNDLE.is_dir():
        return launcher_bundle(version)
    return read_bundle(directory or _IMAGE_BUNDLE, version)


@contextmanager
def _alone(conf_dir: Path) -> Iterator[None]:
    try:
        conf_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as err:
        raise InstallError(f"{conf_dir}: cannot be made: {err.strerror}") from err
    with locked(conf_dir):
        yield


async def _until_stopped(keeper: Keeper) -> None:
    loop, work = asyncio.get_running_loop(), asyncio.ensure_future(keeper.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, work.cancel)
    with suppress(asyncio.CancelledError):
        await work


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except InstallError as err:
        _say(f"trireme-install: {err}")
        sys.exit(1)


def _conclude(outcome: Outcome) -> None:
    """End with 0 where it is done, 1 where an operator has to act, 3 where somebody else has to come first."""
    sys.exit({Outcome.INSTALLED: 0, Outcome.REFUSED: 1, Outcome.WAITING: 3}[outcome])


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
