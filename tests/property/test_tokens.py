# SPDX-License-Identifier: Apache-2.0
"""Tokens, credentials and settings: any input gives a value or the documented error."""

from __future__ import annotations

import json
from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from enforcer_daemon.errors import CredentialError, SettingsError, TokenError
from enforcer_daemon.identity.credential import decode_credential
from enforcer_daemon.identity.tokens import Claims, decode_token, encode_token
from enforcer_daemon.model import Identity, NamedPort, PodRef, Protocol
from enforcer_daemon.settings_file import decode_settings
from tests.unit.identity.certificates import WALL, authority, credential, new_key
from tests.unit.identity.test_tokens import CREDENTIAL as OTHER
from tests.unit.identity.test_tokens import TREE, wire_of, wire_of_packed

KEY = new_key()
CREDENTIAL = credential(authority(), KEY)
names = st.text(st.characters(codec="utf-8"), max_size=30)
labels = st.dictionaries(names, names, max_size=5)
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), names, st.just("10.0.0.1"))
trees = st.recursive(
    leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3))
)


def decode(wire: bytes) -> Claims | None:
    try:
        return decode_token(wire, OTHER, WALL, 30.0)
    except TokenError:
        return None


@given(st.binary(max_size=300))
def test_any_bytes_are_a_token_or_a_token_error(wire: bytes) -> None:
    assert decode(wire) is None


@given(st.binary(max_size=300))
def test_any_signed_bytes_are_a_token_or_a_token_error(payload: bytes) -> None:
    decode(wire_of(payload))
    decode(wire_of_packed(payload))


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(TREE | {"ports": 0}, trees)))
def test_any_claims_are_read_or_a_token_error(claims: dict[str, object]) -> None:
    decode(wire_of(json.dumps({**TREE, **claims}).encode("utf-8", "surrogatepass")))


@given(
    st.builds(PodRef, names.filter(lambda text: text and "/" not in text), names),
    labels,
    labels,
    st.lists(st.ip_addresses(), max_size=4),
    st.lists(st.builds(NamedPort, names, st.integers(1, 65_535), st.sampled_from(Protocol)), max_size=3),
)
def test_what_was_signed_is_read(
    pod: PodRef, own: dict[str, str], namespace: dict[str, str], ips: list[object], ports: list[NamedPort]
) -> None:
    identity = Identity(
        pod, tuple(ip_address(str(ip)) for ip in ips), own, namespace, "node-1", named_ports=tuple(ports)
    )
    claims = Claims(identity, bytes(range(32)), WALL, WALL + 600)
    found = decode_token(encode_token(claims, b"n", CREDENTIAL, KEY), CREDENTIAL, WALL, 0.0)
    assert (found.identity.pod, found.identity.ips, found.identity.named_ports) == (pod, identity.ips, tuple(ports))
    assert (found.identity.labels, found.identity.namespace_labels) == (own, namespace)


@given(st.binary(max_size=20), st.integers(0, 10_000), st.integers(0, 255))
def test_any_change_of_a_certificate_is_read_or_a_credential_error(extra: bytes, at: int, value: int) -> None:
    der = CREDENTIAL.der
    at %= len(der)
    for wire in (der[:at], der[:at] + bytes((value,)) + der[at + 1 :], der[:at] + extra + der[at:], extra):
        try:
            decode_credential(wire)
        except CredentialError:
            continue


@given(trees)
def test_any_tree_is_settings_or_a_settings_error(tree: object) -> None:
    try:
        decode_settings(tree)
    except SettingsError:
        return


SETTINGS = {"node": "n"}
groups = {
    "networks": ("enforced", "virtual", "masquerade"),
    "credentials": ("caCertificate", "caKey", "tokenLifetimeSeconds", "clockLeewaySeconds"),
    "dataplane": ("rulesBackend", "synRateLimitPerSource"),
    "log": ("level",),
}


@given(st.sampled_from([(group, key) for group, keys in groups.items() for key in keys]), trees)
def test_any_value_of_a_setting_is_taken_or_named(where: tuple[str, str], value: object) -> None:
    group, key = where
    message = ""
    try:
        decode_settings({**SETTINGS, group: {key: value}})
    except SettingsError as err:
        message = str(err)
    assert not message or group in message
