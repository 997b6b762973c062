# SPDX-License-Identifier: Apache-2.0
"""How often net.d is put in order, and for how long a file may be unreadable. Pure.

A primary that rewrites its file whenever it changes would otherwise make the installer and itself write without end;
the pause doubles while writings follow one another, and is short again after a quiet while.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from trireme_install.netd import Listing
from trireme_install.plan import unreadable_first

FIRST_PAUSE_S = 0.05
"""After a writing; long enough to gather what the primary still writes, short against the start of a pod."""
LONGEST_PAUSE_S = 5.0
QUIET_S = 10.0
"""Without a writing, until the pause is short again."""
IGNORED_AFTER_S = 5.0
"""For which a file is unreadable before it counts as broken rather than as being written."""


@dataclass(frozen=True, slots=True)
class Pace:
    """When something was written last, and how long to wait after it."""

    written_at: float | None = None
    pause_s: float = 0.0

    def after_writing(self, now: float) -> Pace:
        """Count a writing."""
        is_quiet = self.written_at is None or now - self.written_at > QUIET_S + self.pause_s
        pause_s = FIRST_PAUSE_S if is_quiet else min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, self.pause_s * 2))
        return replace(self, written_at=now, pause_s=pause_s)

    def wait_s(self, now: float) -> float:
        """Return how long to wait before the directory is read again."""
        return 0.0 if self.written_at is None else max(0.0, self.written_at + self.pause_s - now)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The file that sorts first and cannot be read, and since when."""

    name: str | None = None
    since: float = 0.0
    ignored: frozenset[str] = frozenset()

    def after_look(self, listing: Listing, now: float) -> Unreadable:
        """Take over what the directory looks like now."""
        ignored = frozenset(name for name in self.ignored if _is_unreadable(listing.files, name))
        rest = Listing({name: data for name, data in listing.files.items() if name not in ignored})
        name = unreadable_first(rest)
        if name is None:
            return Unreadable(ignored=ignored)
        if name != self.name:
            return Unreadable(name, now, ignored)
        if now - self.since >= IGNORED_AFTER_S:
            return Unreadable(ignored=ignored | {name})
        return replace(self, ignored=ignored)


def _is_unreadable(files: Mapping[str, bytes], name: str) -> bool:
    return name in files and unreadable_first(Listing({name: files[name]})) is not None
