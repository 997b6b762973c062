# SPDX-License-Identifier: Apache-2.0
"""By which backends the rules of this node's pods may have been made, so that another one takes theirs away.

The choice of a backend can change from one start to the next: by the settings, by a kernel module that is there now, by
the tools of another image. A pod with the rules of two would queue each packet twice, and none would pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from enforcer_daemon.dataplane.backends import RulesBackend, make_backend
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.replacement import replace_file

FILE_NAME = "backends"
"""In the run directory."""


class BackendRecord:
    """The names in a file beside the pods' records; it has the lifetime of their namespaces."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME

    def begin(self, chosen: RulesBackend) -> tuple[RulesBackend, ...]:
        """Return the backends that came before, once the file names all of them: this start may fail midway."""
        earlier = self.others(chosen)
        self._write([*(backend.name for backend in earlier), chosen.name])
        return earlier

    def others(self, chosen: RulesBackend) -> tuple[RulesBackend, ...]:
        """Return the backends in the file but the chosen one; raise DataplaneError."""
        try:
            names = self._path.read_text(encoding="utf-8").split()
        except FileNotFoundError:
            return ()
        except (OSError, UnicodeDecodeError) as err:
            raise DataplaneError(f"{self._path}: cannot be read: {err}") from err
        return tuple(make_backend(name) for name in dict.fromkeys(names) if name != chosen.name)

    def finish(self, chosen: RulesBackend) -> None:
        """All pods have the rules of this backend alone; raise DataplaneError."""
        self._write([chosen.name])

    def _write(self, names: Iterable[str]) -> None:
        try:
            replace_file(self._path, "".join(f"{name}\n" for name in names).encode(), is_durable=False)
        except OSError as err:
            raise DataplaneError(f"{self._path}: cannot be written: {err.strerror}") from err
