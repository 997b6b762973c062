# SPDX-License-Identifier: Apache-2.0
"""Keys and certificates that others bring: what is taken, what is refused and why, and that files are followed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from enforcer_daemon.errors import SettingsError
from enforcer_daemon.identity.external import open_external_identity
from enforcer_daemon.identity.renewal import NodeKeys
from enforcer_daemon.settings import Settings
from enforcer_daemon.settings_file import decode_settings
from tests.unit.identity.certificates import DAY, WALL, authority, credential, new_key

SIGNER = authority()


def write(path: Path, content: bytes, mode: int = 0o600) -> None:
    path.write_bytes(content)
    path.chmod(mode)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def certificate_pem(
    key: ec.EllipticCurvePrivateKey, node: str = "node-1", trust_domain: str = "cluster.local"
) -> bytes:
    return credential(SIGNER, key, node, trust_domain).certificate.public_bytes(Encoding.PEM)


def bring(directory: Path, node: str = "node-1", trust_domain: str = "cluster.local") -> Settings:
    """Lay down a good set of files."""
    key = new_key()
    write(directory / "tls.key", key_pem(key))
    write(directory / "tls.crt", certificate_pem(key, node, trust_domain))
    write(directory / "bundle.pem", SIGNER.certificate.public_bytes(Encoding.PEM))
    files = {"certificate": "tls.crt", "key": "tls.key", "trustBundle": "bundle.pem"}
    credentials = {"source": "files", **{name: str(directory / file) for name, file in files.items()}}
    return decode_settings({"node": "node-1", "stateDir": str(directory / "state"), "credentials": credentials})


def test_what_is_brought_is_used_and_nothing_is_written(tmp_path: Path) -> None:
    settings = bring(tmp_path)
    before = sorted(tmp_path.iterdir())
    identity = open_external_identity(settings, WALL)
    assert (identity.credential.node, len(identity.bundle.authorities)) == ("node-1", 1)
    assert sorted(tmp_path.iterdir()) == before


def test_another_is_asked_for_at_two_thirds(tmp_path: Path) -> None:
    identity = open_external_identity(bring(tmp_path), WALL)
    part = (identity.renew_at - identity.credential.not_before) / (
        identity.credential.not_after - identity.credential.not_before
    )
    assert part == pytest.approx(2 / 3)


def test_an_expired_certificate_is_still_one(tmp_path: Path) -> None:
    keys = NodeKeys(bring(tmp_path), WALL + 2 * DAY.total_seconds())
    assert "expired" in " ".join(keys.problems(WALL + 2 * DAY.total_seconds()))


def test_new_files_are_taken_over(tmp_path: Path) -> None:
    keys = NodeKeys(bring(tmp_path), WALL)
    before = keys.identity
    assert not any(keys.look(WALL + 1))
    bring(tmp_path)
    assert keys.look(WALL + 2).is_credential_new
    assert keys.identity.credential.der != before.credential.der


def test_half_a_set_changes_nothing_until_the_rest_is_there(tmp_path: Path) -> None:
    keys = NodeKeys(bring(tmp_path), WALL)
    before, key = keys.identity, new_key()
    write(tmp_path / "tls.key", key_pem(key))
    assert keys.look(WALL + 1).is_problem_new
    assert keys.identity is before
    assert "not a certificate of the key" in keys.problem
    write(tmp_path / "tls.crt", certificate_pem(key))
    assert keys.look(WALL + 2).is_credential_new
    assert keys.problem == ""


def _others_key(directory: Path) -> None:
    write(directory / "tls.key", key_pem(new_key()))


def _others_authority(directory: Path) -> None:
    write(directory / "bundle.pem", authority().certificate.public_bytes(Encoding.PEM))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_others_key, "is not a certificate of the key"),
        (_others_authority, "does not vouch for it"),
        (lambda d: bring(d, node="node-2"), "names spiffe://cluster.local/node/node-2, this node is"),
        (lambda d: (d / "tls.key").chmod(0o644), "others than its owner may use this key"),
        (lambda d: (d / "tls.key").unlink(), "tls.key: no key can be read"),
        (lambda d: write(d / "tls.key", key_pem(ec.generate_private_key(ec.SECP384R1()))), "not a P-256 key"),
        (lambda d: write(d / "tls.crt", b"nonsense"), "tls.crt: no certificate can be read"),
        (lambda d: write(d / "bundle.pem", b""), "bundle.pem: no trust bundle can be read"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    settings = bring(tmp_path)
    spoil(tmp_path)
    with pytest.raises(SettingsError, match=re.escape(message)):
        open_external_identity(settings, WALL)


@pytest.mark.parametrize(
    ("credentials", "message"),
    [
        ({"source": "files"}, r"credentials\.certificate: is required"),
        ({"source": "files", "certificate": "/a", "key": "/b"}, r"credentials\.trustBundle: is required"),
        ({"source": "kubernetes", "key": "/b"}, r"credentials\.key: has no meaning"),
        ({"source": "kubernetes", "caCertificate": "/a", "caKey": "/b"}, r"credentials\.caCertificate: has no meaning"),
        ({"certificate": "/a"}, r"credentials\.certificate: has no meaning"),
        ({"bundleConfigMap": "bundle"}, r"credentials\.bundleConfigMap: must be NAMESPACE/NAME"),
        ({"source": "vault"}, r"credentials\.source: must be one of"),
    ],
)
def test_settings_that_contradict_each_other(credentials: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        decode_settings({"node": "n", "credentials": credentials, "kubernetes": {"enabled": True}})


def test_requests_to_the_cluster_need_one() -> None:
    with pytest.raises(SettingsError, match=r"kubernetes needs kubernetes\.enabled"):
        decode_settings({"node": "n", "credentials": {"source": "kubernetes"}})
