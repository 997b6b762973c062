# SPDX-License-Identifier: Apache-2.0
"""How the daemon comes to the API server: as a pod with its account, or by a kubeconfig; over TLS, by a token."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
import structlog
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from enforcer_daemon.errors import SettingsError
from enforcer_daemon.kube.client import UNAUTHORIZED, ApiError, ClusterApi
from enforcer_daemon.kube.credentials import ClusterCredentials, own_namespace
from enforcer_daemon.settings import Settings
from enforcer_daemon.settings_file import decode_settings
from tests.kube.api import FakeApi

FIRST, SECOND = "first-token", "second-token"


def certificate_of(directory: Path) -> Path:
    """Make a certificate of 127.0.0.1 that vouches for itself, in one file with its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = directory / "server.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(certificate.public_bytes(Encoding.PEM) + private)
    (directory / "ca.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    return path


@pytest.fixture
def api(tmp_path: Path) -> Iterator[FakeApi]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_of(tmp_path))
    with FakeApi(tls=context) as api:
        api.token = FIRST
        yield api


def ask(cluster: ClusterApi) -> asyncio.Task[bytes]:
    return asyncio.ensure_future(cluster.get("/api/v1/nodes", {}, 5.0))


def test_a_pod_comes_with_its_account_whose_token_changes(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, port = api.address
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(port))
    monkeypatch.setattr("enforcer_daemon.kube.client.SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setattr("enforcer_daemon.kube.client._REFRESH_AFTER_S", 0.0)
    token = tmp_path / "token"
    token.write_text(FIRST)

    async def work() -> None:
        cluster = ClusterApi(None, tmp_path / "scratch")
        await cluster.open()
        assert cluster.server == f"https://{host}:{port}"
        assert b"NodeList" in await ask(cluster)
        token.write_text(SECOND)
        api.token = SECOND
        with pytest.raises(ApiError) as refused:
            await ask(cluster)
        assert refused.value.status == UNAUTHORIZED
        await cluster.refresh()
        assert b"NodeList" in await ask(cluster)
        await cluster.close()

    asyncio.run(work())


def inline_kubeconfig(api: FakeApi, tmp_path: Path, authority: bytes) -> Path:
    """Write a kubeconfig that has all that it needs inside."""
    path = api.write_kubeconfig(tmp_path / "kubeconfig", FIRST)
    tree = yaml.safe_load(path.read_text())
    tree["clusters"][0]["cluster"]["certificate-authority-data"] = base64.b64encode(authority).decode()
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_kubeconfig_may_hold_the_authority_itself(api: FakeApi, tmp_path: Path) -> None:
    path = inline_kubeconfig(api, tmp_path, (tmp_path / "ca.crt").read_bytes())

    async def work() -> None:
        cluster = ClusterApi(path, tmp_path / "scratch")
        await cluster.open()
        assert b"NodeList" in await ask(cluster)
        await cluster.close()

    asyncio.run(work())
    assert (tmp_path / "scratch").stat().st_mode & 0o777 == 0o700


def test_a_server_of_another_authority_is_told_nothing(api: FakeApi, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    certificate_of(tmp_path / "other")
    path = inline_kubeconfig(api, tmp_path, (tmp_path / "other" / "ca.crt").read_bytes())

    async def work() -> None:
        cluster = ClusterApi(path, tmp_path / "scratch")
        await cluster.open()
        with pytest.raises(ApiError, match="does not answer"):
            await ask(cluster)
        await cluster.close()

    asyncio.run(work())
    assert not api.requests


# Where the trust bundle is.


def test_the_own_namespace_is_what_the_environment_says_else_the_account(tmp_path: Path) -> None:
    file = tmp_path / "namespace"
    assert own_namespace({}, file) == ""
    file.write_text("security\n")
    assert own_namespace({}, file) == "security"
    assert own_namespace({"POD_NAMESPACE": "mesh"}, file) == "mesh"


def settings_of(tmp_path: Path, **credentials: object) -> Settings:
    return decode_settings(
        {
            "node": "a",
            "stateDir": str(tmp_path),
            "credentials": {"source": "kubernetes", **credentials},
            "kubernetes": {"enabled": True},
        }
    )


@pytest.mark.parametrize(
    ("credentials", "wanted"),
    [({}, "mesh/trireme-trust-bundle"), ({"bundleConfigMap": "x/y"}, "x/y")],
)
def test_the_bundle_is_looked_for_beside_the_daemon_unless_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, credentials: dict[str, object], wanted: str
) -> None:
    monkeypatch.setenv("POD_NAMESPACE", "mesh")
    found = ClusterCredentials(settings_of(tmp_path, **credentials), structlog.get_logger())
    assert f"ConfigMap {wanted}:" in found.problem


def test_outside_a_pod_the_bundle_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POD_NAMESPACE", raising=False)
    with pytest.raises(SettingsError, match=r"credentials\.bundleConfigMap: must be set"):
        ClusterCredentials(settings_of(tmp_path), structlog.get_logger())
    ClusterCredentials(settings_of(tmp_path, trustBundle="/etc/bundle.pem"), structlog.get_logger())
