# SPDX-License-Identifier: Apache-2.0
"""UDP by identity, with real sockets: who may exchange datagrams with whom, within a node and across, both families."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.model import PodRef, Protocol
from tests.e2e.operation_world import NODES, app, denials, pod, policy
from triremectl.lab import HostSpec, Lab, PortSpec, ServicePort, ServiceSpec, Tools, WorldSpec

pytestmark = pytest.mark.kernel

ECHO = PortSpec(7007, Protocol.UDP)
SERVICE_PORT = 53
VERSIONS = [4, 6]
CLIENTS = ["x/client", "x/far-client"]


def _allowing(direction: str, name: str) -> list[object]:
    return [{direction: [app(name)], "ports": [{"port": ECHO.number, "protocol": "UDP"}]}]


PODS = (
    pod("server", "a", ECHO),
    pod("far-server", "b", ECHO, app="server"),
    pod("client", "a"),
    pod("far-client", "b", app="client"),
    pod("stranger", "a"),
    pod("bound", "b"),
    pod("bound-elsewhere", "b"),
    pod("open", "a", ECHO),
)
SERVICE = ServiceSpec(
    "x",
    "echo",
    (ip_address("10.96.0.10"), ip_address("fd00:10:96::10")),
    (PodRef("x", "server"), PodRef("x", "far-server")),
    (ServicePort(SERVICE_PORT, ECHO.number, Protocol.UDP),),
)
MANIFESTS = (
    policy("server", "server", ingress=[*_allowing("from", "client"), *_allowing("from", "bound")]),
    policy("bound", "bound", egress=_allowing("to", "server")),
    policy("bound-elsewhere", "bound-elsewhere", egress=_allowing("to", "client")),
)


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    hosts = (HostSpec("unenforced", node="a", ports=(ECHO,)), HostSpec("outside", (ip_address("203.0.113.7"),)))
    with Lab(WorldSpec(NODES, {"x": {}}, PODS, hosts, (SERVICE,), MANIFESTS), Tools(plugin=plugin)) as lab:
        yield lab


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("server", ["x/server", "x/far-server"])
@pytest.mark.parametrize("client", [*CLIENTS, "x/bound"])
def test_an_allowed_pod_gets_its_answer(lab: Lab, client: str, server: str, version: int) -> None:
    result = lab.probe(client, server, ECHO.number, version, Protocol.UDP)
    assert (result.outcome.value, result.banner) == ("connected", server)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("server", ["x/server", "x/far-server"])
def test_a_stranger_gets_none(lab: Lab, server: str, version: int) -> None:
    assert lab.probe("x/stranger", server, ECHO.number, version, Protocol.UDP).outcome.is_denied
    assert denials(lab, server)[-1] == "ingress-denied"
