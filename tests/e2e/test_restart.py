# SPDX-License-Identifier: Apache-2.0
"""The enforcers die, by a crash or in good order, and come back: what goes on, what waits, what is found again."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cni_plugin import messages
from cni_plugin.deletions import enqueue
from enforcer_daemon.dataplane.backends import make_backend
from enforcer_daemon.dataplane.ratelimits import QueueLimits
from enforcer_daemon.dataplane.ruleset import QUEUE_NUMBER, EndpointRules
from enforcer_daemon.model import PodRef
from tests.e2e.operation_world import HTTP, NODES, Stream, app, connection, outcome, pod, policy, rules_of
from trireme_lab import Lab, LabError, LabSpec, Outcome, ProbeResult, Tools
from trireme_lab.netns import NETNS_DIR, delete_all
from trireme_lab.probe import run_probe
from triremectl.admin_client import AdminError

pytestmark = pytest.mark.kernel

PODS = ("x/client", "x/near", "x/server")
DENY = policy("deny-all", ingress=[])
ALLOW = policy("allow", "server", ingress=[{"from": [app("client")]}])
ENDINGS = [signal.SIGKILL, signal.SIGTERM]
_AS_BY_A_CRASH = pytest.param(signal.SIGKILL, marks=pytest.mark.stock_kernel)
_REPEATED_FOR_S = 110.0
"""A SYN is retransmitted after 1, 3, 7, 15, 31 and 63 s; an emulated machine may take half a minute to start two
enforcers."""
_GUARD_TABLE = "inet", "trireme_guard"


@pytest.fixture(scope="module")
def lab(plugin: Path) -> Iterator[Lab]:
    pods = (pod("client", "a"), pod("near", "a"), pod("server", "b"))
    with Lab(LabSpec(NODES, pods=pods, manifests=(DENY, ALLOW)), Tools(plugin=plugin)) as lab:
        yield lab


@contextmanager
def _without_enforcers(lab: Lab, ending: signal.Signals = signal.SIGKILL, nodes: str = "ab") -> Iterator[None]:
    """End the enforcers, and start them again after the block."""
    for name in nodes:
        lab.node(name).daemon.stop(ending)
    try:
        yield
    finally:
        for name in nodes:
            lab.node(name).start()
        for name in nodes:
            lab.node(name).wait_ready()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("ending", [_AS_BY_A_CRASH, signal.SIGTERM])
def test_flows_go_on_probes_pass_and_new_flows_wait(lab: Lab, ending: signal.Signals, version: int) -> None:
    with connection(lab, "x/client", "x/server", version) as ends, Stream(*ends) as stream:
        stream.wait_for_rounds(3)
        with _patient_probe_while_down(lab, ending, version) as waiting:
            stream.wait_for_rounds(10)
            assert outcome(lab, "node:b", "x/server", HTTP.number, version) is Outcome.CONNECTED
            assert outcome(lab, "node:a", "x/near", HTTP.number, version) is Outcome.CONNECTED
            assert not waiting.done()
        stream.wait_for_rounds(10)
    result = waiting.result()
    assert result.outcome is Outcome.CONNECTED
    assert result.banner == "x/server"
    assert result.seconds > 0.9  # it took a repetition of the SYN


@contextmanager
def _patient_probe_while_down(lab: Lab, ending: signal.Signals, version: int) -> Iterator[Future[ProbeResult]]:
    """Connect while the enforcers are down, and give up the block's world to them again before the attempt is over."""
    with ThreadPoolExecutor(1) as executor:
        request = replace(lab.request("x/client", "x/server", HTTP.number, version), timeout_s=_REPEATED_FOR_S)
        with _without_enforcers(lab, ending):
            waiting = executor.submit(run_probe, request)
            time.sleep(0.1)  # the first SYN is gone by now, dropped by the kernel
            yield waiting


