# SPDX-License-Identifier: Apache-2.0
"""Settings that have no effect: an error if that is certainly a mistake, else a warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from enforcer_daemon.__main__ import main
from enforcer_daemon.errors import SettingsError
from enforcer_daemon.settings_effects import warnings_of
from enforcer_daemon.settings_file import decode_settings

POOL = ["198.51.100.0/28"]
KUBERNETES = {"kubernetes": {"enabled": True}}
BLIND = {"kubernetes": {"enabled": True, "watchServices": False}}
POOLS = pytest.mark.parametrize("key", ["externalIpNetworks", "loadBalancerNetworks"])
ENFORCED = {"enforced": ["10.0.0.0/8"]}


def refusal(**tree: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        decode_settings({"node": "n", **tree})
    return str(caught.value)


def warnings(**tree: Any) -> list[str]:
    return list(warnings_of(decode_settings({"node": "n", "policyDir": None, **tree})))


def cluster_warnings(**networks: Any) -> list[str]:
    return warnings(networks=networks, **KUBERNETES)


@POOLS
def test_pools_of_services_need_a_cluster(key: str) -> None:
    assert refusal(networks={key: POOL}) == f"networks.{key}: has no effect without kubernetes.enabled"


@POOLS
def test_pools_of_services_need_services(key: str) -> None:
    expected = f"networks.{key}: has no effect with kubernetes.watchServices false: no Service is read"
    assert refusal(networks={key: POOL}, **BLIND) == expected


@POOLS
def test_pools_beside_configured_virtual_networks_are_an_error_if_these_lack_them(key: str) -> None:
    assert refusal(networks={key: [*POOL, "203.0.113.0/24"], "virtual": ["203.0.0.0/16"]}, **KUBERNETES) == (
        f"networks.{key}: has no effect, since networks.virtual replaces what Services state; 198.51.100.0/28 is not "
        "in networks.virtual, so it is not virtual"
    )


@POOLS
def test_pools_that_configured_virtual_networks_cover_are_a_warning(key: str) -> None:
    # Two halves cover the whole.
    virtual = ["198.51.100.0/29", "198.51.100.8/29", "2001:db8::/32"]
    assert cluster_warnings(**{key: POOL}, virtual=virtual) == [
        f"networks.{key}: has no effect, since networks.virtual replaces what Services state, and covers it"
    ]


def test_no_load_balancer_beside_configured_virtual_networks_is_a_warning() -> None:
    assert len(cluster_warnings(loadBalancerNetworks=[], virtual=["10.96.0.0/12"])) == 1
    assert cluster_warnings(loadBalancerNetworks=[]) == []


@POOLS
@pytest.mark.parametrize(
    ("pool", "why"),
    [
        ("10.1.0.0/16", "an address inside networks.enforced is a pod's, whatever a Service states"),
        ("127.0.0.0/8", "it holds no address of a single host outside (loopback, link-local, multicast, reserved)"),
        ("fe80::/64", "it holds no address of a single host outside (loopback, link-local, multicast, reserved)"),
    ],
)
def test_pools_where_no_service_makes_an_address_virtual(key: str, pool: str, why: str) -> None:
    told = refusal(networks={key: ["203.0.113.0/24", pool], **ENFORCED}, **KUBERNETES)
    assert told == f"networks.{key}[1]: {pool} has no effect: {why}"


def test_everybodys_addresses_are_a_warning() -> None:
    assert cluster_warnings(externalIpNetworks=["0.0.0.0/0"]) == [
        (
            "networks.externalIpNetworks: 0.0.0.0/0 allows every IPv4 address: any user who may create a Service "
            "decides where pods of all namespaces send their identity"
        )
    ]
    assert cluster_warnings(loadBalancerNetworks=["0.0.0.0/0", "::/0"]) == [
        "networks.loadBalancerNetworks: 0.0.0.0/0 restricts nothing in IPv4",
        "networks.loadBalancerNetworks: ::/0 restricts nothing in IPv6",
    ]
    for key in ("enforced", "virtual"):
        assert cluster_warnings(**{key: ["::/0"]}) == [
            f"networks.{key}: ::/0 is every IPv6 address: pods send their identity to hosts outside the cluster too"
        ]


def test_a_required_identity_needs_networks_where_it_is_required() -> None:
    required: dict[str, Any] = {"requireIdentity": True}
    assert refusal(networks=required) == (
        "networks.requireIdentity: has no effect without networks.enforced (or kubernetes.enabled, to discover them)"
    )
    inside = {"virtual": ["10.0.0.0/9", "10.128.0.0/9"], **ENFORCED}
    assert refusal(networks={**required, **inside}) == (
        "networks.requireIdentity: has no effect, since all of networks.enforced is within networks.virtual, which "
        "takes precedence"
    )
    assert cluster_warnings(**required) == []


def test_enforced_networks_within_virtual_ones_are_a_warning() -> None:
    assert cluster_warnings(enforced=["10.1.0.0/16", "10.2.0.0/16"], virtual=["10.1.0.0/16"]) == [
        (
            "networks.enforced: 10.1.0.0/16 is within networks.virtual, which takes precedence: pods there are "
            "dialed as Services are, and networks.requireIdentity does not apply to them"
        )
    ]


def test_a_daemon_that_neither_knows_networks_nor_policies_says_so() -> None:
    assert warnings() == [
        (
            "networks.enforced and networks.virtual: both are empty, so no connection carries an identity, and "
            "policies decide by address alone"
        ),
        "policyDir: is null without kubernetes.enabled, so there are no policies, and no pod is isolated",
    ]
    assert warnings(policyDir="/policies", networks=ENFORCED) == []
    assert warnings(**KUBERNETES) == []


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"kubernetes": {"kubeconfig": "/kubeconfig"}},
            "kubernetes.kubeconfig: has no effect without kubernetes.enabled",
        ),
        (
            {"credentials": {"bundleConfigMap": "a/b"}},
            "credentials.bundleConfigMap: has no effect with credentials.source authority",
        ),
        (
            {"credentials": {"signerName": "example.com/nodes"}},
            "credentials.signerName: has no effect with credentials.source authority",
        ),
        (
            {"credentials": {"source": "kubernetes", "bundleConfigMap": "a/b", "trustBundle": "/b.pem"}, **KUBERNETES},
            "credentials.bundleConfigMap: has no effect with credentials.trustBundle, which takes precedence",
        ),
        (
            {"registration": {"excludedNamespaces": ["kube-system", "team-*"]}},
            'registration.excludedNamespaces[1]: "team-*" has no effect: no namespace can have this name',
        ),
    ],
    ids=str,
)
def test_other_settings_without_effect(tree: Any, message: str) -> None:
    assert refusal(**tree) == message


def test_lifetimes_without_effect_are_warnings() -> None:
    files = {"source": "files", "certificate": "/c", "key": "/k", "trustBundle": "/b"}
    assert warnings(credentials={**files, "certificateLifetimeSeconds": 7200}, **KUBERNETES) == [
        (
            "credentials.certificateLifetimeSeconds: has no effect with credentials.source files: the file's "
            "certificate states its validity"
        )
    ]
    assert warnings(credentials={"tokenLifetimeSeconds": 7200, "certificateLifetimeSeconds": 3600}, **KUBERNETES) == [
        (
            "credentials.tokenLifetimeSeconds: 7200 has no effect beyond credentials.certificateLifetimeSeconds "
            "(3600): a token ends with the certificate that signs it"
        )
    ]
    assert warnings(credentials={**files, "tokenLifetimeSeconds": 86_400}, **KUBERNETES) == []


def test_all_that_has_no_effect_is_named_at_once() -> None:
    told = refusal(networks={"externalIpNetworks": POOL}, kubernetes={"kubeconfig": "/x"})
    assert told == (
        "networks.externalIpNetworks: has no effect without kubernetes.enabled; "
        "kubernetes.kubeconfig: has no effect without kubernetes.enabled"
    )


def test_check_config_shows_warnings(tmp_path: Path) -> None:
    path = tmp_path / "enforcer.yaml"
    directories = {"stateDir": str(tmp_path), "registration": {"runDir": str(tmp_path)}}
    path.write_text(json.dumps({"node": "n", **directories}))
    result = CliRunner().invoke(main, ["--config", str(path), "--check-config"])
    assert result.exit_code == 0
    assert f"{path}: warning: policyDir: is null without kubernetes.enabled" in result.output
