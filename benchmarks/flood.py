# SPDX-License-Identifier: Apache-2.0
"""A sender inside a pod, past the pod's own rules: `python flood.py FRAMES IFNAME` until SIGTERM.

FRAMES is a file of whole Ethernet frames, each after its length in two bytes; they are sent again and again, as fast as
one core can. At the end it prints one JSON object: how many left, in how many seconds.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from pathlib import Path


class _EndedError(Exception):
    """SIGTERM came."""


def read_frames(path: Path) -> list[bytes]:
    """Read what `write_frames` wrote."""
    content, frames, at = path.read_bytes(), [], 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 2], "big")
        frames.append(content[at + 2 : at + 2 + length])
        at += 2 + length
    return frames


def write_frames(path: Path, frames: list[bytes]) -> None:
    """Keep frames for a sender."""
    path.write_bytes(b"".join(len(frame).to_bytes(2, "big") + frame for frame in frames))


def send(frames: list[bytes], ifname: str) -> dict[str, float]:
    """Send until SIGTERM; answer what left."""

    def end(*_: object) -> None:
        raise _EndedError

    sent, started = 0, time.perf_counter()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        sock.bind((ifname, 0))
        signal.signal(signal.SIGTERM, end)
        send_one = sock.send
        try:
            while True:
                for frame in frames:
                    try:
                        send_one(frame)
                        sent += 1
                    except OSError:
                        continue  # The link's queue is full: an attacker tries again.
        except _EndedError:
            return {"sent": sent, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    print(json.dumps(send(read_frames(Path(sys.argv[1])), sys.argv[2])))
