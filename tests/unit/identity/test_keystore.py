# SPDX-License-Identifier: Apache-2.0
"""The node's key and certificate: made once, kept, renewed, and an operator's own authority."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from enforcer_daemon.errors import SettingsError
from enforcer_daemon.identity.keystore import check_files, open_node_identity
from enforcer_daemon.settings import Settings
from enforcer_daemon.settings_file import decode_settings
from tests.unit.identity.certificates import WALL, authority, new_key


def settings_in(tmp_path: Path, **more: Any) -> Settings:
    return decode_settings({"node": "node-1", "stateDir": str(tmp_path / "state"), **more})


def pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def operators_authority(tmp_path: Path) -> dict[str, str]:
    signer = authority()
    (tmp_path / "ca.pem").write_bytes(signer.certificate.public_bytes(Encoding.PEM))
    (tmp_path / "ca.key").touch(mode=0o600)
    (tmp_path / "ca.key").write_bytes(pem(signer.key))
    return {"caCertificate": str(tmp_path / "ca.pem"), "caKey": str(tmp_path / "ca.key")}


def test_what_was_made_is_found_again(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    first, second = (open_node_identity(settings, WALL + n) for n in range(2))
    assert first.credential.der == second.credential.der
    assert first.key.private_numbers() == second.key.private_numbers()
    assert (first.credential.node, first.credential.trust_domain) == ("node-1", "cluster.local")


def test_a_certificate_is_renewed_at_two_thirds_with_a_key_of_its_own(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    first = open_node_identity(settings, WALL)
    same = open_node_identity(settings, first.renew_at - 1)
    renewed = open_node_identity(settings, first.renew_at + 1)
    assert same.credential.der == first.credential.der != renewed.credential.der
    assert renewed.key.private_numbers() != first.key.private_numbers()
    renewed.bundle.verify(first.credential, WALL, 0.0)


def test_another_node_name_is_another_certificate(tmp_path: Path) -> None:
    first = open_node_identity(settings_in(tmp_path), WALL)
    assert open_node_identity(settings_in(tmp_path, node="node-2"), WALL).credential.der != first.credential.der


def test_another_trust_domain_needs_another_authority(tmp_path: Path) -> None:
    open_node_identity(settings_in(tmp_path), WALL)
    with pytest.raises(
        SettingsError,
        match=r"trustDomain: is other\.example, .*ca\.pem vouches for .*; move it",
    ):
        open_node_identity(settings_in(tmp_path, trustDomain="other.example"), WALL)


def test_an_operators_authority_and_a_bundle_of_two(tmp_path: Path) -> None:
    credentials = operators_authority(tmp_path)
    bundle = tmp_path / "bundle.pem"
    other = authority("other.example")
    bundle.write_bytes((tmp_path / "ca.pem").read_bytes() + other.certificate.public_bytes(Encoding.PEM))
    node = open_node_identity(settings_in(tmp_path, credentials={**credentials, "trustBundle": str(bundle)}), WALL)
    assert len(node.bundle.authorities) == 2
    assert not (tmp_path / "state" / "ca.key").exists()


def test_a_new_authority_makes_the_certificate_anew(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, credentials=operators_authority(tmp_path))
    first = open_node_identity(settings, WALL)
    operators_authority(tmp_path)
    assert open_node_identity(settings, WALL).credential.der != first.credential.der


def test_a_certificate_that_cannot_be_read_is_made_anew(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    open_node_identity(settings, WALL)
    (tmp_path / "state" / "node.pem").write_text("garbage")
    open_node_identity(settings, WALL)
    assert b"BEGIN CERTIFICATE" in (tmp_path / "state" / "node.pem").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ca.pem", b"garbage", "credentials: .*ca.pem"),
        ("ca.key", b"garbage", "credentials: .*ca.key"),
        ("ca.key", pem(ed25519.Ed25519PrivateKey.generate()), "not an elliptic curve key"),
        ("ca.key", pem(new_key()), "is not the key of"),
    ],
)
def test_an_operators_file_that_does_not_fit_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    credentials = operators_authority(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        open_node_identity(settings_in(tmp_path, credentials=credentials), WALL)


def test_a_bundle_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    for make in (lambda: None, lambda: bundle.write_text("garbage")):
        make()
        with pytest.raises(SettingsError, match=r"credentials\.trustBundle: .*bundle\.pem"):
            open_node_identity(settings_in(tmp_path, credentials={"trustBundle": str(bundle)}), WALL)


def test_a_bundle_without_the_nodes_own_authority_is_refused(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(authority().certificate.public_bytes(Encoding.PEM))
    with pytest.raises(SettingsError, match=r"credentials\.trustBundle: does not vouch"):
        open_node_identity(settings_in(tmp_path, credentials={"trustBundle": str(bundle)}), WALL)


@pytest.mark.parametrize("content", [pem(ec.generate_private_key(ec.SECP384R1())), b"garbage", b""])
def test_a_nodes_key_of_another_kind_is_named(tmp_path: Path, content: bytes) -> None:
    settings = settings_in(tmp_path)
    settings.state_dir.mkdir()
    (settings.state_dir / "node.key").touch(mode=0o600)
    (settings.state_dir / "node.key").write_bytes(content)
    with pytest.raises(SettingsError, match=r"node\.key .*P-256"):
        open_node_identity(settings, WALL)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o620, 0o666])
@pytest.mark.parametrize("name", ["ca.key", "node.key"])
def test_a_key_that_others_may_use_is_refused(tmp_path: Path, name: str, mode: int) -> None:
    settings = settings_in(tmp_path)
    open_node_identity(settings, WALL)
    (settings.state_dir / name).chmod(mode)
    with pytest.raises(
        SettingsError, match=rf"{name}: others than its owner may use this key \(mode 0{mode:o}\): chmod 0600"
    ):
        open_node_identity(settings, WALL)


def test_an_operators_authority_for_another_trust_domain_is_named(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, trustDomain="other.example", credentials=operators_authority(tmp_path))
    message = (
        rf"trustDomain: is other\.example, but the authority in {tmp_path}/ca\.pem vouches for cluster\.local alone$"
    )
    with pytest.raises(SettingsError, match=message):
        open_node_identity(settings, WALL)
    assert len(check_files(settings)) == 1


def test_a_state_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(SettingsError, match=r"stateDir: .*/state: cannot be used: File exists"):
        open_node_identity(settings_in(tmp_path), WALL)
