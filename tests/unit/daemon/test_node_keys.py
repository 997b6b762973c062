# SPDX-License-Identifier: Apache-2.0
"""Nodes whose keys, bundles and clocks change: which tokens their peers believe, and why not the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import structlog
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from structlog.testing import LogCapture

from enforcer_daemon.daemon.node import Node
from enforcer_daemon.errors import PeerError
from enforcer_daemon.handshake.local import LocalToken
from enforcer_daemon.identity.authority import Authority
from enforcer_daemon.model import Identity, PodRef
from enforcer_daemon.settings_file import decode_settings
from tests.unit.identity.certificates import WALL, authority

SOURCE = b"\x0a\x00\x00\x01"
IDENTITY = Identity(PodRef("x", "web"), (IPv4Address("10.0.0.1"),), {"app": "web"}, {}, "a")
DAY_S = 86_400.0


class Clock:
    """A wall clock that a test sets."""

    def __init__(self) -> None:
        self.now = WALL

    def __call__(self) -> float:
        return self.now


class ClusterState:
    """Nodes with directories, files and clocks of their own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self.log = LogCapture()
        self.clocks: dict[str, Clock] = {}

    def node(self, name: str, issuer: Authority, *, leeway_s: float = 30.0) -> Node:
        directory = self._directory / name
        directory.mkdir()
        files = {"caCertificate": directory / "ca.pem", "caKey": directory / "ca.key", "trustBundle": self.bundle(name)}
        files["caCertificate"].write_bytes(issuer.certificate.public_bytes(Encoding.PEM))
        files["caKey"].touch(mode=0o600)
        files["caKey"].write_bytes(issuer.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        self.trust(name, issuer)
        settings = decode_settings(
            {
                "node": name,
                "stateDir": str(directory / "state"),
                "credentials": {"clockLeewaySeconds": leeway_s, **{key: str(path) for key, path in files.items()}},
            }
        )
        self.clocks[name] = Clock()
        log = structlog.wrap_logger(None, processors=[self.log], wrapper_class=structlog.BoundLogger)
        node = Node(settings, log, self.clocks[name])
        self._stack.callback(node.close)
        return node

    def bundle(self, name: str) -> Path:
        return self._directory / name / "bundle.pem"

    def trust(self, name: str, *authorities: Authority) -> None:
        self.bundle(name).write_bytes(b"".join(one.certificate.public_bytes(Encoding.PEM) for one in authorities))

    def events(self) -> list[str]:
        return [str(entry["event"]) for entry in self.log.entries]

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[ClusterState]:
    world = ClusterState(tmp_path)
    yield world
    world.close()


def evaluated(node: Node, token: LocalToken, wall_now: float, now: float = 1.0) -> str:
    """Return what a node makes of a token: "believed", or the reason of the refusal."""
    try:
        node.verifier.verify(token.block, SOURCE, now, wall_now)
    except PeerError as err:
        return err.reason.value
    return "believed"


def test_tokens_of_before_a_renewal_are_believed_until_they_end(world: ClusterState) -> None:
    issuer = authority()
    a, b = world.node("a", issuer), world.node("b", issuer)
    renewal = a.keys.renew_at
    world.clocks["a"].now = renewal - 1
    seen, unseen = a.sign(IDENTITY), a.sign(IDENTITY)
    assert evaluated(b, seen, renewal - 1) == "believed"
    world.clocks["a"].now = renewal
    assert a.renew_keys()
    after = a.sign(IDENTITY)
    for token in (seen, unseen, after):
        assert evaluated(b, token, renewal + 590) == "believed"
    for token in (seen, unseen):
        assert evaluated(b, token, renewal + 640) == "token-expired"
    assert world.events() == ["certificate renewed"]


def test_a_renewal_makes_nobody_verify_anything_again(world: ClusterState) -> None:
    issuer = authority()
    a, b = world.node("a", issuer), world.node("b", issuer)
    world.clocks["a"].now = world.clocks["b"].now = b.keys.renew_at
    token = a.sign(IDENTITY)
    for _ in range(2):
        evaluated(b, token, b.keys.renew_at)
        b.renew_keys()
    assert b.verifier.verifications == 1


def test_a_token_ends_no_later_than_its_certificate(world: ClusterState) -> None:
    a = world.node("a", authority())
    end = a.keys.credential.not_after
    world.clocks["a"].now = end - 100
    assert a.sign(IDENTITY).expires_at == end
    world.clocks["a"].now = end - 1_000
    assert a.sign(IDENTITY).expires_at == end - 400


def test_an_authority_that_leaves_the_bundle_takes_its_nodes_along(world: ClusterState) -> None:
    old, new = authority(), authority()
    a, b = world.node("a", old), world.node("b", new)
    token = a.sign(IDENTITY)
    assert evaluated(b, token, WALL) == "credential-untrusted"
    for bundle, verdict in (((old, new), "believed"), ((new,), "credential-untrusted"), ((old, new), "believed")):
        world.trust("b", *bundle)
        assert not b.renew_keys()  # its own certificate is not concerned
        assert evaluated(b, token, WALL) == verdict
    assert world.events() == ["trust bundle in force"] * 3


def test_a_refused_file_is_told_once_and_so_is_its_repair(world: ClusterState) -> None:
    issuer = authority()
    b = world.node("b", issuer)
    world.bundle("b").write_text("garbage")
    assert not any(b.renew_keys() for _ in range(3))
    assert len(b.key_problems()) == 1
    world.trust("b", issuer)
    assert not any(b.renew_keys() for _ in range(3))
    assert b.key_problems() == []
    refused, repaired = world.log.entries
    assert (refused["log_level"], repaired["log_level"]) == ("error", "info")
    assert "credentials.trustBundle" in refused["problem"]


@pytest.mark.parametrize(
    ("ahead_s", "verdict"),
    [
        (0, "believed"),
        (29, "believed"),
        (-29, "believed"),
        (-31, "token-not-yet-valid"),
        (629, "believed"),
        (631, "token-expired"),
        (-3_600, "credential-expired"),
        (2 * DAY_S, "credential-expired"),
    ],
)
def test_clocks_that_disagree_by_more_than_the_leeway_have_a_reason(
    world: ClusterState, ahead_s: float, verdict: str
) -> None:
    issuer = authority()
    a, b = world.node("a", issuer), world.node("b", issuer)
    assert evaluated(b, a.sign(IDENTITY), WALL + ahead_s) == verdict


def test_the_leeway_is_a_setting(world: ClusterState) -> None:
    issuer = authority()
    a = world.node("a", issuer)
    patient = world.node("b", issuer, leeway_s=120.0)
    strict = world.node("c", issuer, leeway_s=0.0)
    token = a.sign(IDENTITY)
    assert [evaluated(node, token, WALL - 100) for node in (patient, strict)] == ["believed", "token-not-yet-valid"]
    assert [evaluated(node, token, WALL + 700) for node in (patient, strict)] == ["believed", "token-expired"]


def test_a_clock_that_is_set_right_forgets_what_it_refused(world: ClusterState) -> None:
    issuer = authority()
    a, b = world.node("a", issuer), world.node("b", issuer)
    token = a.sign(IDENTITY)
    world.clocks["b"].now = WALL + 7_200
    b.follow_clock()
    assert evaluated(b, token, WALL + 7_200) == evaluated(b, token, WALL) == "token-expired"
    world.clocks["b"].now = WALL
    b.follow_clock()
    assert evaluated(b, token, WALL) == "believed"
    assert world.events() == ["the wall clock was set; peers are verified anew"] * 2
    b.follow_clock()
    assert b.verifier.verifications == 2
