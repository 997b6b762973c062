# SPDX-License-Identifier: Apache-2.0
"""The two ends of a measured connection, run inside pods: `serve ADDRESS PORT` and `connect ADDRESS PORT N CLIENTS`.

A client connects and resets (SO_LINGER 0), so that no ports stay in TIME_WAIT. It prints one JSON object.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time

_RESET = struct.pack("ii", 1, 0)


def serve(address: str, port: int) -> None:
    """Accept and close, for ever, in two processes: one alone is the bottleneck of eight clients."""
    listener = socket.create_server((address, port), backlog=4096, family=_family(address))
    os.fork()
    while True:
        connection, _ = listener.accept()
        connection.close()


def connect(address: str, port: int, count: int, clients: int) -> None:
    """Open `count` connections one after another in each of `clients` processes; print latencies and rate."""
    pipes = []
    started = time.perf_counter()
    for _ in range(clients):
        reading, writing = os.pipe()
        if os.fork() == 0:
            latencies = _one_client(address, port, count)
            with os.fdopen(writing, "w") as out:
                json.dump(latencies, out)
            os._exit(0)
        os.close(writing)
        pipes.append(reading)
    latencies = []
    for reading in pipes:
        with os.fdopen(reading) as source:
            latencies += json.load(source)
    elapsed = time.perf_counter() - started
    latencies.sort()
    result = {
        "p50_us": latencies[len(latencies) // 2],
        "p99_us": latencies[len(latencies) * 99 // 100],
        "per_s": len(latencies) / elapsed,
    }
    print(json.dumps(result))


def _one_client(address: str, port: int, count: int) -> list[float]:
    family, clock, latencies = _family(address), time.perf_counter, []
    for _ in range(count):
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            connection.settimeout(10.0)
            before = clock()
            connection.connect((address, port))
            latencies.append((clock() - before) * 1e6)
    return latencies


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", host, number]:
            serve(host, int(number))
        case ["connect", host, number, repeat, parallel]:
            connect(host, int(number), int(repeat), int(parallel))
        case _:
            sys.exit(__doc__)
