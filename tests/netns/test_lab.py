# SPDX-License-Identifier: Apache-2.0
"""A lab without enforcers: the network by itself, its traffic, and what is left of it afterwards (nothing)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from enforcer_daemon.model import PodRef, Protocol
from trireme_lab import (
    HostSpec,
    Lab,
    LabError,
    LabSpec,
    NodeSpec,
    Outcome,
    PodSpec,
    PortSpec,
    ServicePort,
    ServiceSpec,
)
from trireme_lab.netns import NETNS_DIR, netns_path
from trireme_lab.rundir import RUN_DIR, clean_leftovers

pytestmark = pytest.mark.kernel

HTTP = PortSpec(80)
DNS = PortSpec(53, Protocol.UDP)
ONE = PodSpec(
    PodRef("x", "one"),
    "a",
    addresses=(ip_address("10.244.1.50"), ip_address("fd00:10:244:1::50")),
    ports=(HTTP, DNS),
)
WORLD = LabSpec(
    nodes=(NodeSpec.numbered("a", 1), NodeSpec.numbered("b", 2)),
    pods=(
        ONE,
        PodSpec(PodRef("x", "two"), "a", ports=(HTTP, DNS)),
        PodSpec(PodRef("y", "three"), "b", ports=(HTTP, DNS)),
    ),
    hosts=(
        HostSpec("out", (ip_address("203.0.113.7"), ip_address("2001:db8::7")), (HTTP, DNS)),
        HostSpec("near", node="b", ports=(HTTP, DNS)),
    ),
    services=(
        ServiceSpec(
            "x",
            "web",
            (ip_address("10.96.0.10"), ip_address("fd00:10:96::a")),
            (PodRef("x", "one"), PodRef("y", "three")),
            (ServicePort(8080, 80, node_port=30080), ServicePort(53, 53, Protocol.UDP)),
        ),
    ),
    enforcer=False,
)
PLACES = ("x/one", "x/two", "y/three", "host:out", "host:near")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(WORLD) as lab:
        yield lab


def _traces(name: str) -> list[str]:
    """What is left of a lab: namespaces, directories, processes (by their command lines)."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it ended while we looked
    return [
        *(str(path) for path in NETNS_DIR.glob(f"{name}*")),
        *(str(path) for path in RUN_DIR.glob(f"*{name}*")),
        *(command for command in commands if name in command),
    ]


@pytest.mark.parametrize("version", [4, 6])
def test_everyone_reaches_everyone_by_tcp_and_udp(lab: Lab, version: int) -> None:
    probes = {}
    for source in (*PLACES, "node:a", "node:b"):
        for target in PLACES:
            probe = lab.request(source, target, 80, version)
            probes[source, target, "TCP"] = probe
            probes[source, target, "UDP"] = replace(probe, port=53, protocol=Protocol.UDP)
    results = dict(zip(probes, lab.probe_all(list(probes.values())), strict=True))
    assert {key: r.outcome for key, r in results.items() if r.outcome is not Outcome.CONNECTED} == {}
    assert {(key[1], r.banner) for key, r in results.items()} == {(target, target) for target in PLACES}


@pytest.mark.parametrize("version", [4, 6])
def test_a_service_leads_to_its_pods_also_from_one_of_them(lab: Lab, version: int) -> None:
    results = lab.probe_all([lab.request("x/one", "service:x/web", 8080, version)] * 30)
    assert {result.banner for result in results} == {"x/one", "y/three"}


@pytest.mark.parametrize("source", PLACES)
def test_a_node_port_leads_there_on_every_node(lab: Lab, source: str) -> None:
    results = lab.probe_all([lab.request(source, f"node:{n}", 30080, v) for n in "ab" for v in (4, 6)])
    assert [result.outcome for result in results] == [Outcome.CONNECTED] * 4


def test_fixed_addresses_are_given(lab: Lab) -> None:
    assert lab.place("x/one").addresses == ONE.addresses


def test_a_closed_port_refuses_and_an_address_without_route_is_no_verdict(lab: Lab) -> None:
    assert lab.probe("x/two", "x/one", 81).outcome is Outcome.REFUSED
    assert lab.probe("x/two", "192.0.2.99", 80).outcome is Outcome.UNREACHABLE


def test_a_dropped_syn_times_out(lab: Lab) -> None:
    lab.run("x/two", "iptables", "-I", "INPUT", "-p", "tcp", "--dport", "80", "-j", "DROP")
    try:
        probe = replace(lab.request("x/one", "x/two", 80), timeout_s=0.3)
        assert lab.probe_all([probe])[0].outcome is Outcome.TIMED_OUT
    finally:
        lab.run("x/two", "iptables", "-F", "INPUT")


def test_a_banner_that_never_comes_is_neither_allowed_nor_denied(lab: Lab) -> None:
    with lab.open_socket("x/two") as listener:
        listener.bind((str(lab.address_of("x/two")), 4444))
        listener.listen()
        probe = replace(lab.request("x/one", "x/two", 4444), timeout_s=0.2)
        outcome = lab.probe_all([probe])[0].outcome
    assert outcome is Outcome.SILENT
    assert not outcome.is_allowed
    assert not outcome.is_denied


