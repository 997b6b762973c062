# SPDX-License-Identifier: Apache-2.0
"""DNS queries to a resolver in a pod, with the enforcer and without, in alternating rounds of one run.

Every query leaves a socket of its own, as a program's lookups do, so each is a flow of its own with a handshake of its
own; the pods have met before, so the handshake costs no signature. The resolver is dnsmasq, the same for both.
"""

from __future__ import annotations

import json
import sys

from benchmarks.connections import LOAD, WORLD, Rounds, Row, print_rows, row
from trireme_lab.lab import Lab

ROUNDS = 15
QUERIES = 400
_WAYS = (("no agent", "host:client", "host:server"), ("enforcer", "bench/client", "bench/server"))


def run() -> list[Row]:
    """Measure; takes about half a minute, as root."""
    rounds: Rounds = {kind: [] for kind, _, _ in _WAYS}
    with Lab(WORLD) as lab:
        for _, _, server in _WAYS:
            _start_resolver(lab, server)
        for number in range(ROUNDS + 1):
            for kind, client, server in _WAYS:
                result = _ask(lab, client, str(lab.address_of(server)))
                if number:  # The first round warms caches on both sides.
                    rounds[kind].append(result)
    return [row("query p50 (us)", rounds, "p50_us"), row("query p99 (us)", rounds, "p99_us")]


def _start_resolver(lab: Lab, place: str) -> None:
    address = str(lab.address_of(place))
    lab.spawn(
        place, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root",
        "--pid-file=", "--bind-interfaces", f"--listen-address={address}", "--address=/bench.test/192.0.2.1",
    )  # fmt: skip
    lab.run(place, sys.executable, str(LOAD), "await-resolver", address)


def _ask(lab: Lab, client: str, address: str) -> dict[str, float]:
    result: dict[str, float] = json.loads(lab.run(client, sys.executable, str(LOAD), "ask", address, str(QUERIES)))
    return result


def main() -> None:
    """Print the table."""
    rows = run()
    print_rows(rows, "no agent")
    median = rows[0].figures
    print(f"added to a query at the median: {median['enforcer'] - median['no agent']:.0f} us")


if __name__ == "__main__":
    main()
