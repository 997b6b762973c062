# SPDX-License-Identifier: Apache-2.0
"""No key and no token shows in what is printed or logged."""

from __future__ import annotations

from base64 import b64encode, urlsafe_b64encode
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from enforcer_daemon.handshake.frames import decode_block
from enforcer_daemon.handshake.local import sign_local_token
from enforcer_daemon.identity.keystore import open_node_identity
from enforcer_daemon.model import PodRef
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings import LogLevel, LogSettings
from enforcer_daemon.settings_file import decode_settings
from enforcer_daemon.telemetry.flowlog import FlowLog
from enforcer_daemon.telemetry.logs import open_log
from enforcer_daemon.telemetry.metrics import Metrics
from tests.unit.datapath.pair import TIMESTAMPS, WALL, Connection, Endpoint, make_pair, segment
from tests.unit.identity.certificates import authority


def encodings(secret: bytes) -> set[str]:
    """Return the ways in which bytes could show; a part of them is enough to give them away."""
    part = secret[:12]
    texts = {part.hex(), str(int.from_bytes(secret, "big")), repr(part)[2:-1]}
    return texts | {encode(part).decode().rstrip("=") for encode in (b64encode, urlsafe_b64encode)}


def assert_hidden(text: str, *secrets: bytes) -> None:
    for secret in secrets:
        assert len(secret) >= 12
        for shown in encodings(secret):
            assert shown not in text


def private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_numbers().private_value.to_bytes(32, "big")


def test_authority_and_node_identity(tmp_path: Path) -> None:
    signer = authority()
    assert_hidden(f"{signer} {signer!r} {[signer]}", private_bytes(signer.key))
    node = open_node_identity(decode_settings({"node": "node-1", "stateDir": str(tmp_path)}), WALL)
    assert_hidden(f"{node} {node!r} {[node]}", private_bytes(node.key))


def test_tokens_peers_and_flows() -> None:
    client, server = make_pair()
    connection = Connection(client, server)
    server.receive(client.send(connection.syn())[0])
    client.receive(server.send(connection.syn_ack())[0])
    flows = [*client.datapath.sessions(), *server.datapath.sessions()]
    peers = [flow.peer for flow in flows]
    text = " ".join(f"{thing} {thing!r} {[thing]}" for thing in (client.context.local, *flows, *peers))
    keys = [flow.local.pair_key(flow.peer, is_initiator=True) for flow in flows if flow.peer is not None]
    assert len(keys) == len(flows)
    assert_hidden(text, *secrets_of(client, server), *keys)


def secrets_of(*endpoints: Endpoint) -> list[bytes]:
    found = []
    for endpoint in endpoints:
        local = endpoint.context.local
        found += [local._key.private_bytes_raw(), decode_block(local.block)[1][-64:], local.block[-200:-64]]
    return found


def test_a_local_token(tmp_path: Path) -> None:
    node = open_node_identity(decode_settings({"node": "node-1", "stateDir": str(tmp_path)}), WALL)
    client, _ = make_pair()
    key = X25519PrivateKey.generate()
    token = sign_local_token(client.identity, node.credential, node.key, key, b"n", (WALL, WALL + 600))
    assert_hidden(f"{token} {token!r}", key.private_bytes_raw(), token.block[-64:])
    assert "default/client" in repr(token)


@pytest.mark.parametrize("is_aligned", [False, True])
def test_log_lines_of_whole_and_broken_handshakes(is_aligned: bool, capsys: pytest.CaptureFixture[str]) -> None:
    client, server = make_pair()
    log = open_log(LogSettings(level=LogLevel.DEBUG), is_aligned=is_aligned)
    flow_log = FlowLog(PodRef("default", "server"), log, Metrics(), lambda: WALL)
    proofs = []
    for sport in range(40):
        connection = Connection(client, server, sport=sport)
        (syn,) = client.send(connection.syn())
        at = 60 + sport * 23 % (len(syn) - 60)
        server.receive(syn[:at] + bytes((syn[at] ^ 0xFF,)) + syn[at + 1 :])
        server.receive(syn)
        client.receive(server.send(connection.syn_ack())[0])
        server.receive(connection.ack(b"the application's secret"))
        (ack,) = client.send(connection.ack(options=TIMESTAMPS))
        proofs.append(segment(ack).options[4:20])
        server.receive(ack)
    for endpoint in (client, server):
        reports = endpoint.take_reports()
        assert all(report.reason is not Reason.INTERNAL_ERROR for report in reports)
        flow_log.take(reports)
    text = capsys.readouterr().err
    assert "flow denied" in text
    assert "flow allowed" in text
    assert_hidden(text, *secrets_of(client, server), *proofs, b"the application's secret")


def test_private_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    state = tmp_path / "state"
    open_node_identity(decode_settings({"node": "node-1", "stateDir": str(state)}), WALL)
    assert state.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in state.iterdir()} == dict.fromkeys(
        ("ca.key", "ca.pem", "node.key", "node.pem"), 0o600
    )
