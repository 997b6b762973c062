# SPDX-License-Identifier: Apache-2.0
"""A node of the lab: its network namespace, its directories and its daemon."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trireme_lab.errors import LabError
from trireme_lab.manifests import ObjectRef, put_manifest, remove_manifest
from trireme_lab.process import NetnsProcess
from trireme_lab.spec import Manifest, NodeSpec
from triremectl.admin_client import AdminError, call

_READY_TIMEOUT_S = 400.0
_POLL_S = 0.02
_SETTLE_TIMEOUT_S = 15.0
_SETTLE_QUIET_S = 0.06
_SETTLE_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class NodeDirectories:
    """Where one node keeps its things; all below one directory of the run."""

    root: Path

    @property
    def run(self) -> Path:
        """Sockets and registry of the daemon (registration.runDir)."""
        return self.root / "run"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def policy(self) -> Path:
        return self.root / "policy"

    @property
    def staging(self) -> Path:
        """Drafts of policy files: on the same file system, but not watched."""
        return self.root / "staging"

    @property
    def cni(self) -> Path:
        """Data of the IPAM, and what the runtime remembers."""
        return self.root / "cni"

    @property
    def settings(self) -> Path:
        return self.root / "enforcer.yaml"

    @property
    def log(self) -> Path:
        return self.root / "enforcer.log"

    def make(self) -> None:
        for path in (self.run, self.state, self.policy, self.staging, self.cni):
            path.mkdir(mode=0o700, parents=True)


class Node:
    """One node. The daemon is absent in a world without enforcement."""

    def __init__(
        self, spec: NodeSpec, netns: str, directories: NodeDirectories, enforcer: Sequence[str] | None
    ) -> None:
        self.spec = spec
        self.netns = netns
        self.directories = directories
        self._enforcer = enforcer
        self._process: NetnsProcess | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def has_enforcer(self) -> bool:
        return self._enforcer is not None

    @property
    def daemon(self) -> NetnsProcess:
        """The running or last daemon; raise LabError if none was started."""
        if self._process is None:
            raise LabError(f"node {self.name}: has no daemon")
        return self._process

    def write_settings(self, settings: Mapping[str, object]) -> None:
        """Write the daemon's settings file; read by the next start."""
        self.directories.settings.write_text(json.dumps(settings, indent=2), encoding="utf-8")

    def start(self) -> None:
        """Start the daemon; `wait_ready` waits for it. Does nothing in a world without enforcement."""
        if self._enforcer is not None:
            argv = [*self._enforcer, "--config", str(self.directories.settings)]
            self._process = NetnsProcess(self.netns, argv, self.directories.log)

    def wait_ready(self, timeout_s: float = _READY_TIMEOUT_S) -> None:
        """Wait until the daemon says that it is ready; raise LabError with the end of its log if it is not in time."""
        if self._enforcer is None:
            return
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.daemon.exit_status is not None:
                raise LabError(f"node {self.name}: the daemon ended:\n{self.daemon.tail()}")
            with contextlib.suppress(AdminError):
                if self.status().get("ready"):
                    return
            time.sleep(_POLL_S)
        raise LabError(f"node {self.name}: the daemon is not ready after {timeout_s} s:\n{self.daemon.tail()}")

    def stop(self) -> int:
        """End the daemon in good order; return its exit status."""
        return self.daemon.stop()

    def kill(self) -> None:
        """End the daemon as a crash would."""
        self.daemon.stop(signal.SIGKILL)

    def restart(self) -> None:
        """Stop the daemon, start it again, and wait until it is ready."""
        self.stop()
        self.start()
        self.wait_ready()

    def close(self) -> None:
        """End the daemon if one runs."""
        if self._process is not None:
            self._process.stop()

    def admin(self, command: str, **arguments: object) -> object:
        """Ask the daemon over its admin socket; raise AdminError if it does not answer."""
        return call(self.directories.run, command, **arguments)

    def status(self) -> Mapping[str, object]:
        answer = self.admin("status")
        return answer if isinstance(answer, Mapping) else {}

    def endpoints(self) -> list[Mapping[str, object]]:
        answer = self.admin("endpoints")
        return [item for item in answer if isinstance(item, Mapping)] if isinstance(answer, list) else []

    def log_records(self) -> list[Mapping[str, object]]:
        """Return what the daemon logged as JSON, oldest first; other lines are left out (`log_text` has them)."""
        records: list[Mapping[str, object]] = []
        for line in self.log_text().splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    records.append(record)
        return records

    def log_text(self) -> str:
        path = self.directories.log
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def put(self, manifest: Manifest) -> None:
        """Add or replace an object in this node's policy directory."""
        put_manifest(self.directories.policy, self.directories.staging, manifest)

    def remove(self, reference: ObjectRef) -> bool:
        """Take an object out of this node's policy directory; say whether it was there."""
        return remove_manifest(self.directories.policy, reference)

    def refused_objects(self) -> list[str]:
        """Return what the daemon says of objects that it refuses: which, the field, and why."""
        snapshot = self.status().get("snapshot")
        problems = snapshot.get("problems") if isinstance(snapshot, Mapping) else None
        # The first words are file and line, which are the lab's own.
        return [str(problem).partition(": ")[2] for problem in problems] if isinstance(problems, list) else []

    def generation(self) -> int:
        """Return the number of the policy snapshot in force; it rises with each change that the daemon takes over."""
        snapshot = self.status().get("snapshot")
        generation = snapshot.get("generation") if isinstance(snapshot, Mapping) else None
        return generation if isinstance(generation, int) else 0

    def wait_for_change(self, generation: int) -> bool:
        """Wait until the daemon's snapshot is newer than `generation` and no newer one follows; False if none comes."""
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        latest, since = generation, time.monotonic()
        while (now := time.monotonic()) < deadline:
            if (current := self.generation()) != latest:
                latest, since = current, now
            if latest != generation and now - since >= _SETTLE_QUIET_S:
                return True
            time.sleep(_SETTLE_POLL_S)
        return latest != generation
