# SPDX-License-Identifier: Apache-2.0
"""The network between two nodes, made bad by the kernel's network emulator, both ways."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from trireme_lab import Lab, LabError
from trireme_lab.network import UPLINK


@contextmanager
def bad_network(lab: Lab, *what: str) -> Iterator[None]:
    """Let what leaves node a or b for the other go through the emulator; skip where the kernel has none."""
    places = [f"node:{name}" for name in "ab"]
    try:
        for place in places:
            lab.run(place, "tc", "qdisc", "replace", "dev", UPLINK, "root", "netem", *what)
    except LabError as err:
        if "qdisc kind is unknown" not in str(err):
            raise
        pytest.skip("this kernel has no network emulator (CONFIG_NET_SCH_NETEM)")
    try:
        yield
    finally:
        for place in places:
            lab.run(place, "tc", "qdisc", "delete", "dev", UPLINK, "root")
