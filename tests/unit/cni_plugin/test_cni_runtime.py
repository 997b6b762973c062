# SPDX-License-Identifier: Apache-2.0
"""The lab's CNI runtime, with plugins that write down what they are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trireme_lab.cni_runtime import CniError, CniRuntime

SCRIPT = """#!/bin/sh
log={log}
printf '%s' "{name} $CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME $CNI_NETNS $CNI_ARGS " >> $log
cat >> $log; echo >> $log
{body}
"""


class Chain:
    """A conflist of shell scripts, and what they were called with."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.conflist: dict[str, Any] = {"cniVersion": "1.1.0", "name": "pods", "plugins": []}

    def plugin(self, name: str, body: str = "", **entry: object) -> None:
        path = self.directory / name
        path.write_text(SCRIPT.format(log=self.log, name=name, body=body))
        path.chmod(0o755)
        self.conflist["plugins"].append({"type": name, **entry})

    def runtime(self) -> CniRuntime:
        return CniRuntime(self.conflist, [self.directory], self.directory / "cache")

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        lines = [line.partition(" {") for line in self.log.read_text().splitlines()]
        return [(head.rstrip(), json.loads("{" + tree)) for head, _, tree in lines]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def test_results_are_passed_on_and_the_way_back_is_reversed(chain: Chain) -> None:
    chain.plugin("first", """[ $CNI_COMMAND != ADD ] || echo '{"ips": [1]}'""")
    chain.plugin("second", """[ $CNI_COMMAND != ADD ] || echo '{"ips": [2]}'""")
    runtime = chain.runtime()
    assert runtime.add("c1", "/ns", cni_args={"A": "b", "C": "d"}) == {"ips": [2]}
    runtime.check("c1")
    runtime.delete("c1")
    named = "c1 eth0 /ns A=b;C=d"
    assert [(head, tree.get("prevResult")) for head, tree in chain.calls()] == [
        (f"first ADD {named}", None),
        (f"second ADD {named}", {"ips": [1]}),
        (f"first CHECK {named}", {"ips": [2]}),
        (f"second CHECK {named}", {"ips": [2]}),
        (f"second DEL {named}", {"ips": [2]}),
        (f"first DEL {named}", {"ips": [2]}),
    ]
    runtime.delete("c1")
    assert chain.calls()[-1] == ("first DEL c1 eth0", {"type": "first", "cniVersion": "1.1.0", "name": "pods"})


def test_a_plugin_gets_the_arguments_of_its_capabilities_alone(chain: Chain) -> None:
    chain.plugin("first", capabilities={"ips": True, "mac": False})
    chain.plugin("second", args={"cni": {"x": 1}})
    arguments = {"ips": ["10.0.0.1/8"], "mac": "00:00"}
    chain.runtime().add("c1", "/ns", capability_args=arguments, cni_labels={"app": "web"})
    (_, first), (_, second) = chain.calls()
    assert (first["runtimeConfig"], "capabilities" in first) == ({"ips": ["10.0.0.1/8"]}, False)
    assert "runtimeConfig" not in second
    assert second["args"] == {"cni": {"x": 1, "labels": [{"key": "app", "value": "web"}]}}


def test_a_failed_add_is_undone(chain: Chain) -> None:
    chain.plugin("first")
    chain.plugin("second", """[ $CNI_COMMAND != ADD ] || { echo '{"code": 101, "msg": "no"}'; exit 1; }""")
    with pytest.raises(CniError, match="no") as raised:
        chain.runtime().add("c1", "/ns")
    assert (raised.value.command, raised.value.plugin, raised.value.code) == ("ADD", "second", 101)
    assert [head.split(" c1")[0] for head, _ in chain.calls()] == ["first ADD", "second ADD", "second DEL", "first DEL"]


@pytest.mark.parametrize("body", ["echo oops", "echo oops; exit 1", "echo '{}'; exit 3", "echo '[]'"])
def test_output_that_is_neither_result_nor_error_is_an_error(chain: Chain, body: str) -> None:
    chain.plugin("first", body)
    with pytest.raises(CniError, match="exit status"):
        chain.runtime().add("c1", "/ns")


def test_a_plugin_that_is_not_installed_is_an_error(chain: Chain) -> None:
    chain.conflist["plugins"] = [{"type": "absent"}]
    with pytest.raises(CniError, match="no such plugin"):
        chain.runtime().status()


def test_gc_lists_what_is_left(chain: Chain) -> None:
    chain.plugin("first")
    chain.runtime().gc([("c1", "eth0")])
    ((_, tree),) = chain.calls()
    assert tree["cni.dev/valid-attachments"] == [{"containerID": "c1", "ifname": "eth0"}]
