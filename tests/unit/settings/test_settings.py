# SPDX-License-Identifier: Apache-2.0
"""Settings: every key with its type, and errors that name the key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from enforcer_daemon.errors import SettingsError
from enforcer_daemon.settings import DenyWith, RulesBackend, Settings
from enforcer_daemon.settings_file import SETTINGS, decode_settings, load_settings, split_listen


def test_a_node_name_is_all_that_is_needed() -> None:
    settings = decode_settings({"node": "node-1"})
    assert (settings.node, settings.trust_domain, settings.deny_with) == ("node-1", "cluster.local", DenyWith.DROP)
    assert settings.credentials.clock_leeway_s == 30.0


def test_every_kind_of_value_is_read() -> None:
    settings = decode_settings(
        {
            "node": "node-1",
            "denyWith": "reset",
            "policyDir": None,
            "stateDir": "/state",
            "credentials": {"caCertificate": "/ca.pem", "caKey": "/ca.key", "certificateLifetimeSeconds": 60},
            "networks": {"enforced": ["10.0.0.0/8", "fd00::/16"], "masquerade": ["192.0.2.1"]},
            "dataplane": {"rulesBackend": "iptables", "synRateLimitPerSource": 1_000},
            "registration": {"excludedNamespaces": ["kube-system"]},
        }
    )
    assert settings.deny_with is DenyWith.RESET
    assert settings.policy_dir is None
    assert settings.credentials.certificate_lifetime_s == 60.0
    assert settings.networks.enforced == (ip_network("10.0.0.0/8"), ip_network("fd00::/16"))
    assert settings.networks.masquerade == (ip_address("192.0.2.1"),)
    assert settings.dataplane.rules_backend is RulesBackend.IPTABLES
    assert settings.registration.excluded_namespaces == ("kube-system",)
    assert settings.state_dir == Path("/state")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([], "the file: must be a mapping"),
        ({}, "node: is required"),
        ({"node": ""}, "node: must be a DNS name"),
        ({"node": "a/b"}, "node: must be a DNS name"),
        ({"node": "Ünode"}, "node: must be a DNS name"),
        ({"node": 7}, "node: must be a string"),
        ({"node": "n", "trustDomain": "a/b"}, "trustDomain: must be a DNS name"),
        ({"node": "n", "color": 1}, "color: unknown setting"),
        ({"node": "n", 7: 1}, "the file: has a key that is no string"),
        ({"node": "n", "log": {"a\nb": 1}}, "log: has a key that is no string, or not printable"),
        ({"node": date(2026, 1, 1)}, "node: must be a string"),
        ({"node": "n", "log": {"levl": 1}, "color": 1}, "log.levl: unknown setting; color: unknown setting"),
        ({"node": "n", "log": {"levl": 1}}, "log.levl: unknown setting"),
        ({"node": "n", "log": []}, "log: must be a mapping"),
        ({"node": "n", "log": {"level": "loud"}}, "log.level: must be one of debug, info, warning, error"),
        ({"node": "n", "denyWith": "shout"}, "denyWith: must be one of drop, reset"),
        ({"node": "n", "denyWith": ["drop"]}, "denyWith: must be one of drop, reset"),
        ({"node": "n", "stateDir": "relative"}, "stateDir: must be an absolute path"),
        ({"node": "n", "stateDir": 7}, "stateDir: must be a string"),
        ({"node": "n", "networks": {"enforced": "10.0.0.0/8"}}, "networks.enforced: must be a list"),
        ({"node": "n", "networks": {"enforced": [7]}}, "networks.enforced[0]: must be a string"),
        ({"node": "n", "networks": {"enforced": ["10.0.0.1/8"]}}, "networks.enforced[0]: 10.0.0.1/8 has host bits"),
        ({"node": "n", "networks": {"enforced": ["fd00::1/16"]}}, "networks.enforced[0]: fd00::1/16 has host bits"),
        ({"node": "n", "networks": {"masquerade": ["x"]}}, "networks.masquerade[0]: "),
        ({"node": "n", "credentials": {"caKey": "/x"}}, "credentials.caCertificate and credentials.caKey"),
        ({"node": "n", "dataplane": {"synRateLimitPerSource": True}}, "dataplane.synRateLimitPerSource: must be a num"),
        (
            {"node": "n", "dataplane": {"synRateLimitPerSource": 999}},
            "dataplane.synRateLimitPerSource: must be at",
        ),
        (
            {"node": "n", "dataplane": {"synRateLimitPerSource": 1_000_001}},
            "dataplane.synRateLimitPerSource: must be at most 1000000",
        ),
        (
            {
                "node": "n",
                "credentials": {"source": "kubernetes", "certificateLifetimeSeconds": 599},
                "kubernetes": {"enabled": True},
            },
            "credentials.certificateLifetimeSeconds: must be at least 600 with credentials.source kubernetes: the API",
        ),
        *(
            ({"node": "n", "credentials": {key: value}}, f"credentials.{key}: {message}")
            for key, value, message in [
                ("certificateLifetimeSeconds", 4.9, "must be at least 5"),
                ("tokenLifetimeSeconds", 86_401, "must be at most 86400"),
                ("tokenLifetimeSeconds", 0, "must be more than 0"),
                ("tokenLifetimeSeconds", "1", "must be a number"),
                ("tokenLifetimeSeconds", True, "must be a number"),
                ("tokenLifetimeSeconds", float("nan"), "must be a finite number"),
                ("clockLeewaySeconds", float("inf"), "must be a finite number"),
                ("clockLeewaySeconds", 10**400, "must be a finite number"),
                ("clockLeewaySeconds", -1, "must be at least 0"),
            ]
        ),
    ],
    ids=str,
)
def test_an_error_names_the_key(tree: Any, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        decode_settings(tree)
    assert str(caught.value).startswith(message)


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "enforcer.yaml"
    path.write_text("node: node-1\n")
    assert load_settings(path).node == "node-1"


@pytest.mark.parametrize("content", [b"node: [", b"\xff\xfe\xff", b"", b"node: n\nx: 1\n", b"node: a\n---\nnode: b\n"])
def test_an_error_of_a_file_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "enforcer.yaml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"enforcer\.yaml:(\d+:)? "):
        load_settings(path)


@pytest.mark.parametrize("content", ["node: a\nnode: b\n", "node: a\nlog: {level: info, level: debug}\n"])
def test_a_setting_that_occurs_twice_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "enforcer.yaml"
    path.write_text(content)
    with pytest.raises(SettingsError, match=r"enforcer\.yaml:\d: duplicate field \"(node|level)\""):
        load_settings(path)


@pytest.mark.parametrize("content", ["node: !!int ''", "node: !!set {x}", "node: !!binary x", "[" * 600])
def test_nonsense_for_the_parser_is_a_settings_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "enforcer.yaml"
    path.write_text(content)
    with pytest.raises(SettingsError, match=r"enforcer\.yaml:\d+: "):
        load_settings(path)


@pytest.mark.parametrize("value", ["/a\0b", "/a\ud800", "/a\nb"])
def test_a_path_that_cannot_be_opened_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match="policyDir: must be a string without control characters"):
        decode_settings({"node": "n", "policyDir": value})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.yaml"):
        load_settings(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1", "127.0.0.1:", ":9475", "localhost:9475", "::1:9475", "[127.0.0.1]:1", "[::1]:0", "127.0.0.1:65536"],
)
def test_a_place_to_listen_at_is_an_address_and_a_port(text: str) -> None:
    with pytest.raises(SettingsError, match=r"metrics\.listen: must be address:port"):
        decode_settings({"node": "a", "metrics": {"listen": text}})


@pytest.mark.parametrize(("text", "found"), [("127.0.0.1:9475", ("127.0.0.1", 9475)), ("[::1]:1", ("::1", 1))])
def test_a_place_to_listen_at_is_split(text: str, found: tuple[str, int]) -> None:
    assert split_listen(text) == found


def test_verification_of_placement_needs_a_cluster() -> None:
    with pytest.raises(SettingsError, match=r"kubernetes\.verifyPlacement: needs kubernetes\.enabled"):
        decode_settings({"node": "a", "kubernetes": {"verifyPlacement": True}})


def test_a_number_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"credentials\.clockLeewaySeconds: must be a finite number"):
        decode_settings({"node": "a", "credentials": {"clockLeewaySeconds": 10**5_000}})


def test_a_tree_without_end_is_refused() -> None:
    tree: dict[str, Any] = {"node": "a"}
    tree["log"] = tree
    with pytest.raises(SettingsError, match="nested more than 32 deep"):
        decode_settings(tree)


def test_an_operator_has_few_decisions_to_make() -> None:
    """A limit that nobody can choose better than the author is a constant; durations are named as in Kubernetes."""
    keys = list(keys_of(SETTINGS.dump_python(Settings("n"), mode="json", by_alias=True)))
    assert len(keys) <= 35
    assert not any(key.endswith("S") for key in keys)


def keys_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield prefix + key
