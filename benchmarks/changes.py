# SPDX-License-Identifier: Apache-2.0
"""From a change of policy to its effect: on new connections, and on one established connection among a thousand.

Two nodes, the server's policy as a file in its node's directory. Time runs from the file's rename to what a client
sees: the first connection that is judged anew, and the end of an established one at either side. The thousand others,
to the same pod, are allowed before and after, and must all still work at the end.
"""

from __future__ import annotations

import resource
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

from enforcer_daemon.model import PodRef
from trireme_lab.lab import Lab
from trireme_lab.manifests import put_manifest
from trireme_lab.netns import open_socket
from trireme_lab.probe import Outcome, run_probe
from trireme_lab.spec import LabSpec, Manifest, NodeSpec, PodSpec, PortSpec

ROUNDS = 21
OTHERS = 1_000
NEIGHBOURS = 30
"""Pods of the server's node that the policy selects too, so that their flows are judged again as well."""
_PORT = 7000
_PATIENCE_S = 10.0
_TRIAL_S = 0.2
"""A connection that the change finds half open may wait for the server's first word in vain, seconds."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result, in milliseconds."""

    what: str
    median_ms: float
    p99_ms: float


def _policy(*roles: str) -> Manifest:
    peers = [{"podSelector": {"matchLabels": {"role": role}}} for role in roles]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": "bench", "name": "access"},
        "spec": {
            "podSelector": {"matchLabels": {"tier": "server"}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": peers}],
        },
    }


_BOTH, _ONE = _policy("steady", "doomed"), _policy("steady")


def _world(neighbors: int) -> LabSpec:
    servers = tuple(
        PodSpec(PodRef("bench", f"neighbor-{number}"), "b", {"tier": "server"}) for number in range(neighbors)
    )
    return LabSpec(
        nodes=(NodeSpec.numbered("a", 1), NodeSpec.numbered("b", 2)),
        pods=(
            PodSpec(PodRef("bench", "steady"), "a", {"role": "steady"}),
            PodSpec(PodRef("bench", "doomed"), "a", {"role": "doomed"}),
            PodSpec(PodRef("bench", "server"), "b", {"tier": "server"}, ports=(PortSpec(_PORT),)),
            *servers,
        ),
        manifests=(_BOTH,),
        settings={"denyWith": "reset"},
    )


def run(neighbors: int = NEIGHBOURS) -> list[Row]:
    """Measure; takes about a minute, as root."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with Lab(_world(neighbors)) as lab, ExitStack() as stack:
        follow = list(_new_connections(lab))
        listener = stack.enter_context(_listen(lab))
        others = [stack.enter_context(end) for _ in range(OTHERS) for end in _connect(lab, "bench/steady", listener)]
        cut = list(_established(lab, listener))
        for client, server in zip(others[::2], others[1::2], strict=True):
            client.sendall(b"x")
            assert server.recv(1) == b"x", "a flow that stays allowed was disturbed"
    return [
        _row("change -> new connections follow", follow),
        _row(f"change -> established flow cut ({OTHERS} others, {neighbors + 1} pods)", cut),
    ]


def _new_connections(lab: Lab) -> Iterator[float]:
    for number in range(ROUNDS):
        manifest, expected = ((_ONE, Outcome.REFUSED), (_BOTH, Outcome.CONNECTED))[number % 2]
        started = _put(lab, manifest)
        _await(lab, expected)
        yield time.perf_counter() - started


def _await(lab: Lab, expected: Outcome) -> None:
    request = replace(lab.request("bench/doomed", "bench/server", _PORT), timeout_s=_TRIAL_S)
    deadline = time.perf_counter() + _PATIENCE_S
    while run_probe(request).outcome is not expected:
        assert time.perf_counter() < deadline, "the change has no effect"


def _established(lab: Lab, listener: socket.socket) -> Iterator[float]:
    for _ in range(ROUNDS):
        _put(lab, _BOTH)
        _await(lab, Outcome.CONNECTED)
        client, server = _connect(lab, "bench/doomed", listener)
        with client, server:
            started = _put(lab, _ONE)
            for end in (server, client):
                try:
                    end.recv(1)
                except ConnectionError:  # aborted at the pod that ends it, reset at the other
                    continue
                raise AssertionError("the connection ended in good order")
            yield time.perf_counter() - started


def _put(lab: Lab, manifest: Manifest) -> float:
    """Put the policy in force at the server's node; return when."""
    directories = lab.node("b").directories
    started = time.perf_counter()
    put_manifest(directories.policy, directories.staging, manifest)
    return started


def _listen(lab: Lab) -> socket.socket:
    listener = open_socket(lab.place("bench/server").netns, socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((str(lab.address_of("bench/server")), 0))
    listener.listen(OTHERS)
    listener.settimeout(_PATIENCE_S)
    return listener


def _connect(lab: Lab, source: str, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """Open a connection to the server; give both ends, which the caller owns."""
    client = open_socket(lab.place(source).netns, socket.AF_INET, socket.SOCK_STREAM)
    try:
        client.settimeout(_PATIENCE_S)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
    except BaseException:
        client.close()
        raise
    server.settimeout(_PATIENCE_S)
    return client, server


def _row(what: str, seconds: list[float]) -> Row:
    ordered = sorted(seconds)
    return Row(what, statistics.median(ordered) * 1e3, ordered[(len(ordered) * 99 - 1) // 100] * 1e3)


def main() -> None:
    """Print the table."""
    print(f"{'':64}{'median ms':>12}{'p99 ms':>10}")
    for row in run():
        print(f"{row.what:64}{row.median_ms:12.1f}{row.p99_ms:10.1f}")


if __name__ == "__main__":
    main()
