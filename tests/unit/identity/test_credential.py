# SPDX-License-Identifier: Apache-2.0
"""Credentials: whose form is right, and whom the trust bundle believes."""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding

from enforcer_daemon.errors import CredentialError
from enforcer_daemon.identity.authority import Authority, issue_credential
from enforcer_daemon.identity.credential import TrustBundle, decode_credential
from enforcer_daemon.reasons import Reason
from tests.unit.identity.certificates import DAY, NOW, WALL, authority, credential, der, new_key

NODE = "spiffe://cluster.local/node/node-1"


def reason_of(wire: bytes) -> Reason:
    with pytest.raises(CredentialError) as caught:
        decode_credential(wire)
    return caught.value.reason


def test_a_nodes_certificate_gives_its_node_and_trust_domain() -> None:
    found = credential(authority(), new_key(), "node-7", "example.org")
    assert (found.node, found.trust_domain) == ("node-7", "example.org")
    assert found.not_after - found.not_before == DAY.total_seconds() + 300
    assert len(found.key_id) == 11


@pytest.mark.parametrize(
    "name",
    [
        "https://cluster.local/node/node-1",
        "spiffe:///node/node-1",
        "spiffe://cluster.local/pod/node-1",
        "spiffe://cluster.local/node/",
        "spiffe://cluster.local/node/a/b",
        "spiffe://cluster.local/node/a?query",
        "spiffe://cluster.local/node/a#fragment",
        "spiffe://user@cluster.local/node/a",
        "spiffe://cluster.local:80/node/a",
        "spiffe://[",
        "spiffe://cluster.local/node/a\n\x1b[31m",
    ],
)
def test_any_other_name_is_no_node(name: str) -> None:
    assert reason_of(der(name)) is Reason.CREDENTIAL_INVALID


def test_a_strangers_name_reaches_the_log_as_a_literal_and_cut() -> None:
    with pytest.raises(CredentialError) as caught:
        decode_credential(der("spiffe://x\n\x1b[31m" + "y" * 4_000))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"\x30\x03\x02\x01\x00",
        der(),
        der(NODE, "spiffe://cluster.local/node/node-2"),
        der(NODE, is_authority=True),
        der(NODE, key=ec.generate_private_key(ec.SECP384R1())),
        der(NODE, key=ed25519.Ed25519PrivateKey.generate()),
    ],
    ids=["empty", "not-a-certificate", "no-name", "two-names", "authority", "p384", "ed25519"],
)
def test_other_kinds_of_certificate_are_invalid(wire: bytes) -> None:
    assert reason_of(wire) is Reason.CREDENTIAL_INVALID


def test_a_dns_name_beside_the_spiffe_id_is_invalid() -> None:
    key = new_key()
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(NODE), x509.DNSName("example.org")])
    empty = x509.Name([])
    builder = x509.CertificateBuilder(empty, empty, key.public_key(), 1, NOW, NOW + DAY).add_extension(names, True)
    assert reason_of(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)) is Reason.CREDENTIAL_INVALID


def test_an_unsupported_curve_or_version_is_invalid_and_no_crash() -> None:
    wire = der(NODE)
    p256 = bytes.fromhex("06082a8648ce3d030107")
    unknown_curve = wire.replace(p256, bytes.fromhex("06082a8648ce3d03017f"))
    assert reason_of(unknown_curve) is Reason.CREDENTIAL_INVALID
    version_9 = wire.replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020108"))
    assert reason_of(version_9) is Reason.CREDENTIAL_INVALID


def test_a_certificate_full_of_names_is_not_even_parsed() -> None:
    with pytest.raises(CredentialError, match="bytes, at most 2048 are read"):
        decode_credential(der(NODE, *("a:" for _ in range(600))))


def test_no_basic_constraints_and_an_explicit_leaf_are_both_leaves() -> None:
    assert decode_credential(der(NODE, is_authority=False)).node == "node-1"


def test_a_trusted_authoritys_credential_verifies_within_its_validity_and_the_leeway() -> None:
    signer = authority()
    found = credential(signer, new_key())
    bundle = TrustBundle([signer.certificate])
    bundle.verify(found, WALL, 0.0)
    bundle.verify(found, found.not_after + 29, 30.0)
    bundle.verify(found, found.not_before - 29, 30.0)
    for moment in (found.not_after + 31, found.not_before - 31):
        with pytest.raises(CredentialError) as caught:
            bundle.verify(found, moment, 30.0)
        assert caught.value.reason is Reason.CREDENTIAL_EXPIRED


