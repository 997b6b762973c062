# SPDX-License-Identifier: Apache-2.0
"""Only the enforcer's own pod on a node gets that node's certificate, and only as it asks for it."""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from enforcer_daemon.identity.request import make_request
from trireme_signer.issuance import Grant, Granted, RefusedError, Requester, Witnesses, evaluate, identify

GRANT = Grant("trireme.io/node", "cluster.local", "trireme", "trireme-enforcer", "trireme-enforcer", 86_400)
KEY = ec.generate_private_key(ec.SECP256R1())
SPIFFE_ID = "spiffe://cluster.local/node/worker-1"
BOUND = "authentication.kubernetes.io/"

Tree = dict[str, Any]


def encoded(pem: bytes) -> str:
    return base64.b64encode(pem).decode()


def request(**changes: Any) -> Tree:
    spec = {
        "signerName": "trireme.io/node",
        "username": "system:serviceaccount:trireme:trireme-enforcer",
        "extra": {
            BOUND + "pod-name": ["trireme-enforcer-x7k2p"],
            BOUND + "pod-uid": ["pod-1"],
            BOUND + "node-name": ["worker-1"],
            BOUND + "node-uid": ["node-1"],
            BOUND + "credential-id": ["JTI=1"],
        },
        "usages": ["digital signature"],
        "expirationSeconds": 86_400,
        "request": encoded(make_request(KEY, SPIFFE_ID)),
    }
    return {"metadata": {"name": "a", "uid": "1"}, "spec": spec | changes}


POD: Tree = {
    "metadata": {
        "name": "trireme-enforcer-x7k2p",
        "uid": "pod-1",
        "ownerReferences": [{"kind": "DaemonSet", "name": "trireme-enforcer", "uid": "set-1", "controller": True}],
    },
    "spec": {"nodeName": "worker-1", "serviceAccountName": "trireme-enforcer"},
    "status": {"phase": "Running"},
}
WITNESSES = Witnesses(POD, {"metadata": {"uid": "node-1"}}, {"metadata": {"uid": "set-1"}})


def decide(asked: Tree, witnesses: Witnesses = WITNESSES) -> Granted:
    return evaluate(asked, identify(asked, GRANT), witnesses, GRANT)


def refusal(asked: Tree, witnesses: Witnesses = WITNESSES) -> str:
    with pytest.raises(RefusedError) as caught:
        decide(asked, witnesses)
    assert caught.value.message
    return caught.value.reason


def test_the_daemon_gets_what_it_asks_for() -> None:
    granted = decide(request())
    assert granted.key.public_numbers() == KEY.public_key().public_numbers()
    assert (granted.spiffe_id, granted.lifetime_s) == (SPIFFE_ID, 86_400)
    assert identify(request(), GRANT) == Requester("trireme-enforcer-x7k2p", "pod-1", "worker-1", "node-1")


@pytest.mark.parametrize(
    "username",
    ["", None, "kubernetes-admin", "system:node:worker-1", "system:serviceaccount:trireme:trireme-enforcer2",
     "system:serviceaccount:default:trireme-enforcer"],
)  # fmt: skip
def test_another_account_is_refused(username: str | None) -> None:
    assert refusal(request(username=username)) == "WrongAccount"


@pytest.mark.parametrize("name", ["pod-name", "pod-uid", "node-name", "node-uid"])
@pytest.mark.parametrize("value", [None, [], [""], ["a", "b"], "worker-1", [7]])
def test_a_token_that_is_not_bound_is_refused(name: str, value: object) -> None:
    asked = request()
    asked["spec"]["extra"][BOUND + name] = value
    assert refusal(asked) == "NotBoundToPod"
    del asked["spec"]["extra"][BOUND + name]
    assert refusal(asked) == "NotBoundToPod"


def test_no_extra_at_all_is_refused() -> None:
    assert refusal(request(extra=None)) == "NotBoundToPod"


@pytest.mark.parametrize("usages", [None, [], ["client auth"], ["digital signature", "client auth"], ["cert sign"]])
def test_other_usages_are_refused(usages: object) -> None:
    assert refusal(request(usages=usages)) == "WrongUsages"


