# SPDX-License-Identifier: Apache-2.0
"""The daemon with short times of leases, for tests alone: no setting changes them."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from enforcer_daemon.daemon.run import serve
from enforcer_daemon.handshake.leasepairs import LeaseTimes
from enforcer_daemon.settings_file import load_settings
from enforcer_daemon.telemetry.logs import open_log

TIMES = LeaseTimes(lease_s=0.5, silent_s=1.2, probe_s=0.3, udp_lapse_s=8.0, tcp_lapse_s=14.0)


def main() -> None:
    """Run the daemon as `trireme-enforcer` does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    settings = load_settings(parser.parse_args().config, None)
    asyncio.run(serve(settings, open_log(settings.log, node=settings.node), TIMES))


if __name__ == "__main__":
    main()
