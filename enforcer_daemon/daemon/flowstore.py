# SPDX-License-Identifier: Apache-2.0
"""An endpoint's flow index on disk, for the daemon that comes after this one: a line of JSON an entry, only appended.

The file has the lifetime of the network namespace (under /run). A line that cannot be read is left out: flows with its
index are then unknown, and end at the next judgement that finds the pod isolated.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from enforcer_daemon.datapath.flowindex import FIRST, FlowIndex, JudgedFlow
from enforcer_daemon.marks import MAX_INDEX
from enforcer_daemon.model import Direction, Identity, NamedPort, PodRef, Protocol
from enforcer_daemon.telemetry.logs import Logger


class FlowStore:
    """The file of one endpoint."""

    def __init__(self, path: Path, log: Logger) -> None:
        self._path = path
        self._log = log
        self._is_torn = False
        """Whether the file ends in the middle of a line, which the next entry must not be joined to."""

    def load(self, highest_in_use: int) -> FlowIndex:
        """Read what an earlier daemon wrote; an absent file is an empty index.

        `highest_in_use` is the highest index in the kernel's marks.
        """
        known: dict[int, JudgedFlow] = {}
        for number, line in enumerate(self._lines(), 1):
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

    def append(self, entries: Iterable[tuple[int, JudgedFlow]]) -> None:
        """Add entries; where that fails the running daemon still knows them."""
        text = "\n" if self._is_torn else ""
        text += "".join(json.dumps(_encode(index, flow), separators=(",", ":")) + "\n" for index, flow in entries)
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
            self._is_torn = False
        except OSError as err:
            self._is_torn = True  # Some of it may be there.
            self._log.error("flow index not written", path=str(self._path), error=str(err))

    def remove(self) -> None:
        """Forget the endpoint."""
        self._path.unlink(missing_ok=True)


def _encode(index: int, flow: JudgedFlow) -> dict[str, Any]:
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


def _decode(tree: dict[str, Any]) -> tuple[int, JudgedFlow]:
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
    flow = JudgedFlow(Direction(tree["direction"]), peer, address, int(tree["port"]), Protocol(tree["protocol"]))
    index = int(tree["index"])
    if not FIRST <= index <= MAX_INDEX:
        raise ValueError(f"index: {index} is not {FIRST} to {MAX_INDEX}")
    return index, flow
