# SPDX-License-Identifier: Apache-2.0
"""libcni's result cache, as runtimes write it."""

from __future__ import annotations

import base64
import json
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni_plugin.messages import MessageError
from enforcer_daemon.model import AttachmentId, PodRef
from enforcer_daemon.registration.results import CachedResult, decode_cached

VECTORS = Path(__file__).parents[2] / "vectors" / "cni-results"
ARGS = [["IgnoreUnknown", "1"], ["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", "web-0"], ["K8S_POD_UID", "u-1"]]
RESULT = {
    "cniVersion": "0.3.1",
    "interfaces": [{"name": "cni0"}, {"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/cni-1"}],
    "ips": [{"version": "4", "interface": 2, "address": "10.244.0.5/24", "gateway": "10.244.0.1"}],
}


def chain(*plugins: dict[str, Any]) -> str:
    return base64.b64encode(json.dumps({"name": "cbr0", "plugins": plugins}).encode()).decode()


def cached(**changes: Any) -> bytes:
    entry = {
        "kind": "cniCacheV1",
        "containerId": "c1",
        "config": chain({"type": "flannel"}, {"type": "portmap"}),
        "ifName": "eth0",
        "networkName": "cbr0",
        "netns": "/var/run/netns/cni-1",
        "cniArgs": ARGS,
        "result": RESULT,
    }
    return json.dumps({key: value for key, value in (entry | changes).items() if value is not None}).encode()


def read(**changes: Any) -> CachedResult:
    found = decode_cached(cached(**changes))
    assert found is not None
    return found


def test_a_pod_is_read_as_its_add_would_have_said() -> None:
    found = read()
    request = found.request
    assert (request.attachment, request.network) == (AttachmentId("c1", "eth0"), "cbr0")
    assert (request.pod, request.uid) == (PodRef("shop", "web-0"), "u-1")
    assert request.ips == (ip_address("10.244.0.5"),)
    assert request.host_interfaces == ("cni0", "veth1")
    assert found.paths == ("/var/run/netns/cni-1", "/run/netns/cni-1")


def test_a_placeholder_of_the_primary_is_passed_over() -> None:
    vector = json.loads((VECTORS / "aws-vpc.json").read_text())
    found = read(netns=None, result=vector["prevResult"])
    assert found.request.ips == (ip_address("10.24.1.9"),)
    assert found.paths == ("/var/run/netns/cni-4f6c",)


def test_an_entry_need_not_say_where_the_pod_is() -> None:
    result = {"ips": [{"address": "10.244.0.5/32"}]}
    assert read(netns=None, result=result).paths == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "other"},
        {"cniArgs": None},
        {"cniArgs": [["K8S_POD_NAMESPACE", "shop"]]},
        {"ifName": "net1"},
        {"config": chain({"type": "multus"})},
        {"config": chain({"type": "flannel"}, {"type": "trireme", "excludedNamespaces": ["shop"]})},
    ],
)
def test_what_is_not_to_be_enforced_is_passed_over(changes: dict[str, Any]) -> None:
    assert decode_cached(cached(**changes)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"config": "not base64"},
        {"config": None},
        {"config": chain({"type": "flannel"}, {"type": "trireme", "excludedNamespaces": ["other"]})},
    ],
)
def test_a_chain_that_says_nothing_against_it_is_no_reason(changes: dict[str, Any]) -> None:
    assert read(**changes).request.pod == PodRef("shop", "web-0")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"containerId": "a/b"}, "containerId"),
        ({"networkName": "a/b"}, "networkName"),
        ({"result": [1]}, "result"),
        ({"result": {"ips": []}}, "result.ips"),
        ({"result": {"ips": [{"address": "x"}]}}, r"result.ips\[0\].address"),
    ],
)
def test_a_fault_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(MessageError, match=field):
        decode_cached(cached(**changes))


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.binary(max_size=200)
    | st.dictionaries(st.sampled_from(sorted(json.loads(cached()))), _json).map(
        lambda changes: json.dumps(json.loads(cached()) | changes).encode()
    )
)
def test_any_bytes_are_a_pod_or_nothing_or_a_message_error(data: bytes) -> None:
    try:
        decode_cached(data)
    except MessageError:
        return