@pytest.mark.parametrize("lifetime", [None, 0, -1, 86_401, "600", True])
def test_other_lifetimes_are_refused(lifetime: object) -> None:
    assert refusal(request(expirationSeconds=lifetime)) == "WrongLifetime"


def changed(change: Callable[[Tree], None]) -> Witnesses:
    pod = copy.deepcopy(POD)
    change(pod)
    return Witnesses(pod, WITNESSES.node, WITNESSES.daemon_set)


@pytest.mark.parametrize(
    ("witnesses", "reason"),
    [
        (Witnesses(None, WITNESSES.node, WITNESSES.daemon_set), "UnknownPod"),
        (Witnesses(POD, None, WITNESSES.daemon_set), "UnknownNode"),
        (Witnesses(POD, {"metadata": {"uid": "node-2"}}, WITNESSES.daemon_set), "UnknownNode"),
        (Witnesses(POD, {"metadata": {}}, WITNESSES.daemon_set), "UnknownNode"),
        (Witnesses(POD, WITNESSES.node, None), "UnknownDaemonSet"),
        (Witnesses(POD, WITNESSES.node, {"metadata": {"uid": "set-2"}}), "WrongOwner"),
        (changed(lambda pod: pod["metadata"].update(uid="pod-2")), "UnknownPod"),
        (changed(lambda pod: pod["metadata"].pop("uid")), "UnknownPod"),
        (changed(lambda pod: pod["metadata"].pop("ownerReferences")), "WrongOwner"),
        (changed(lambda pod: pod["metadata"]["ownerReferences"][0].pop("controller")), "WrongOwner"),
        (changed(lambda pod: pod["metadata"]["ownerReferences"][0].update(kind="ReplicaSet")), "WrongOwner"),
        (changed(lambda pod: pod["spec"].update(nodeName="worker-2")), "WrongNode"),
        (changed(lambda pod: pod["spec"].pop("nodeName")), "WrongNode"),
        (changed(lambda pod: pod["spec"].update(serviceAccountName="default")), "WrongAccount"),
        (changed(lambda pod: pod["status"].update(phase="Failed")), "UnknownPod"),
    ],
)
def test_objects_that_do_not_bear_the_sender_out(witnesses: Witnesses, reason: str) -> None:
    assert refusal(request(), witnesses) == reason


def built(*names: str, subject: str = "", key: Any = KEY, extra: x509.ExtensionType | None = None) -> str:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else []
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes))
    if names:
        uris = [x509.UniformResourceIdentifier(name) for name in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(uris), critical=True)
    if extra is not None:
        builder = builder.add_extension(extra, critical=True)
    return encoded(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


def forged() -> str:
    """A request for somebody else's key: the signature is not that key's."""
    pem = make_request(KEY, SPIFFE_ID)
    der = bytearray(x509.load_pem_x509_csr(pem).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    body = base64.encodebytes(bytes(der))
    return encoded(b"-----BEGIN CERTIFICATE REQUEST-----\n" + body + b"-----END CERTIFICATE REQUEST-----\n")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (built("spiffe://cluster.local/node/worker-2"), "subject alternative name must be"),
        (built("spiffe://other/node/worker-1"), "subject alternative name must be"),
        (built(SPIFFE_ID, SPIFFE_ID), "subject alternative name must be"),
        (built(), "one extension"),
        (built(SPIFFE_ID, subject="worker-1"), "subject must be empty"),
        (built(SPIFFE_ID, key=ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (built(SPIFFE_ID, key=rsa.generate_private_key(65537, 2048)), "P-256"),
        (built(SPIFFE_ID, extra=x509.BasicConstraints(ca=True, path_length=None)), "one extension"),
        (forged(), "not signed by its own key"),
        ("", "cannot be read"),
        (encoded(b"nonsense"), "cannot be read"),
        (encoded(b"x" * 5_000), "bytes"),
        ("%%%", "base64"),
        (7, "bytes-like"),
    ],
)
def test_other_requests_are_refused(asked: object, message: str) -> None:
    with pytest.raises(RefusedError, match=message) as caught:
        decide(request(request=asked))
    assert caught.value.reason == "WrongRequest"
