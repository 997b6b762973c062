# SPDX-License-Identifier: Apache-2.0
"""Keys over time: renewed when due, followed when an operator replaces files, kept when these are bad."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from enforcer_daemon.errors import CredentialError, SettingsError
from enforcer_daemon.identity.authority import Authority, make_authority
from enforcer_daemon.identity.credential import TrustBundle, is_issued_by
from enforcer_daemon.identity.keystore import open_node_identity
from enforcer_daemon.identity.renewal import NodeKeys, Renewal
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings import Settings
from enforcer_daemon.settings_file import decode_settings
from tests.unit.identity.certificates import NOW, WALL, authority, credential, new_key

NOTHING = Renewal()
DAY_S = 86_400.0


class Operator:
    """Files of a node that an operator writes, and the node's keys."""

    def __init__(self, directory: Path, issuer: Authority, **credentials: Any) -> None:
        self.certificate, self.key = directory / "ca.pem", directory / "ca.key"
        self.bundle = directory / "bundle.pem"
        self.issue_by(issuer)
        self.trust(issuer)
        files = {"caCertificate": self.certificate, "caKey": self.key, "trustBundle": self.bundle}
        self.settings: Settings = decode_settings(
            {
                "node": "node-1",
                "stateDir": str(directory / "state"),
                "credentials": {**{name: str(path) for name, path in files.items()}, **credentials},
            }
        )
        self.keys = NodeKeys(self.settings, WALL)

    def issue_by(self, issuer: Authority) -> None:
        self.certificate.write_bytes(issuer.certificate.public_bytes(Encoding.PEM))
        self.key.touch(mode=0o600)
        self.key.write_bytes(issuer.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    def trust(self, *authorities: Authority) -> None:
        self.bundle.write_bytes(b"".join(one.certificate.public_bytes(Encoding.PEM) for one in authorities))

    def state(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.settings.state_dir.iterdir()}


def looks(keys: NodeKeys, moments: Sequence[float]) -> list[Renewal]:
    return [keys.look(WALL + moment) for moment in moments]


# Renewal.


@pytest.mark.parametrize("lifetime_s", [6.0, 60.0, DAY_S])
def test_a_certificate_is_renewed_once_at_two_thirds_of_its_life(tmp_path: Path, lifetime_s: float) -> None:
    operator = Operator(tmp_path, authority(), certificateLifetimeSeconds=lifetime_s)
    due = lifetime_s * 2 / 3
    renewed = Renewal(is_credential_new=True)
    moments = [0, due - 1, due, due + 1, due + due - 1, due + due]
    assert looks(operator.keys, moments) == [NOTHING, NOTHING, renewed, NOTHING, NOTHING, renewed]
    operator.keys.identity.bundle.verify(operator.keys.identity.credential, WALL + 2 * due, 0.0)


def test_each_certificate_has_a_key_of_its_own_and_both_are_found_again(tmp_path: Path) -> None:
    operator = Operator(tmp_path, authority())
    keys = set()
    for day in range(3):
        operator.keys.look(WALL + day * DAY_S)
        identity = operator.keys.identity
        keys.add(identity.key.private_numbers().private_value)
        assert identity.key.public_key() == identity.credential.public_key
        assert NodeKeys(operator.settings, WALL + day * DAY_S).identity.credential.der == identity.credential.der
    assert len(keys) == 3


def test_a_crash_between_key_and_certificate_is_mended_by_the_next_start(tmp_path: Path) -> None:
    operator = Operator(tmp_path, authority())
    certificate = operator.state()["node.pem"]
    operator.keys.look(WALL + DAY_S)
    (operator.settings.state_dir / "node.pem").write_bytes(certificate)
    again = NodeKeys(operator.settings, WALL + 1)
    assert again.identity.key.public_key() == again.identity.credential.public_key


def test_a_certificate_that_ends_with_its_authority_is_not_renewed_in_vain(tmp_path: Path) -> None:
    ending = make_authority("cluster.local", NOW, timedelta(hours=1))
    operator = Operator(tmp_path, ending)
    assert looks(operator.keys, [0, 1800, 3599]) == [NOTHING] * 3
    assert operator.keys.problems(WALL + 3599) == []
    assert looks(operator.keys, [3600, 3601, 3700]) == [Renewal(is_problem_new=True), NOTHING, NOTHING]
    expired, no_proof, useless = operator.keys.problems(WALL + 3700)
    assert "ca.pem: the authority has expired" in expired
    assert "certificate has expired" in no_proof
    assert "CN=trireme cluster.local of the trust bundle has expired" in useless


def test_a_clock_that_is_set_back_before_the_certificate_makes_another_one(tmp_path: Path) -> None:
    issuer = make_authority("cluster.local", NOW - timedelta(days=30))
    operator = Operator(tmp_path, issuer)
    assert operator.keys.look(WALL - DAY_S) == Renewal(is_credential_new=True)
    assert operator.keys.look(WALL - DAY_S) == NOTHING


# Rotation of the authority.


def test_an_authority_is_replaced_by_overlap(tmp_path: Path) -> None:
    old, new = authority(), authority()
    operator = Operator(tmp_path, old)
    first = operator.keys.identity.credential
    operator.trust(old, new)
    assert operator.keys.look(WALL) == Renewal(is_bundle_new=True)
    operator.issue_by(new)
    assert operator.keys.look(WALL) == Renewal(is_credential_new=True)
    second = operator.keys.identity.credential
    assert is_issued_by(second.certificate, new.certificate)
    for known in (first, second):  # tokens of before are believed as long as they last
        operator.keys.identity.bundle.verify(known, WALL, 0.0)
    operator.trust(new)
    assert operator.keys.look(WALL) == Renewal(is_bundle_new=True)
    with pytest.raises(CredentialError) as caught:
        operator.keys.identity.bundle.verify(first, WALL, 0.0)
    assert caught.value.reason is Reason.CREDENTIAL_UNTRUSTED
    assert operator.keys.look(WALL) == NOTHING


def test_both_at_once_are_one_change(tmp_path: Path) -> None:
    operator, new = Operator(tmp_path, authority()), authority()
    operator.issue_by(new)
    operator.trust(new)
    assert operator.keys.look(WALL) == Renewal(is_credential_new=True, is_bundle_new=True)


def test_files_that_say_the_same_in_other_words_change_nothing(tmp_path: Path) -> None:
    one, two = authority(), authority()
    operator = Operator(tmp_path, one)
    operator.trust(one, two)
    operator.keys.look(WALL)
    operator.bundle.write_bytes(b"# both\n" + operator.bundle.read_bytes() * 2)
    assert operator.keys.look(WALL) == NOTHING
    operator.trust(two, one)
    assert operator.keys.look(WALL) == NOTHING


def test_an_authority_that_is_certified_anew_with_its_key_keeps_the_nodes_certificates(tmp_path: Path) -> None:
    old = make_authority("cluster.local", NOW, timedelta(days=10))
    operator = Operator(tmp_path, old)
    before = operator.keys.identity.credential.der
    longer = Authority(_certified_anew(old), old.key)
    operator.trust(longer)
    operator.issue_by(longer)
    assert operator.keys.look(WALL) == Renewal(is_bundle_new=True)
    assert operator.keys.identity.credential.der == before


def _certified_anew(old: Authority) -> x509.Certificate:
    certificate = old.certificate
    builder = x509.CertificateBuilder(
        certificate.issuer, certificate.subject, certificate.public_key(), 99, NOW, NOW + timedelta(days=100)
    )
    for extension in certificate.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(old.key, hashes.SHA256())


# Files that cannot be used.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bundle.pem", b"", "trustBundle: .*bundle.pem"),
        ("bundle.pem", b"garbage", "trustBundle: .*bundle.pem"),
        ("bundle.pem", authority().certificate.public_bytes(Encoding.PEM), "trustBundle: does not vouch"),
        (
            "bundle.pem",
            credential(authority(), new_key()).certificate.public_bytes(Encoding.PEM),
            "trustBundle: .*bundle.pem: '': an authority needs basic constraints",
        ),
        ("ca.pem", authority().certificate.public_bytes(Encoding.PEM), "caKey: .*ca.key is not the key of .*ca.pem"),
        ("ca.key", b"garbage", "credentials: .*ca.key"),
    ],
)
def test_what_cannot_be_used_changes_nothing_and_is_told_once(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    operator = Operator(tmp_path, authority())
    path, state, identity = tmp_path / name, operator.state(), operator.keys.identity
    good = path.read_bytes()
    path.write_bytes(content)
    assert looks(operator.keys, [0, 1, 2]) == [Renewal(is_problem_new=True), NOTHING, NOTHING]
    (problem,) = operator.keys.problems(WALL)
    with pytest.raises(SettingsError, match=message):
        open_node_identity(operator.settings, WALL)
    assert "credentials" in problem
    assert operator.keys.identity is identity
    assert operator.state() == state
    path.write_bytes(good)
    assert looks(operator.keys, [3, 4]) == [Renewal(is_problem_new=True), NOTHING]
    assert operator.keys.problems(WALL) == []


def test_a_file_that_vanishes_is_a_problem_and_no_end(tmp_path: Path) -> None:
    operator = Operator(tmp_path, authority())
    operator.bundle.unlink()
    assert operator.keys.look(WALL) == Renewal(is_problem_new=True)
    assert "No such file" in operator.keys.problem


def test_a_renewal_that_cannot_be_kept_on_disk_is_tried_again(tmp_path: Path) -> None:
    operator = Operator(tmp_path, authority())
    state = operator.settings.state_dir
    moved = state.rename(tmp_path / "moved")
    state.write_text("in the way")
    assert operator.keys.look(WALL + DAY_S) == Renewal(is_problem_new=True)
    state.unlink()
    moved.rename(state)
    assert operator.keys.look(WALL + DAY_S) == Renewal(is_credential_new=True, is_problem_new=True)


def test_an_authority_for_another_trust_domain_issues_nothing_for_this_one(tmp_path: Path) -> None:
    operator, other = Operator(tmp_path, authority()), authority("other.example")
    operator.issue_by(other)
    operator.trust(other)
    operator.keys.look(WALL)
    assert "vouches for other.example alone" in operator.keys.problem


# Authorities outside their validity.


def test_an_authority_outside_its_validity_is_named_and_time_heals_it() -> None:
    tomorrow = make_authority("cluster.local", NOW + timedelta(days=1))
    early = credential(tomorrow, new_key(), lifetime=timedelta(days=3))
    bundle = TrustBundle([tomorrow.certificate, authority().certificate])
    with pytest.raises(CredentialError) as caught:
        bundle.verify(early, WALL, 0.0)
    assert caught.value.reason is Reason.CREDENTIAL_EXPIRED  # no reason that peers remember for good
    assert "its authority 'CN=trireme cluster.local'" in str(caught.value)
    bundle.verify(early, WALL + DAY_S, 0.0)


def test_an_authority_to_come_shows_among_the_problems(tmp_path: Path) -> None:
    now, tomorrow = authority(), make_authority("cluster.local", NOW + timedelta(days=1))
    operator = Operator(tmp_path, now)
    operator.trust(now, tomorrow)
    operator.keys.look(WALL)
    assert operator.keys.problems(WALL) == ["authority CN=trireme cluster.local of the trust bundle is not yet valid"]
    assert operator.keys.problems(WALL + DAY_S) == []


def test_how_long_ago_and_how_far_off_is_told() -> None:
    signer = authority()
    found, bundle = credential(signer, new_key()), TrustBundle([signer.certificate])
    for moment, text in ((found.not_after + 90, "90 s ago"), (found.not_before - 90, "begins in 90 s")):
        with pytest.raises(CredentialError, match=text):
            bundle.verify(found, moment, 30.0)
    assert datetime.fromtimestamp(found.not_after, UTC) == NOW + timedelta(days=1)