def test_a_denied_flow_is_denied_before_during_and_after(lab: Lab) -> None:
    assert outcome(lab, "x/near", "x/server", HTTP.number, timeout_s=0.3) is Outcome.TIMED_OUT
    with _without_enforcers(lab):
        assert outcome(lab, "x/near", "x/server", HTTP.number, timeout_s=0.3) is Outcome.TIMED_OUT
    assert outcome(lab, "x/near", "x/server", HTTP.number, timeout_s=0.3) is Outcome.TIMED_OUT


@pytest.mark.stock_kernel
def test_flows_are_judged_by_the_policies_that_changed_meanwhile(lab: Lab) -> None:
    """What the new enforcer must know of a flow that an earlier one released outlives that one."""
    with connection(lab, "x/client", "x/server") as (client, server):
        client.sendall(b"before")
        assert server.recv(100) == b"before"
        with _without_enforcers(lab):
            lab.apply(policy("allow", "server", ingress=[{"from": [app("near")]}]))
            client.sendall(b"still")
            assert server.recv(100) == b"still"
        try:
            for end in (client, server):
                end.settimeout(20.0)
                with pytest.raises(ConnectionError):
                    end.recv(100)
        finally:
            lab.apply(ALLOW)
    with connection(lab, "x/client", "x/server") as ends, Stream(*ends) as stream:
        with _without_enforcers(lab):
            lab.apply(policy("allow", "server", ingress=[{"from": [app("client"), app("near")]}]))
        stream.wait_for_rounds(5)
        assert outcome(lab, "x/near", "x/server", HTTP.number) is Outcome.CONNECTED
        lab.apply(ALLOW)
        stream.wait_for_rounds(5)


@pytest.mark.parametrize("ending", ENDINGS)
def test_endpoints_are_adopted_and_no_rule_is_doubled(lab: Lab, ending: signal.Signals) -> None:
    def all_rules() -> dict[str, str]:
        return {name: rules_of(lab, name) for name in (*PODS, "node:a", "node:b")}

    def endpoints() -> set[tuple[str, ...]]:
        found = [e for name in "ab" for e in lab.node(name).endpoints()]
        return {tuple(str(e[key]) for key in ("pod", "container_id", "ifname", "ips", "state")) for e in found}

    rules, recovered, guards = all_rules(), endpoints(), [_guard(lab, name) for name in "ab"]
    assert {(name, state) for name, *_, state in recovered} == {(n.split("/")[1], "enforced") for n in PODS}
    assert {sandbox.container_id for sandbox in lab.pods.values()} == {identifier for _, identifier, *_ in recovered}
    with _without_enforcers(lab, ending):
        assert all_rules() == rules  # enforcement stays in place, and so does the guard
        assert [_guard(lab, name) for name in "ab"] == guards
    assert all_rules() == rules
    assert [_guard(lab, name) for name in "ab"] == guards
    assert endpoints() == recovered
    for name in "ab":
        tables = lab.run(f"node:{name}", "nft", "list", "tables").splitlines()
        assert sorted(table for table in tables if "trireme" in table) == [
            "table bridge trireme_guard",
            "table inet trireme_guard",
            "table netdev trireme_guard",
        ]
    for name in PODS:
        lab.check_pod(name)


def _guard(lab: Lab, node: str) -> str:
    """Return the guard's table with its lines sorted, and without times: elements of a map come in any order."""
    listing = re.sub(r" timeout [0-9msh]+", "", lab.run(f"node:{node}", "nft", "-s", "list", "table", *_GUARD_TABLE))
    return "\n".join(sorted(word.strip() for line in listing.splitlines() for word in line.split(",")))


