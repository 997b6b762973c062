# SPDX-License-Identifier: Apache-2.0
"""A lab whose pods and enforcer have the shares of the CPU that kubelet would give them.

On a node every pod is in a cgroup whose weight comes from what it requests, and all pods that request nothing have
together the least weight there is. Without cgroups a pod that floods, or only spins, is the equal of the enforcer.
Sources: kubelet's MilliCPUToShares; Kubernetes enhancement 2254 for the weights of version 2; cgroups(7).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import yaml

from trireme_lab import Lab, LabSpec, Tools
from trireme_lab.process import NetnsProcess

ENFORCER = "enforcer"
_CHART = Path(__file__).parent.parent / "install/helm/trireme/values.yaml"
_MOUNTS = Path("/proc/self/mounts")
_PREFIX = "trireme-bench-"
_BEST_EFFORT = "besteffort"
_LEAST_SHARES = 2


class SharesError(Exception):
    """Nobody can give out shares of the CPU on this machine."""


def chart_request() -> int:
    """Return the CPU that the chart's enforcer asks for, in thousandths."""
    asked: str = yaml.safe_load(_CHART.read_text(encoding="utf-8"))["enforcerResources"]["requests"]["cpu"]
    return int(asked.removesuffix("m"))


class Shares:
    """Cgroups by name, each with the weight of a request in thousandths of a CPU; 0 is a pod without one.

    Enter it to make them; what is in them has to end before it does. Raises SharesError.
    """

    def __init__(self, requests: Mapping[str, int]) -> None:
        self._requests = requests
        self._made: list[Path] = []
        self.groups: dict[str, Path] = {}

    def __enter__(self) -> Shares:
        try:
            self._root, self._version = _controller()
            self._make()
        except OSError as err:
            self._remove()
            raise SharesError(f"cgroups: {err}") from err
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _make(self) -> None:
        _sweep(self._root)
        self._delegate(self._root)
        top = self._add(self._root / f"{_PREFIX}{os.getpid()}", 1_000)
        self._delegate(top)
        best_effort = self._add(top / _BEST_EFFORT, 0)
        self._delegate(best_effort)
        for name, request in self._requests.items():
            parent = top if request else best_effort
            self.groups[name] = self._add(parent / name.replace("/", "-"), request)

    def _add(self, path: Path, request: int) -> Path:
        path.mkdir()
        self._made.append(path)
        shares = max(request * 1024 // 1000, _LEAST_SHARES)
        if self._version == 1:
            (path / "cpu.shares").write_text(str(shares))
        else:
            (path / "cpu.weight").write_text(str(1 + (shares - _LEAST_SHARES) * 9_999 // 262_142))
        return path

    def _delegate(self, path: Path) -> None:
        if self._version == 2:
            (path / "cgroup.subtree_control").write_text("+cpu")

    def _remove(self) -> None:
        while self._made:
            self._made.pop().rmdir()

    def put(self, name: str, pid: int) -> None:
        """Move a process with all its threads; what it starts afterwards is where it is."""
        (self.groups[name] / "cgroup.procs").write_text(str(pid))

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Have this process in a cgroup meanwhile, if there is one of that name: what it starts stays there."""
        if name not in self.groups:
            yield
            return
        home = self._root / _own_path(self._version).lstrip("/") / "cgroup.procs"
        self.put(name, os.getpid())
        try:
            yield
        finally:
            home.write_text(str(os.getpid()))


class WeighedLab(Lab):
    """A lab of one node, `a`, whose programs run with these shares: the enforcer's, and pods' by their names."""

    def __init__(self, spec: LabSpec, shares: Shares, tools: Tools | None = None) -> None:
        super().__init__(spec, tools)
        self._shares = shares

    def __enter__(self) -> WeighedLab:
        super().__enter__()
        self._shares.put(ENFORCER, self.node("a").daemon.pid)
        return self

    def run(self, place: str, *argv: str) -> str:
        """Run a command with the shares of its place."""
        with self._shares.within(place):
            return super().run(place, *argv)

    def spawn(self, place: str, *argv: str) -> NetnsProcess:
        """Start a program with the shares of its place."""
        with self._shares.within(place):
            return super().spawn(place, *argv)


def _controller() -> tuple[Path, int]:
    """Find where the CPU's controller is mounted, and in which version."""
    for line in _MOUNTS.read_text(encoding="utf-8").splitlines():
        _, place, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            return Path(place), 1
        if kind == "cgroup2" and "cpu" in (Path(place) / "cgroup.controllers").read_text().split():
            return Path(place), 2
    raise SharesError("no cgroup controller for the CPU is mounted")


def _own_path(version: int) -> str:
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if (version == 1 and "cpu" in controllers.split(",")) or (version == 2 and not controllers):
            return path
    raise SharesError("this process is in no cgroup of the CPU's controller")


def _sweep(root: Path) -> None:
    """Remove what runs left that were killed."""
    for left in root.glob(f"{_PREFIX}*"):
        if Path(f"/proc/{left.name.removeprefix(_PREFIX)}").exists():
            continue
        for path in sorted((found for found in left.rglob("*") if found.is_dir()), reverse=True):
            with suppress(OSError):
                path.rmdir()
        with suppress(OSError):
            left.rmdir()
