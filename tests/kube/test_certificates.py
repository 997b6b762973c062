# SPDX-License-Identifier: Apache-2.0
"""Nodes get their certificates from the cluster: the real signer, the daemon's real requests, over real HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from enforcer_daemon.identity.authority import issue_credential, make_authority, node_spiffe_id
from enforcer_daemon.identity.credential import is_issued_by
from enforcer_daemon.identity.external import open_external_identity
from enforcer_daemon.identity.request import read_request
from enforcer_daemon.kube.certificates import PATH, CertificateRefusedError, CertificateRequests
from enforcer_daemon.kube.client import ClusterApi
from enforcer_daemon.settings import LogLevel, LogSettings, Settings
from enforcer_daemon.settings_file import decode_settings
from enforcer_daemon.telemetry.logs import open_log
from tests.kube.api import FakeApi
from tests.kube.cluster import NAMESPACE, add_node, running_signer
from tests.kube.objects import Manifest

LOG = open_log(LogSettings(level=LogLevel.ERROR))


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with FakeApi() as served:
        yield served


def await_that(holds: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


def settings_of(tmp_path: Path, node: str, **more: Any) -> Settings:
    state = tmp_path / node
    state.mkdir(mode=0o700, exist_ok=True)
    credentials = {"source": "kubernetes", **more}
    return decode_settings(
        {"node": node, "stateDir": str(state), "credentials": credentials, "kubernetes": {"enabled": True}}
    )


def bundle_of(api: FakeApi) -> str | None:
    found = [entry for entry in api.all("ConfigMap") if entry["metadata"]["name"] == "trireme-trust-bundle"]
    return str(found[0]["data"]["bundle.pem"]) if found else None


def obtain(api: FakeApi, settings: Settings, token: str) -> str:
    """Wait for the bundle, then ask for a certificate."""
    (settings.state_dir / "bundle.pem").write_text(await_that(lambda: bundle_of(api), "no bundle was published"))
    return ask_for_certificate(api, settings, token)


def ask_for_certificate(api: FakeApi, settings: Settings, token: str) -> str:
    """Ask for a certificate as the daemon on a node does; give what it has to complain about."""

    async def ask() -> str:
        kubeconfig = api.write_kubeconfig(settings.state_dir / "kubeconfig", token)
        cluster = ClusterApi(kubeconfig, settings.state_dir / "scratch")
        await cluster.open()
        try:
            await CertificateRequests(cluster, settings, LOG, time.time, random.random).obtain()
        except CertificateRefusedError as err:
            return str(err)
        finally:
            await cluster.close()
        return ""

    return asyncio.run(ask())


def conditions(api: FakeApi) -> list[Manifest]:
    return [entry for request in api.all("CertificateSigningRequest") for entry in request["status"]["conditions"]]


def test_a_node_gets_its_certificate_and_another_key_with_the_next(api: FakeApi, tmp_path: Path) -> None:
    token, settings = add_node(api, "node-1"), settings_of(tmp_path, "node-1")
    with running_signer(api, tmp_path):
        assert obtain(api, settings, token) == ""
        first = open_external_identity(settings, time.time())
        assert obtain(api, settings, token) == ""
    second = open_external_identity(settings, time.time())
    assert (first.credential.node, first.credential.trust_domain) == ("node-1", "cluster.local")
    assert second.credential.public_key.public_numbers() != first.credential.public_key.public_numbers()
    assert oct((settings.state_dir / "node-credential.pem").stat().st_mode & 0o777) == "0o600"
    assert {entry["type"] for entry in conditions(api)} == {"Approved"}
    bundle_resources = [entry["spec"]["trustBundle"] for entry in api.all("ClusterTrustBundle")]
    assert bundle_resources == [bundle_of(api)]


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_the_bundle_is_published_in_the_version_that_the_api_server_has(
    api: FakeApi, tmp_path: Path, version: str
) -> None:
    kinds = {(f"certificates.k8s.io/{served}", "clustertrustbundles") for served in ("v1", "v1beta1")}
    wanted = (f"certificates.k8s.io/{version}", "clustertrustbundles")
    api.unserved = kinds - {wanted}
    with running_signer(api, tmp_path):
        await_that(lambda: api.objects.kinds[wanted], f"no ClusterTrustBundle {version}")
    (found,) = api.objects.kinds[wanted].values()
    assert found["metadata"]["name"] == "trireme.io:node:nodes"
    assert found["spec"] == {"signerName": "trireme.io/node", "trustBundle": bundle_of(api)}


def test_another_signer_is_asked_by_its_name_and_its_answer_is_taken(api: FakeApi, tmp_path: Path) -> None:
    """As with cert-manager: somebody else approves and signs, and the bundle comes as a file."""
    signer = "clusterissuers.cert-manager.io/trireme"
    token, settings = add_node(api, "node-1"), settings_of(tmp_path, "node-1", signerName=signer)
    now = datetime.now(UTC)
    authority = make_authority("cluster.local", now)
    settings.state_dir.joinpath("bundle.pem").write_bytes(authority.certificate.public_bytes(Encoding.PEM))

    def answer() -> None:
        (request,) = await_that(lambda: api.all("CertificateSigningRequest"), "nothing was asked for")
        assert request["spec"]["signerName"] == signer
        spiffe_id = node_spiffe_id("cluster.local", "node-1")
        key = read_request(base64.b64decode(request["spec"]["request"]), spiffe_id)
        pem = issue_credential(authority, key, spiffe_id, now, timedelta(hours=1)).public_bytes(Encoding.PEM)
        name = request["metadata"]["name"]
        approved = {"conditions": [{"type": "Approved", "status": "True", "reason": "policy"}]}
        api.patch("CertificateSigningRequest", "", name, {"status": approved})
        api.patch("CertificateSigningRequest", "", name, {"status": {"certificate": base64.b64encode(pem).decode()}})

    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(answer)
        assert ask_for_certificate(api, settings, token) == ""
        answered.result()
    credential = open_external_identity(settings, time.time()).credential
    assert (credential.node, is_issued_by(credential.certificate, authority.certificate)) == ("node-1", True)


def test_another_nodes_name_is_denied(api: FakeApi, tmp_path: Path) -> None:
    add_node(api, "node-2")
    token = add_node(api, "node-1")
    with running_signer(api, tmp_path):
        problem = obtain(api, settings_of(tmp_path, "node-2"), token)
    assert "denied (WrongRequest: the subject alternative name must be spiffe://cluster.local/node/node-1" in problem
    assert [entry["reason"] for entry in conditions(api)] == ["WrongRequest"]
    assert not (tmp_path / "node-2" / "node-credential.pem").exists()


def test_a_longer_life_is_denied(api: FakeApi, tmp_path: Path) -> None:
    token = add_node(api, "node-1")
    with running_signer(api, tmp_path):
        problem = obtain(api, settings_of(tmp_path, "node-1", certificateLifetimeSeconds=90_000), token)
    assert "WrongLifetime" in problem


@pytest.mark.parametrize(
    ("user", "reason"),
    [
        ({"username": "system:serviceaccount:default:default"}, "WrongAccount"),
        ({"extra": {}}, "NotBoundToPod"),
        ({"extra": {"authentication.kubernetes.io/pod-name": ["../../nodes/x"]}}, "NotBoundToPod"),
        ({"extra": {"authentication.kubernetes.io/pod-uid": ["uid-pod-node-9"]}}, "UnknownPod"),
        ({"extra": {"authentication.kubernetes.io/node-uid": ["another"]}}, "UnknownNode"),
    ],
)
def test_another_sender_is_denied(api: FakeApi, tmp_path: Path, user: dict[str, Any], reason: str) -> None:
    token = add_node(api, "node-1")
    api.users[token] |= (
        {**user, "extra": {**api.users[token]["extra"], **user.get("extra", {})}} if user.get("extra", True) else user
    )
    with running_signer(api, tmp_path):
        assert reason in obtain(api, settings_of(tmp_path, "node-1"), token)
    assert [(entry["type"], entry["reason"]) for entry in conditions(api)] == [("Denied", reason)]


def test_a_pod_that_is_not_the_daemonsets_is_denied(api: FakeApi, tmp_path: Path) -> None:
    token = add_node(api, "node-1")
    api.patch("Pod", NAMESPACE, "trireme-enforcer-node-1", {"metadata": {"ownerReferences": []}})
    with running_signer(api, tmp_path):
        assert "WrongOwner" in obtain(api, settings_of(tmp_path, "node-1"), token)


def test_what_somebody_approved_by_mistake_is_not_signed(api: FakeApi, tmp_path: Path) -> None:
    add_node(api, "node-1")
    api.put(
        {
            "apiVersion": "certificates.k8s.io/v1",
            "kind": "CertificateSigningRequest",
            "metadata": {"name": "mine"},
            "spec": {"signerName": "trireme.io/node", "username": "kubernetes-admin", "request": ""},
            "status": {"conditions": [{"type": "Approved", "status": "True"}]},
        }
    )
    with running_signer(api, tmp_path):
        await_that(lambda: len(conditions(api)) == 2, "the request was not evaluated")
    assert [entry["type"] for entry in conditions(api)] == ["Approved", "Failed"]


def test_other_signers_requests_are_left_alone(api: FakeApi, tmp_path: Path) -> None:
    token = add_node(api, "node-1")
    other = {
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": {"name": "other"},
        "spec": {"signerName": "kubernetes.io/kubelet-serving"},
        "status": {"conditions": []},
    }
    api.put(other)
    with running_signer(api, tmp_path):
        assert obtain(api, settings_of(tmp_path, "node-1"), token) == ""
    assert api.get("CertificateSigningRequest", "", "other")["status"] == {"conditions": []}


def test_a_certificate_for_another_key_is_refused_by_the_node(api: FakeApi, tmp_path: Path) -> None:
    """Whoever may write statuses could hand a node somebody else's certificate."""
    token, settings = add_node(api, "node-1"), settings_of(tmp_path, "node-1")
    with running_signer(api, tmp_path):
        assert obtain(api, settings, token) == ""
    stale = api.all("CertificateSigningRequest")[0]["status"]
    kept = (settings.state_dir / "node-credential.pem").read_bytes()

    async def swap() -> str:
        kubeconfig = api.write_kubeconfig(settings.state_dir / "kubeconfig", token)
        cluster = ClusterApi(kubeconfig, settings.state_dir / "scratch")
        await cluster.open()
        asking = asyncio.ensure_future(CertificateRequests(cluster, settings, LOG, time.time, random.random).obtain())
        requests = await asyncio.to_thread(
            await_that,
            lambda: len(found := api.all("CertificateSigningRequest")) > 1 and found,
            "no second request",
        )
        (newest,) = [entry for entry in requests if not entry.get("status")]
        await asyncio.to_thread(
            api.patch, "CertificateSigningRequest", "", newest["metadata"]["name"], {"status": stale}
        )
        with pytest.raises(CertificateRefusedError, match="for another key"):
            await asking
        await cluster.close()
        return ""

    asyncio.run(swap())
    assert (settings.state_dir / "node-credential.pem").read_bytes() == kept