def test_a_deletion_is_queued_and_carried_out(lab: Lab) -> None:
    lab.add_pod(pod("guest", "b"))
    queue = lab.node("b").directories.run / "deletions"
    with _without_enforcers(lab, nodes="b"):
        lab.remove_pod("x/guest")
        assert len(list(queue.iterdir())) == 1
    assert list(queue.iterdir()) == []
    assert [e["pod"] for e in lab.node("b").endpoints()] == ["server"]
    ready = [r for r in lab.node("b").log_records() if r.get("event") == "ready"]
    assert ready[-1]["queued_deletions"] == 1
    assert _records(lab, "b") == 1


def test_a_pod_whose_deletion_waits_is_not_adopted(lab: Lab) -> None:
    lab.add_pod(pod("guest", "b"))
    attachment = messages.Attachment(lab.pods[PodRef("x", "guest")].container_id, "eth0")
    with _without_enforcers(lab, nodes="b"):
        lab.run("x/guest", "ip", "link", "delete", "eth0")  # as the primary plugin's DEL leaves it
        enqueue(str(lab.node("b").directories.run), attachment)
        starts = len(_events(lab, "starting"))
    assert len(_events(lab, "starting")) == starts + 1
    assert _events(lab, "endpoint not recovered") == []
    assert [e["pod"] for e in lab.node("b").endpoints()] == ["server"]
    assert _records(lab, "b") == 1
    lab.remove_pod("x/guest")


def test_a_record_that_cannot_be_read_is_shown_until_its_pod_is_deleted(lab: Lab) -> None:
    lab.add_pod(pod("guest", "b"))
    node = lab.node("b")
    record = node.directories.run / "endpoints" / f"{lab.pods[PodRef('x', 'guest')].container_id}@eth0.json"
    node.daemon.stop(signal.SIGKILL)
    record.write_bytes(b"{")
    node.start()
    deadline = time.monotonic() + 20
    while record.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    status = _patient_status(lab, record.name)
    assert status["ready"] is False
    assert record.name in str(status["detail"])
    lab.remove_pod("x/guest")
    node.wait_ready()
    assert _records(lab, "b") == 1


def _patient_status(lab: Lab, detail: str) -> Mapping[str, object]:
    """Ask an enforcer that has just started until it says something."""
    deadline = time.monotonic() + 20
    while True:
        try:
            status = lab.node("b").status()
        except AdminError:
            status = {}
        if detail in str(status.get("detail")) or time.monotonic() > deadline:
            return status
        time.sleep(0.05)


def _events(lab: Lab, event: str) -> list[Mapping[str, object]]:
    return [record for record in lab.node("b").log_records() if record.get("event") == event]


def _records(lab: Lab, node: str) -> int:
    """Count what outlives an enforcer: one record an attachment."""
    return len(list((lab.node(node).directories.run / "endpoints").iterdir()))


def test_a_namespace_that_vanished_meanwhile_is_forgotten(lab: Lab) -> None:
    place = lab.add_pod(pod("guest", "b"))
    with _without_enforcers(lab, nodes="b"):
        assert _records(lab, "b") == 2
        delete_all([place.netns])
    assert [e["pod"] for e in lab.node("b").endpoints()] == ["server"]
    assert _records(lab, "b") == 1
    assert str(place.address()) not in _guard(lab, "b")
    lab.remove_pod("x/guest")  # the runtime's DEL comes late, and finds nothing to do


def test_a_namespace_that_vanishes_under_a_running_enforcer_is_forgotten(lab: Lab) -> None:
    place = lab.add_pod(pod("guest", "b"))
    delete_all([place.netns])
    deadline = time.monotonic() + 20
    while str(place.address()) in _guard(lab, "b") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert str(place.address()) not in _guard(lab, "b")
    assert [e["pod"] for e in lab.node("b").endpoints()] == ["server"]
    lab.remove_pod("x/guest")


def test_a_pod_can_be_added_again_under_the_same_name_after_a_restart(lab: Lab) -> None:
    lab.add_pod(pod("guest", "b", app="client"))
    with _without_enforcers(lab, nodes="b"):
        pass
    lab.remove_pod("x/guest")
    lab.add_pod(pod("guest", "b", app="client"))
    try:
        assert lab.pods[PodRef("x", "guest")].container_id in {e["container_id"] for e in lab.node("b").endpoints()}
        assert outcome(lab, "x/guest", "x/server", HTTP.number) is Outcome.CONNECTED
    finally:
        lab.remove_pod("x/guest")


