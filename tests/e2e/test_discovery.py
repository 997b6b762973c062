# SPDX-License-Identifier: Apache-2.0
"""Pods that started without the plugin are found and enforced: at the daemon's start, and while it runs."""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from enforcer_daemon.daemon.limits import DaemonLimits
from tests.e2e.operation_world import HTTP, NODES, app, listening, pod, policy
from trireme_lab import Lab, LabSpec, Outcome, Tools
from trireme_lab.enforcer import enforcer_with
from trireme_lab.manifests import pod_manifest
from trireme_lab.netns import delete_all, open_socket
from trireme_lab.probe import Probe, run_probe
from trireme_lab.sandbox import Runtime, Sandbox, SandboxRequest

pytestmark = pytest.mark.kernel

NODE = "b"
EVERY_S = 0.2
DEADLINE_S = 60.0
LIMITS = DaemonLimits(discovery_interval_s=EVERY_S)
ONLY_LATE = policy("only-late", "server", ingress=[{"from": [app("late")]}])


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    pods = (pod("server", "a"), pod("open", "a"))
    tools = Tools(plugin=plugin, enforcer=enforcer_with(LIMITS))
    with Lab(LabSpec(NODES, pods=pods, manifests=(ONLY_LATE,)), tools) as lab:
        yield lab


class Late:
    """A pod of the runtime's that our plugin never saw; its labels are those of the directory of manifests."""

    def __init__(self, lab: Lab, runtime: Runtime, sandbox: Sandbox) -> None:
        self.lab = lab
        self.runtime = runtime
        self.sandbox = sandbox

    @property
    def cache_file(self) -> Path:
        directory = self.lab.node(NODE).directories.cni / "cache" / "results"
        return directory / f"trireme-{self.sandbox.container_id}-eth0"

    def edit(self, **changes: object) -> None:
        entry = json.loads(self.cache_file.read_text()) | changes
        self.cache_file.write_text(json.dumps({key: value for key, value in entry.items() if value is not None}))

    def outcome(self) -> Outcome:
        address = self.lab.address_of("x/server")
        return run_probe(Probe(self.sandbox.place.netns, address, HTTP.number, timeout_s=1.0)).outcome

    def is_enrolled(self) -> bool:
        names = [endpoint["pod"] for endpoint in self.lab.node(NODE).endpoints()]
        return self.sandbox.request.name.partition("/")[2] in names


@contextmanager
def late(lab: Lab) -> Iterator[Late]:
    """Have a pod on the node whose chain lacked our plugin; remove it as its runtime would."""
    name = f"late-{secrets.token_hex(3)}"
    spec = pod(name, NODE, namespace="x", app="late")
    lab.node(NODE).put(pod_manifest(spec, spec.labels))
    runtime = Runtime(lab.node(NODE), lab.tools, is_enforced=False)
    args = {"IgnoreUnknown": "1", "K8S_POD_NAMESPACE": "x", "K8S_POD_NAME": name, "K8S_POD_UID": name}
    netns = f"{lab.name}-{name}"
    try:
        sandbox = runtime.add(SandboxRequest(f"x/{name}", netns, (), args, {}))
        yield Late(lab, runtime, sandbox)
        Runtime(lab.node(NODE), lab.tools, is_enforced=True).delete(sandbox)  # the plugin is in the chain by now
    finally:
        delete_all([netns])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


def test_a_pod_from_before_is_enforced_when_the_daemon_starts(lab: Lab) -> None:
    node = lab.node(NODE)
    node.stop()
    with late(lab) as pod_:
        assert pod_.outcome().is_denied  # it has an allowed pod's address, and nobody vouches for it
        node.start()
        node.wait_ready()
        assert pod_.is_enrolled()
        assert pod_.outcome() is Outcome.CONNECTED


def test_a_connection_from_before_goes_no_further(lab: Lab) -> None:
    node = lab.node(NODE)
    node.stop()
    with (
        late(lab) as pod_,
        listening(lab, "x/open") as listener,
        open_socket(pod_.sandbox.place.netns, socket.AF_INET, socket.SOCK_STREAM) as client,
    ):
        client.settimeout(DEADLINE_S)
        client.connect(listener.getsockname())  # `open` admits everybody
        server, _ = listener.accept()
        with server:
            server.settimeout(1.0)
            client.sendall(b"before")
            assert server.recv(6) == b"before"
            node.start()
            node.wait_ready()
            assert pod_.is_enrolled()
            client.sendall(b"after")
            with pytest.raises((TimeoutError, ConnectionResetError)):
                server.recv(5)


def test_a_pod_that_starts_past_the_plugin_is_found_and_its_del_is_served(lab: Lab) -> None:
    with late(lab) as pod_:
        wait_for(pod_.is_enrolled)
        assert pod_.outcome() is Outcome.CONNECTED
        lab.node(NODE).restart()  # from now on it is recovered, by its record
        assert pod_.is_enrolled()
    wait_for(lambda: not pod_.is_enrolled())


def test_a_pod_is_found_by_its_interfaces_sandbox_and_else_reported(lab: Lab) -> None:
    node = lab.node(NODE)
    node.stop()
    with late(lab) as older, late(lab) as silent:
        older.edit(netns=None)  # as libcni before 1.2 leaves it
        ips = json.loads(silent.cache_file.read_text())["result"]["ips"]
        silent.edit(netns=None, result={"ips": [{"address": ip["address"]} for ip in ips]})
        node.start()
        node.wait_ready()
        assert older.is_enrolled()
        assert not silent.is_enrolled()
        assert f"does not say where the namespace of {silent.sandbox.request.name} is" in node.log_text()


def test_an_entry_of_a_pod_that_is_gone_or_of_another_enrols_nobody(lab: Lab) -> None:
    with late(lab) as pod_:
        entry = json.loads(pod_.cache_file.read_text())
        wait_for(pod_.is_enrolled)
        stale = pod_.cache_file.with_name("trireme-stale-eth0")
        address = [{"address": "10.99.0.9/24"}]  # its path leads to the pod above by now
        args = [["K8S_POD_NAMESPACE", "x"], ["K8S_POD_NAME", "stale"]]
        gone = entry | {"containerId": "gone", "netns": "/run/netns/gone", "cniArgs": args, "result": {"ips": address}}
        stale.write_text(json.dumps(entry | {"containerId": "stale", "cniArgs": args, "result": {"ips": address}}))
        stale.with_name("trireme-gone-eth0").write_text(json.dumps(gone))
        stale.with_name("trireme-broken-eth0").write_text('{"kind":')
        try:
            wait_for(lambda: "trireme-broken-eth0" in lab.node(NODE).log_text())
            time.sleep(4 * EVERY_S)  # what must not happen has had its chances
            assert "stale" not in [endpoint["pod"] for endpoint in lab.node(NODE).endpoints()]
            assert lab.node(NODE).log_text().count("trireme-broken-eth0") == 1
        finally:
            for path in stale.parent.glob("trireme-[sgb]*-eth0"):
                path.unlink()


def test_a_registered_pod_is_not_enrolled_again(lab: Lab) -> None:
    spec = pod("usual", NODE)
    lab.add_pod(spec)
    time.sleep(4 * EVERY_S)
    lab.remove_pod("x/usual")
    assert "x/usual" not in [record.get("pod") for record in discovered(lab)]


def discovered(lab: Lab) -> list[dict[str, object]]:
    records = lab.node(NODE).log_records()
    return [dict(record) for record in records if str(record.get("event", "")).startswith("pod discovered")]
