# SPDX-License-Identifier: Apache-2.0
"""The CPU shares that benchmarks give to pods, in real cgroups of either version."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.shares import Shares, SharesError, chart_request

pytestmark = [pytest.mark.kernel, pytest.mark.stock_kernel]

_WEIGHTS = {("cpu.shares", 0): 2, ("cpu.shares", 250): 256, ("cpu.weight", 0): 1, ("cpu.weight", 250): 10}
"""As kubelet gives them for requests in thousandths of a CPU."""


@pytest.fixture
def shares() -> Iterator[Shares]:
    given = Shares({"enforcer": 250, "bench/pod": 0})
    try:
        given.__enter__()
    except SharesError as err:
        pytest.skip(str(err))
    try:
        yield given
    finally:
        given.__exit__(None, None, None)
    assert not any(path.exists() for path in given.groups.values())


def groups_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text(encoding="ascii")


@pytest.mark.parametrize(("name", "request_m"), [("enforcer", 250), ("bench/pod", 0)])
def test_a_process_has_the_weight_of_its_request(shares: Shares, name: str, request_m: int) -> None:
    before = groups_of(os.getpid())
    with shares.within(name):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert groups_of(os.getpid()) == before
        assert f"/{shares.groups[name].name}\n" in groups_of(child.pid)
        (weight,) = (path for path in shares.groups[name].iterdir() if path.name in ("cpu.shares", "cpu.weight"))
        assert int(weight.read_text()) == _WEIGHTS[weight.name, request_m]
    finally:
        child.communicate(b"\n")
    assert child.returncode == 0


def test_what_the_chart_requests_is_known() -> None:
    assert chart_request() == 250
