# SPDX-License-Identifier: Apache-2.0
"""The world that attackers find: a server that admits pods with one label, on one node of two; and an attack on it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from enforcer_daemon.handshake.local import LocalToken
from enforcer_daemon.model import IPAddress, PodRef
from enforcer_daemon.packet.tcp import SYN, Segment
from enforcer_daemon.reasons import Reason
from tests.e2e.attackers import FramedClient, Listener, Signer, Wire, await_denial, identity, read_authority
from trireme_lab import HostSpec, Lab, LabSpec, NodeSpec, PodSpec, PortSpec

DB = "shop/db"
SERVED_PORT = 5432
ATTACKING_HOSTS = ("host:near", "host:distant")


def _policy(name: str, app: str | None, spec: dict[str, object]) -> dict[str, object]:
    selector = {} if app is None else {"matchLabels": {"app": app}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": "shop", "name": name},
        "spec": {"podSelector": selector, **spec},
    }


def _pod(name: str, node: str, app: str, *ports: PortSpec) -> PodSpec:
    return PodSpec(PodRef("shop", name), node, labels={"app": app}, ports=ports)


WORLD = LabSpec(
    nodes=(NodeSpec.numbered("a", 1), NodeSpec.numbered("b", 2)),
    namespaces={"shop": {}},
    pods=(
        _pod("db", "a", "db", PortSpec(SERVED_PORT)),
        _pod("web", "a", "web"),
        _pod("far-web", "b", "web"),
        _pod("caged", "a", "caged"),
    ),
    # Pods that nobody enforces: one on the server's node, one on the other.
    hosts=(HostSpec("near", node="a"), HostSpec("distant", node="b")),
    manifests=(
        _policy("default-deny", None, {"policyTypes": ["Ingress"]}),
        _policy(
            "db-from-web",
            "db",
            {"policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}]}]},
        ),
        _policy("caged", "caged", {"policyTypes": ["Egress"]}),
    ),
)
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
SETTLE_S = 0.2
"""For packets that should not arrive to arrive, seconds."""
attacking = pytest.mark.parametrize("host", ATTACKING_HOSTS)
pods = pytest.mark.parametrize("pod", ["shop/web", "shop/far-web"])
versions = pytest.mark.parametrize("version", [4, 6])


@dataclass(frozen=True, slots=True)
class Attack:
    """An attacker's wire, and the application that must never hear of him."""

    lab: Lab
    wire: Wire
    listener: Listener

    @property
    def target(self) -> tuple[IPAddress, int]:
        return self.listener.ip, self.listener.port

    @property
    def dialed(self) -> tuple[str, int]:
        """Return the target as sockets take it."""
        return str(self.listener.ip), self.listener.port

    def refused_for(self, reason: Reason, address: IPAddress | None = None) -> None:
        """Wait for the reason in what the server's enforcer says, and look at the application's log."""
        seen_from = self.wire.ip if address is None else address
        await_denial(self.lab, DB, reason, self.listener.port, address=seen_from)
        assert self.listener.accepted() == []

    def framed(self, token: LocalToken) -> FramedClient:
        return FramedClient(self.wire, *self.target, token)

    def pod_token(self) -> LocalToken:
        """Make a token that the policy admits, as the holder of the cluster's authority can."""
        return Signer.make(read_authority(self.lab), "made-up").token(identity([self.wire.ip], "made-up"))


@contextmanager
def attack_from(lab: Lab, place: str, port: int, version: int = 4) -> Iterator[Attack]:
    with Wire(lab, place, version) as wire, Listener(lab, DB, port, version) as listener:
        yield Attack(lab, wire, listener)


def captured_syn(lab: Lab, source: str, listener: Listener, version: int = 4) -> Segment:
    """Let a pod connect that may, with a tap on the server's link; give its SYN with the frame. Nothing stays open."""
    with Wire(lab, DB, version) as tap, lab.open_socket(source, FAMILIES[version]) as client:
        client.settimeout(3)
        client.connect((str(listener.ip), listener.port))
        served = listener.accept()
        syn = tap.await_segment(lambda found: found.flags == SYN and found.dport == listener.port)
        client.close()  # the client first, so that the server keeps nothing, not even TIME_WAIT
        assert served.recv(1) == b""
        served.close()
        return syn
