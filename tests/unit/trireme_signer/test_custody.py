# SPDX-License-Identifier: Apache-2.0
"""The Secret with the authorities' keys: made, read again, rotated, and an operator's own."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from enforcer_daemon.identity.authority import make_authority
from enforcer_daemon.identity.keystore import key_pem
from trireme_signer.custody import ROTATE_BEFORE, Custody, CustodyError, bundle_pem, read_custody
from trireme_signer.rotation import Schedule

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
SCHEDULE = Schedule(timedelta(days=20), timedelta(hours=24), timedelta(hours=24))


def read(
    data: dict[str, str], now: datetime = NOW, annotations: dict[str, str] | None = None, domain: str = "cluster.local"
) -> Custody:
    return read_custody(data, annotations or {}, domain, SCHEDULE, now)


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def own(trust_domain: str = "cluster.local", **more: bytes) -> dict[str, str]:
    made = make_authority(trust_domain, NOW)
    files = {"tls.crt": made.certificate.public_bytes(Encoding.PEM), "tls.key": key_pem(made.key)}
    return {name: encoded(content) for name, content in {**files, **more}.items()}


def test_an_empty_secret_gets_an_authority_which_is_read_again() -> None:
    first = read({})
    assert sorted(name.rpartition(".")[2] for name in first.data) == ["crt", "key"]
    again = read(dict(first.data), NOW + timedelta(hours=1))
    assert again.data == first.data
    assert again.authorities.signer.certificate == first.authorities.signer.certificate
    assert x509.load_pem_x509_certificates(bundle_pem(again.authorities).encode()) == list(first.authorities.bundle)


def test_a_rotation_by_annotation_leaves_the_old_certificate_without_its_key() -> None:
    first = read({})
    asked = {ROTATE_BEFORE: "2026-01-02T12:00:00Z"}
    assert read(dict(first.data), NOW + timedelta(hours=23), asked).data == first.data
    second = read(dict(first.data), NOW + timedelta(hours=25), asked)
    assert len(second.data) == 4
    third = read(dict(second.data), NOW + timedelta(hours=50), asked)
    assert sorted(name.rpartition(".")[2] for name in third.data) == ["crt", "crt", "key"]
    assert third.authorities.signer.certificate != first.authorities.signer.certificate
    assert first.authorities.signer.certificate in third.authorities.bundle


def test_an_operators_own_authority_is_used_as_it_is() -> None:
    data = own()
    custody = read(data, NOW + timedelta(days=3_000), {ROTATE_BEFORE: "2030-01-01T00:00:00Z"})
    assert custody.data == data
    assert len(custody.authorities.bundle) == 1


def test_an_operators_bundle_is_what_nodes_believe() -> None:
    data, other = own(), make_authority("other.example", NOW).certificate
    with pytest.raises(CustodyError, match=r"bundle\.pem: does not have the authority"):
        read(data | {"bundle.pem": encoded(other.public_bytes(Encoding.PEM))})
    both = base64.b64decode(data["tls.crt"]) + other.public_bytes(Encoding.PEM)
    assert other in read(data | {"bundle.pem": encoded(both)}).authorities.bundle


@pytest.mark.parametrize(
    ("data", "annotations", "message"),
    [
        ({"a.crt": "%"}, {}, r"a\.crt"),
        ({"a.crt": encoded(b"nonsense")}, {}, r"a\.crt: no authority can be read"),
        (own("other.example"), {}, r"tls\.crt: is an authority of trust domain other\.example"),
        ({k: v for k, v in own().items() if k == "tls.crt"}, {}, r"tls\.key: is missing"),
        (own() | {"tls.key": own()["tls.key"]}, {}, r"tls\.key: is not the key of"),
        (own() | {"tls.key": encoded(b"x")}, {}, r"tls\.key: no key can be read"),
        (own() | {"bundle.pem": encoded(b"x")}, {}, r"bundle\.pem"),
        ({}, {ROTATE_BEFORE: "soon"}, "annotation"),
        ({}, {ROTATE_BEFORE: "2026-01-01T00:00:00"}, "no time zone"),
    ],
)
def test_what_cannot_be_used_is_named(data: dict[str, str], annotations: dict[str, str], message: str) -> None:
    with pytest.raises(CustodyError, match=message):
        read(data, NOW, annotations)