def test_the_next_replica_goes_on_with_the_same_authority(api: FakeApi, tmp_path: Path) -> None:
    token, settings = add_node(api, "node-1"), settings_of(tmp_path, "node-1")
    with running_signer(api, tmp_path, name="first"), running_signer(api, tmp_path, name="second"):
        assert obtain(api, settings, token) == ""
        holder = api.get("Lease", NAMESPACE, "trireme-signer")["spec"]["holderIdentity"]
    before = bundle_of(api)
    api.delete("Lease", NAMESPACE, "trireme-signer")  # As if its time were up.
    with running_signer(api, tmp_path, name="third"):
        assert obtain(api, settings, token) == ""
    assert holder in ("first", "second")
    assert bundle_of(api) == before
    assert len(api.all("Secret")) == 1


def test_an_authority_is_replaced_by_overlap(api: FakeApi, tmp_path: Path) -> None:
    """Lives so short that a test can wait for them."""
    token, settings = add_node(api, "node-1"), settings_of(tmp_path, "node-1", certificateLifetimeSeconds=600)
    with running_signer(api, tmp_path, "--certificate-hours", "0.2"):
        assert obtain(api, settings, token) == ""
        first = open_external_identity(settings, time.time())
        secret = api.all("Secret")[0]["metadata"]["name"]
    time.sleep(1.1)  # Certificates know whole seconds: the first authority must be older than this.
    asked = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    api.patch(
        "Secret",
        NAMESPACE,
        secret,
        {"metadata": {"annotations": {"trireme.io/replace-authorities-made-before": asked}}},
    )
    api.delete("Lease", NAMESPACE, "trireme-signer")
    with running_signer(api, tmp_path, "--certificate-hours", "0.2", "--overlap-hours", "0.0005"):
        both = await_that(
            lambda: (text := bundle_of(api) or "").count("BEGIN CERTIFICATE") == 2 and text, "no second authority"
        )
        bundle = x509.load_pem_x509_certificates(both.encode())
        assert first.bundle.authorities[0] in bundle
        time.sleep(2)  # The overlap.
        assert obtain(api, settings, token) == ""
    second = open_external_identity(settings, time.time())
    assert second.credential.certificate.issuer == first.credential.certificate.issuer  # same name, another key
    second.bundle.verify(first.credential, time.time(), 0.0)
    newer = [authority for authority in bundle if authority not in first.bundle.authorities]
    second.credential.certificate.verify_directly_issued_by(newer[0])
    entries = api.get("Secret", NAMESPACE, secret)["data"]
    assert sum(name.endswith(".crt") for name in entries) == 2


def test_no_key_leaves_a_node_or_shows_in_a_log(api: FakeApi, tmp_path: Path) -> None:
    token, settings = add_node(api, "node-1"), settings_of(tmp_path, "node-1")
    with running_signer(api, tmp_path):
        assert obtain(api, settings, token) == ""
    requests = json.dumps(api.all("CertificateSigningRequest"))
    body = base64.b64decode(api.all("CertificateSigningRequest")[0]["spec"]["request"])
    assert body.startswith(b"-----BEGIN CERTIFICATE REQUEST-----")
    log = (tmp_path / "signer.log").read_text()
    assert "certificate signed" in log
    for text in (requests, log, body.decode()):
        assert "PRIVATE" not in text
    secret = api.all("Secret")[0]["data"]
    assert all(value[:40] not in log for value in secret.values())
    assert PATH.endswith("certificatesigningrequests")
