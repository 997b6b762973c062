# SPDX-License-Identifier: Apache-2.0
"""prevResult as primary plugins write it (tests/vectors/cni-results)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cni_plugin.result import PrevResult, read_prev_result
from cni_plugin.spec import CniError

VECTORS = Path(__file__).parents[2] / "vectors" / "cni-results"
LAYOUTS = sorted(VECTORS.glob("*.json"))
POD = {"name": "eth0", "sandbox": "/run/netns/x"}
IPS = [{"address": "10.0.0.5/24"}]


def read(interfaces: object, ips: object = IPS, ifname: str = "eth0") -> PrevResult:
    return read_prev_result({"cniVersion": "0.4.0", "interfaces": interfaces, "ips": ips}, ifname)


@pytest.mark.parametrize("path", LAYOUTS, ids=[path.stem for path in LAYOUTS])
def test_a_primarys_result_is_read_or_refused_with_its_reason(path: Path) -> None:
    vector: dict[str, Any] = json.loads(path.read_text())
    if "refused" in vector:
        with pytest.raises(CniError) as caught:
            read_prev_result(vector["prevResult"], vector["ifname"])
        assert vector["refused"] in caught.value.message
        return
    found = read_prev_result(vector["prevResult"], vector["ifname"])
    assert found == PrevResult(tuple(vector["ips"]), tuple(vector["hostInterfaces"]), vector["mtu"])


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "dummy01234567890"},
        {"name": ""},
        {"name": "a/b", "mac": "0"},
        {"name": "dummy", "sandbox": "0", "mtu": "1500"},
        {"sandbox": "/run/netns/x"},
        {"name": None, "sandbox": 1},
        {"name": ["eth0"], "mtu": {}},
    ],
)
def test_what_another_interfaces_entry_says_is_opaque(entry: dict[str, object]) -> None:
    found = read([POD, {"name": "veth1"}, entry], [{"address": "10.0.0.5/24", "interface": 0}])
    names = ("veth1", "dummy") if entry.get("name") == "dummy" and not entry.get("sandbox") else ("veth1",)
    assert found == PrevResult(("10.0.0.5",), names, None)


def test_the_pods_interface_is_known_by_name_if_the_result_gives_it_no_sandbox() -> None:
    assert read([{"name": "eth0", "mtu": 1400}], [{"address": "10.0.0.5", "interface": 0}]) == (("10.0.0.5",), (), 1400)
    assert read([{"name": "eth0"}, {"name": "veth1"}]).host_interfaces == ("veth1",)


def test_an_interface_of_the_same_name_on_the_node_is_not_the_pods() -> None:
    ips = [{"address": "10.0.0.5", "interface": 1}, {"address": "192.0.2.1", "interface": 0}]
    assert read([{"name": "eth0"}, POD], ips) == (("10.0.0.5",), ("eth0",), None)
