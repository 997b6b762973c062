# SPDX-License-Identifier: Apache-2.0
"""The daemon with other limits than its own, for tests and benchmarks: `Tools(enforcer=enforcer_with(limits))`.

No setting changes limits. They reach the daemon's process as JSON, decoded by their own types.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

import uvloop
from pydantic import TypeAdapter

from enforcer_daemon.daemon.limits import DaemonLimits
from enforcer_daemon.daemon.run import serve
from enforcer_daemon.settings_file import load_settings
from enforcer_daemon.telemetry.logs import open_log

_LIMITS = TypeAdapter(DaemonLimits)


def enforcer_with(limits: DaemonLimits) -> tuple[str, ...]:
    """Return the command that runs the daemon with these limits; `--config FILE` is appended."""
    return sys.executable, "-m", "trireme_lab.enforcer", _LIMITS.dump_json(limits).decode()


def main() -> None:
    """Run the daemon as `trireme-enforcer` does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("limits", type=_LIMITS.validate_json)
    parser.add_argument("--config", type=Path, required=True)
    options = parser.parse_args()
    settings = load_settings(options.config)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, open_log(settings.log, node=settings.node), options.limits))


if __name__ == "__main__":
    main()