def test_servers_echo_more_than_the_buffers_hold(lab: Lab) -> None:
    sent = os.urandom(3_000_000)
    received = bytearray()
    with lab.open_socket("y/three") as client:
        client.settimeout(10)
        client.connect((str(lab.address_of("x/one")), 80))
        with client.makefile("rb") as stream:
            assert stream.readline() == b"x/one\n"
            for start in range(0, len(sent), 100_000):
                client.sendall(sent[start : start + 100_000])
                received += stream.read(100_000)
    assert bytes(received) == sent


def test_a_capture_shows_the_packets_of_a_pod(lab: Lab) -> None:
    with lab.capture("x/one") as capture:
        lab.probe("y/three", "x/one", 80)
        packets = capture.close()
    syns = [p for p in packets if p[9] == socket.IPPROTO_TCP and p[33] == 0x02]
    assert [socket.inet_ntoa(syn[12:16]) for syn in syns] == [str(lab.address_of("y/three"))]


def test_a_pod_comes_and_goes(lab: Lab) -> None:
    place = lab.add_pod(PodSpec(PodRef("x", "guest"), "b", ports=(HTTP,)))
    assert lab.probe("x/one", "x/guest", 80).outcome is Outcome.CONNECTED
    lab.check_pod("x/guest")
    lab.remove_pod("x/guest")
    assert not netns_path(place.netns).exists()
    with pytest.raises(LabError, match="no place x/guest"):
        lab.probe("x/guest", "x/one", 80)


def test_a_failing_command_says_what_failed(lab: Lab) -> None:
    with pytest.raises(LabError, match=r"ls /no-such: exit status 2: .*No such file"):
        lab.run("x/one", "ls", "/no-such")


def test_nothing_is_left_after_a_lab() -> None:
    with Lab(WORLD) as lab:
        name = lab.name
        lab.spawn("x/one", "sleep", "300")
        assert len(_traces(name)) > 5
    assert _traces(name) == []


def test_nothing_is_left_after_a_start_that_failed() -> None:
    impossible = replace(ONE, pod=PodRef("x", "more"), addresses=(ip_address("10.9.9.9"),))
    lab = Lab(replace(WORLD, pods=(*WORLD.pods, impossible)))
    with pytest.raises(LabError, match=r"x/more on node a: CNI ADD: .*10\.9\.9\.9"), lab:
        pass
    assert _traces(lab.name) == []


SCENARIO = """
enforcer: false
nodes: [{name: a}]
pods:
  - {name: x/one, node: a, ports: [80]}
steps:
  - flows: [{from: x/one, to: x/one, port: 80, expect: allow}]
"""


@contextmanager
def _start_command(directory: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run the lab's command, and end it with the test: what a test only waits for, it could wait for for ever."""
    scenario = directory / "scenario.yaml"
    scenario.write_text(SCENARIO)
    argv = [sys.executable, "-m", "triremectl", "lab", "run", *options, str(scenario)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as command:
        try:
            yield command
        finally:
            command.terminate()
            try:
                command.wait(timeout=20)
            except subprocess.TimeoutExpired:
                command.kill()


def _lab_of(command: subprocess.Popen[str]) -> str:
    """Wait until a kept world waits for Ctrl-C; return the lab's name."""
    assert command.stdout is not None
    for line in command.stdout:
        if "--run-dir" in line:
            return next(path.name for path in RUN_DIR.glob(f"trireme-lab-tl{command.pid}-*")).removeprefix(
                "trireme-lab-"
            )
    pytest.fail("the lab did not start")


def test_a_run_ends_with_the_count_and_exit_status_0(tmp_path: Path) -> None:
    with _start_command(tmp_path) as command:
        output, _ = command.communicate(timeout=60)
    assert output.splitlines()[-1] == "1 of 1 flows as expected"
    assert command.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_after_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    with _start_command(tmp_path, "--keep") as command:
        name = _lab_of(command)
        time.sleep(0.1)  # printing done, waiting begun
        command.send_signal(number)
        command.communicate(timeout=20)
    assert _traces(name) == []


def test_clean_removes_what_a_killed_lab_left_and_nothing_of_a_living_one(tmp_path: Path, lab: Lab) -> None:
    with _start_command(tmp_path, "--keep") as command:
        name = _lab_of(command)
        assert name not in clean_leftovers()
        command.kill()
        command.communicate(timeout=20)
    assert _traces(name) != []
    assert name in clean_leftovers()
    assert _traces(name) == []
    assert lab.probe("x/one", "y/three", 80).outcome is Outcome.CONNECTED


ORPHAN = """
import time
from trireme_lab import Lab, NodeSpec, LabSpec
with Lab(LabSpec(nodes=(NodeSpec.numbered("a", 1),), enforcer=False)) as lab:
    print(lab.spawn("node:a", "sleep", "301").pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.1], ids=["at once", "later"])
def test_programs_die_with_a_lab_that_is_killed(delay_s: float) -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        pid = int(killed.stdout.readline())
        time.sleep(delay_s)
        killed.kill()
    deadline = time.monotonic() + 5
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        assert not _runs(pid)
    finally:
        clean_leftovers()


def _runs(pid: int) -> bool:
    """A process that has ended may wait long for an init that collects its status."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")
