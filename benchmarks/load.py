# SPDX-License-Identifier: Apache-2.0
"""The ends of what is measured, run inside pods.

`serve ADDRESS PORT` and `connect ADDRESS PORT N CLIENTS`: a client connects and resets (SO_LINGER 0), so that no ports
stay in TIME_WAIT. `ask ADDRESS N` puts DNS questions, `await-resolver ADDRESS` returns when they are answered there.
Clients print one JSON object.
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


def ask(address: str, count: int) -> None:
    """Put `count` DNS questions one after another, each from a socket of its own; print latencies."""
    latencies = sorted(_one_answer(address, number, 10.0) for number in range(count))
    print(json.dumps({"p50_us": latencies[count // 2], "p99_us": latencies[count * 99 // 100]}))


def await_resolver(address: str) -> None:
    """Return when a resolver answers; fail after ten seconds."""
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        try:
            _one_answer(address, 0, 0.1)
            return
        except (ConnectionRefusedError, TimeoutError):
            time.sleep(0.02)
    sys.exit(f"no resolver at {address}")


def _one_answer(address: str, number: int, timeout_s: float) -> float:
    """Ask for the A record of a name; return how long the answer took, in microseconds."""
    header = struct.pack("!6H", number, 0x0100, 1, 0, 0, 0)  # a recursive question, and nothing else
    question = header + b"\x01q\x05bench\x04test\x00" + struct.pack("!2H", 1, 1)
    clock = time.perf_counter
    with socket.socket(_family(address), socket.SOCK_DGRAM) as sock:
        sock.settimeout(timeout_s)
        sock.connect((address, 53))
        before = clock()
        sock.send(question)
        answer = sock.recv(512)
        elapsed = (clock() - before) * 1e6
    if answer[:2] != header[:2] or answer[3] & 0x0F:
        sys.exit(f"not an answer: {answer!r}")
    return elapsed


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", host, number]:
            serve(host, int(number))
        case ["connect", host, number, repeat, parallel]:
            connect(host, int(number), int(repeat), int(parallel))
        case ["ask", host, repeat]:
            ask(host, int(repeat))
        case ["await-resolver", host]:
            await_resolver(host)
        case _:
            sys.exit(__doc__)
