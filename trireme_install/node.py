# SPDX-License-Identifier: Apache-2.0
"""The installer at work on a node: the program first, the configuration last; and again whenever it changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from enforcer_daemon.sources.inotify import DirectoryWatch
from trireme_install.bundle import Bundle, install_bundle, is_in_place
from trireme_install.directory import carry_out, read_listing
from trireme_install.errors import ChangedMeanwhileError, InstallError
from trireme_install.examination import default_network
from trireme_install.pace import IGNORED_AFTER_S, Pace, Unreadable
from trireme_install.plan import Outcome, Plan, Step, Wanted, plan_install, plan_removal

MAX_ATTEMPTS = 20
"""Plans made anew in one go because somebody else was writing."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be installed, and where."""

    conf_dir: Path
    bin_dir: Path
    bundle: Bundle
    wanted: Wanted = field(default_factory=Wanted)
    runtime_configs: tuple[Path, ...] = ()
    """Where the runtime's settings are looked for."""


def install(target: Target, say: Say, ignored: frozenset[str] = frozenset()) -> Plan:
    """Install once and return what it came to; raise InstallError."""
    if not is_in_place(target.bin_dir, target.bundle) and install_bundle(target.bin_dir, target.bundle):
        say(f"plugin {target.bundle.name} is in {target.bin_dir}")

    def make_plan() -> Plan:
        listing, network_name = read_listing(target.conf_dir), default_network(target.runtime_configs)
        return plan_install(listing, target.wanted, ignored, network_name)

    return settle(target.conf_dir, make_plan, say)


def remove(conf_dir: Path, say: Say) -> Plan:
    """Take our entries out of the directory; raise InstallError."""
    return settle(conf_dir, lambda: plan_removal(read_listing(conf_dir)), say)


def settle(conf_dir: Path, make_plan: Callable[[], Plan], say: Say) -> Plan:
    """Carry out plans until one has no steps left; the plan that is returned has those that were taken."""
    taken: list[Step] = []
    for _ in range(MAX_ATTEMPTS):
        plan = make_plan()
        if not plan.steps:
            return Plan(plan.outcome, plan.message, tuple(taken))
        with suppress(ChangedMeanwhileError):  # The next plan is made from what is there now.
            for step in plan.steps:
                carry_out(conf_dir, step)
                say(f"{type(step).__name__.lower()} {conf_dir / step.path}")
                taken.append(step)
    raise InstallError(f"{conf_dir}: somebody else writes it all the time; {MAX_ATTEMPTS} attempts failed")


class Keeper:
    """Keeps the node as it is wanted, and tells by a file whether it is."""

    def __init__(self, target: Target, ready_file: Path | None, poll_s: float, say: Say) -> None:
        self._target = target
        self._ready_file = ready_file
        self._poll_s = poll_s
        self._say = say
        self._said = ""
        self._pace = Pace()
        self._unreadable = Unreadable()

    async def run(self) -> None:
        """Go on until cancelled. Nothing is taken back at the end: pods start while an installer is replaced."""
        while True:
            place = _place(self._target.conf_dir)
            watch = self._watch() if place else None
            try:
                # A directory that was made anew needs a watch of its own.
                while _place(self._target.conf_dir) == place:
                    self._look()
                    await self._wait(watch)
            finally:
                if watch is not None:
                    watch.close()

    def _look(self) -> None:
        """Put the directory in order."""
        now = time.monotonic()
        try:
            self._unreadable = self._unreadable.after_look(read_listing(self._target.conf_dir), now)
            plan = install(self._target, self._say, self._unreadable.ignored)
        except InstallError as err:
            self._tell(Outcome.REFUSED, str(err))
            return
        if plan.steps:
            self._pace = self._pace.after_writing(now)
        self._tell(plan.outcome, plan.message)

    async def _wait(self, watch: DirectoryWatch | None) -> None:
        timeout_s = min(self._poll_s, IGNORED_AFTER_S) if self._unreadable.name else self._poll_s
        if watch is None:
            await asyncio.sleep(timeout_s)
        else:
            await watch.wait(timeout_s)
        await asyncio.sleep(self._pace.wait_s(time.monotonic()))

    def _watch(self) -> DirectoryWatch | None:
        try:
            return DirectoryWatch(self._target.conf_dir)
        except OSError as err:
            self._say(f"{self._target.conf_dir}: cannot be watched ({err.strerror}); looking every {self._poll_s:g} s")
            return None

    def _tell(self, outcome: Outcome, message: str) -> None:
        text = f"{outcome.value}: {message}"
        if text != self._said:
            self._said = text
            self._say(text)
        if self._ready_file is None:
            return
        if outcome is Outcome.INSTALLED:
            self._ready_file.touch(mode=0o644)
        else:
            self._ready_file.unlink(missing_ok=True)


def is_ready(ready_file: Path, poll_s: float) -> bool:
    """Return whether an installer has lately found all as it is wanted."""
    try:
        age_s = time.time() - ready_file.stat().st_mtime
    except FileNotFoundError:
        return False
    return age_s < 3 * poll_s + IGNORED_AFTER_S


def _place(directory: Path) -> tuple[int, int] | None:
    try:
        stat = directory.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_dev, stat.st_ino
