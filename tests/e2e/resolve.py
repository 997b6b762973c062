# SPDX-License-Identifier: Apache-2.0
"""Run in a pod: `resolve.py IN_FLIGHT FILE` asks the C library for all addresses of each name in the file."""

from __future__ import annotations

import json
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def resolve(name: str) -> dict[str, object]:
    """Ask for both families, as most programs do."""
    before, error = time.monotonic(), ""
    addresses: list[str] = []
    try:
        addresses = [str(found[4][0]) for found in socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)]
    except socket.gaierror as err:
        error = str(err)
    return {"name": name, "addresses": addresses, "error": error, "seconds": time.monotonic() - before}


if __name__ == "__main__":
    with ThreadPoolExecutor(int(sys.argv[1])) as executor:
        json.dump(list(executor.map(resolve, Path(sys.argv[2]).read_text().split())), sys.stdout)
