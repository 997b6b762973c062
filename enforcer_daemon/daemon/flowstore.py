# SPDX-License-Identifier: Apache-2.0
"""An endpoint's flow index on disk, for the daemon that comes after this one: a line of JSON an entry, only appended.

The file has the lifetime of the network namespace (under /run). A line that cannot be read is left out: flows with its
index are then unknown, and end at the next judgement that finds the pod isolated.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from enforcer_daemon.daemon.slices import batches, in_slices
from enforcer_daemon.datapath.flowindex import FIRST, FlowIndex
from enforcer_daemon.marks import MAX_INDEX
from enforcer_daemon.model import Direction, EvaluatedFlow, Identity, NamedPort, NetnsId, PodRef, Protocol
from enforcer_daemon.replacement import Replacement
from enforcer_daemon.telemetry.logs import Logger

MAX_SPARE_LINES = 4_096
"""Lines that later ones replace, before the file is written anew: a label that toggles adds some each time."""


class FlowStore:
    """The file of one endpoint."""

    def __init__(self, path: Path, log: Logger) -> None:
        self._path = path
        self._log = log
        self._is_torn = False
        """Whether the file ends in the middle of a line, which the next entry must not be joined to."""
        self._lines_written = 0
        self._since: list[str] | None = None
        """Lines that were added while the file is written anew."""
        self._is_removed = False

    @classmethod
    def of(cls, run_dir: Path, netns: NetnsId, log: Logger) -> FlowStore:
        """Return the file of a namespace's endpoint."""
        return cls(run_dir / "flows" / f"{netns.device}-{netns.inode}.jsonl", log)

    @property
    def log(self) -> Logger:
        """Return where problems with the endpoint's files are told."""
        return self._log

    @property
    def lease_path(self) -> Path:
        """Return where the endpoint's leases are kept, which end with it."""
        return self._path.with_suffix(".leases")

    def load(self, highest_in_use: int) -> FlowIndex:
        """Read what an earlier daemon wrote; an absent file is an empty index.

        `highest_in_use` is the highest index in the kernel's marks.
        """
        known: dict[int, EvaluatedFlow] = {}
        lines = self._lines()
        self._lines_written = len(lines)
        for number, line in enumerate(lines, 1):
            try:
                index, flow = _decode(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as err:
                self._log.error("flow index entry unreadable", path=str(self._path), line=number, error=repr(err))
            else:
                known[index] = flow
        return FlowIndex(known.items(), highest_in_use)

    def _lines(self) -> list[bytes]:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as err:
            self._log.error("flow index unreadable", path=str(self._path), error=str(err))
            return []
        self._is_torn = not content.endswith(b"\n") and bool(content)
        return content.splitlines()

    def append(self, entries: Iterable[tuple[int, EvaluatedFlow]]) -> None:
        """Add entries; where that fails the running daemon still knows them."""
        if self._is_removed:
            return  # The namespace is gone, and its number may be another's.
        lines = _encode_lines(entries)
        self._lines_written += len(lines)
        if self._since is not None:
            self._since += lines
        text = "".join(["\n" if self._is_torn else "", *lines])
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
            self._is_torn = False
        except OSError as err:
            self._is_torn = True  # Some of it may be there.
            self._log.error("flow index not written", path=str(self._path), error=str(err))

    def replace(self, entries: Iterable[tuple[int, EvaluatedFlow]], index: FlowIndex) -> None:
        """Replace entries, which `index` has already, by later lines; write the file anew if too many are spare."""
        self.append(entries)
        for _ in self._compacting(index):
            pass

    async def compact(self, index: FlowIndex) -> None:
        """Write the file anew if too many lines are spare; packets are evaluated and entries added meanwhile."""
        await in_slices(self._compacting(index))

    def _compacting(self, index: FlowIndex) -> Iterator[None]:
        is_spare = self._lines_written > len(index) + MAX_SPARE_LINES
        if is_spare and self._since is None and not self._is_removed:
            self._since = []
            try:
                yield from self._rewrite(index)
            finally:
                self._since = None

    def _rewrite(self, index: FlowIndex) -> Iterator[None]:
        entries = list(index)
        try:
            with Replacement(self._path, is_durable=False) as file:
                for batch in batches(entries):
                    file.write("".join(_encode_lines(batch)).encode())
                    yield
                if self._is_removed:
                    return
                since = self._since or []
                file.write("".join(since).encode())
                file.commit()
        except OSError as err:
            self._log.error("flow index not written", path=str(self._path), error=str(err))
        else:
            self._is_torn, self._lines_written = False, len(entries) + len(since)

    def remove(self) -> None:
        """Forget the endpoint."""
        self._is_removed = True
        self._path.unlink(missing_ok=True)
        self.lease_path.unlink(missing_ok=True)


def _encode_lines(entries: Iterable[tuple[int, EvaluatedFlow]]) -> list[str]:
    return [json.dumps(_encode(index, flow), separators=(",", ":")) + "\n" for index, flow in entries]


def _encode(index: int, flow: EvaluatedFlow) -> dict[str, Any]:
    peer = flow.peer
    return {
        "index": index,
        "direction": flow.direction.value,
        "address": str(flow.address),
        "port": flow.port,
        "protocol": flow.protocol.value,
        "namespace": peer.pod.namespace,
        "pod": peer.pod.name,
        "ips": [str(ip) for ip in peer.ips],
        "labels": dict(peer.labels),
        "namespaceLabels": dict(peer.namespace_labels),
        "node": peer.node,
        "serviceAccount": peer.service_account,
        "trustDomain": peer.trust_domain,
        "ports": [[port.name, port.number, port.protocol.value] for port in peer.named_ports],
    }


def _decode(tree: dict[str, Any]) -> tuple[int, EvaluatedFlow]:
    peer = Identity(
        pod=PodRef(tree["namespace"], tree["pod"]),
        ips=tuple(ipaddress.ip_address(ip) for ip in tree["ips"]),
        labels=dict(tree["labels"].items()),
        namespace_labels=dict(tree["namespaceLabels"].items()),
        node=tree["node"],
        service_account=tree["serviceAccount"],
        trust_domain=tree["trustDomain"],
        named_ports=tuple(NamedPort(name, int(number), Protocol(proto)) for name, number, proto in tree["ports"]),
    )
    address = ipaddress.ip_address(tree["address"])
    flow = EvaluatedFlow(Direction(tree["direction"]), peer, address, int(tree["port"]), Protocol(tree["protocol"]))
    index = int(tree["index"])
    if not FIRST <= index <= MAX_INDEX:
        raise ValueError(f"index: {index} is not {FIRST} to {MAX_INDEX}")
    return index, flow