def test_pods_of_a_namespace_that_was_excluded_meanwhile_are_set_free(lab: Lab) -> None:
    lab.add_pod(pod("guest", "b", namespace="quiet"))
    try:
        with _excluded(lab, "quiet"):
            assert [e["pod"] for e in lab.node("b").endpoints()] == ["server"]
            assert "TRIREME" not in rules_of(lab, "quiet/guest").upper()
            assert outcome(lab, "x/client", "quiet/guest", HTTP.number) is Outcome.CONNECTED
            assert outcome(lab, "x/client", "x/server", HTTP.number) is Outcome.CONNECTED
        assert sorted(str(e["pod"]) for e in lab.node("b").endpoints()) == ["guest", "server"]
        assert outcome(lab, "x/client", "quiet/guest", HTTP.number) is Outcome.CONNECTED
    finally:
        lab.remove_pod("quiet/guest")


def test_rules_of_another_backend_are_replaced(lab: Lab) -> None:
    node = lab.node("b")
    chosen = str(node.status()["rules_backend"])
    other = "iptables-nft" if chosen == "iptables-legacy" else "iptables-legacy"
    names = node.directories.run / "backends"
    assert names.read_text() == f"{chosen}\n"
    netns = os.open(NETNS_DIR / lab.place("x/server").netns, os.O_RDONLY)
    try:
        with _without_enforcers(lab, nodes="b"):
            make_backend(chosen).remove(netns)
            limits = QueueLimits(per_source=4_000, total=8_000)
            rules = EndpointRules(("eth0",), QUEUE_NUMBER, frozenset(), limits)
            make_backend(other).apply(netns, rules)
            names.write_text(f"{other}\n")
        assert not make_backend(other).is_intact(netns, rules)
    finally:
        os.close(netns)
    assert names.read_text() == f"{chosen}\n"
    for version in (4, 6):
        assert outcome(lab, "x/client", "x/server", HTTP.number, version) is Outcome.CONNECTED


@contextmanager
def _excluded(lab: Lab, namespace: str) -> Iterator[None]:
    """Let node b exclude a namespace during the block; an enforcer's settings are those of its start."""
    file = lab.node("b").directories.settings
    before = yaml.safe_load(file.read_text())
    registration = {**before["registration"], "excludedNamespaces": [namespace]}
    lab.node("b").write_settings({**before, "registration": registration})
    try:
        lab.node("b").restart()
        yield
    finally:
        lab.node("b").write_settings(before)
        lab.node("b").restart()


def test_rules_that_somebody_removed_come_back_within_seconds(lab: Lab) -> None:
    everything = {name: rules_of(lab, name) for name in PODS}, [_guard(lab, name) for name in "ab"]
    for place in ("node:b", "x/server"):
        lab.run(place, "nft", "flush", "ruleset")
    lab.run("x/server", "iptables-legacy", "-t", "mangle", "-F")
    assert _guarded_rules(lab) != everything
    deadline = time.monotonic() + 20
    while _guarded_rules(lab) != everything and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _guarded_rules(lab) == everything
    metrics = str(lab.node("b").admin("metrics"))
    assert 'trireme_repaired_rules_total{place="node"} 1.0' in metrics
    assert 'trireme_repaired_rules_total{place="pod"} 1.0' in metrics


def _guarded_rules(lab: Lab) -> tuple[dict[str, str], list[str]]:
    """Return all rules; nothing if there are none."""
    try:
        guards = [_guard(lab, name) for name in "ab"]
    except LabError:
        guards = []
    return {name: rules_of(lab, name) for name in PODS}, guards