def test_another_authority_of_the_same_name_is_not_trusted() -> None:
    with pytest.raises(CredentialError) as caught:
        TrustBundle([authority().certificate]).verify(credential(authority(), new_key()), WALL, 0.0)
    assert caught.value.reason is Reason.CREDENTIAL_UNTRUSTED


def test_a_self_signed_leaf_is_not_trusted() -> None:
    found = decode_credential(der(NODE))
    with pytest.raises(CredentialError) as caught:
        TrustBundle([authority().certificate]).verify(found, WALL, 0.0)
    assert caught.value.reason is Reason.CREDENTIAL_UNTRUSTED


def test_a_node_cannot_issue_credentials() -> None:
    signer, node_key = authority(), new_key()
    node = credential(signer, node_key)
    below = issue_credential(
        Authority(node.certificate, node_key), new_key().public_key(), "spiffe://cluster.local/node/evil", NOW, DAY
    )
    with pytest.raises(CredentialError) as caught:
        TrustBundle([signer.certificate]).verify(decode_credential(below.public_bytes(Encoding.DER)), WALL, 0.0)
    assert caught.value.reason is Reason.CREDENTIAL_UNTRUSTED


def test_two_trust_domains_are_trusted_at_once_and_each_authority_vouches_for_its_own_alone() -> None:
    ours, theirs = authority("cluster.local"), authority("other.example")
    bundle = TrustBundle([ours.certificate, theirs.certificate])
    bundle.verify(credential(ours, new_key(), trust_domain="cluster.local"), WALL, 0.0)
    bundle.verify(credential(theirs, new_key(), trust_domain="other.example"), WALL, 0.0)
    with pytest.raises(CredentialError) as caught:
        bundle.verify(credential(theirs, new_key(), trust_domain="cluster.local"), WALL, 0.0)
    assert caught.value.reason is Reason.CREDENTIAL_UNTRUSTED


def test_an_authority_that_states_no_trust_domain_could_name_any_node_and_is_refused() -> None:
    with pytest.raises(ValueError, match=r"CN=operator.*spiffe://<trust domain>"):
        TrustBundle([authority().certificate, _plain_authority(new_key())])


def test_a_nodes_certificate_is_no_authority() -> None:
    with pytest.raises(ValueError, match="basic constraints"):
        TrustBundle([credential(authority(), new_key()).certificate])
    with pytest.raises(ValueError, match="CA:FALSE"):
        TrustBundle([x509.load_der_x509_certificate(der("spiffe://cluster.local", is_authority=False))])


@pytest.mark.parametrize(
    "names",
    [
        ("spiffe://one.example", "spiffe://two.example"),
        ("spiffe://one.example/node/a",),
        ("spiffe://One.Example",),
        ("https://one.example",),
    ],
)
def test_an_authority_states_exactly_one_trust_domain(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="exactly one SPIFFE ID"):
        TrustBundle([x509.load_der_x509_certificate(der(*names, is_authority=True))])


def _plain_authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """An operator's authority, as openssl makes them: no subject alternative name."""
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "operator")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 7, NOW, NOW + timedelta(days=10))
    builder = builder.add_extension(x509.BasicConstraints(True, 0), critical=True)
    builder = builder.add_extension(usage, critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return builder.sign(key, hashes.SHA256())


def test_a_credential_ends_no_later_than_its_authority() -> None:
    signer = authority()
    found = credential(signer, new_key(), lifetime=timedelta(days=100_000))
    assert found.certificate.not_valid_after_utc == signer.certificate.not_valid_after_utc


def test_an_empty_bundle_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one authority"):
        TrustBundle([])


def test_a_serial_number_must_be_positive() -> None:
    good = der("spiffe://cluster.local/node/a")
    at = good.index(b"\x02\x01\x01\x30")  # INTEGER 1, and the sequence after it
    with pytest.raises(CredentialError, match="serial number"):
        decode_credential(good[: at + 2] + b"\x00" + good[at + 3 :])
