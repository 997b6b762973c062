# SPDX-License-Identifier: Apache-2.0
"""What a pod puts on top of its interface, or puts the interface into, is reached by nobody past its policy."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.e2e.operation_world import FAMILIES, HTTP, NODES, app, endpoint, outcome, pod, policy
from trireme_lab import HostSpec, Lab, LabSpec, Outcome, Tools
from trireme_lab.errors import LabError
from trireme_lab.netns import exec_prefix, open_socket, run

pytestmark = [pytest.mark.kernel, pytest.mark.stock_kernel]

OUTSIDE = HostSpec("outside", (ip_address("203.0.113.7"), ip_address("2001:db8::7")))
NEIGHBOR = HostSpec("neighbor", node="a")
SOURCES = ("x/client", "host:neighbor", "host:outside")
VERSIONS = [4, 6]
PORT = 5_005
PATIENCE_S = 10.0
FORMS = {
    "bridge": "eth0 is a port of bridge br0",
    "macvlan": "macvlan mac0 was on top of an interface, and is in another namespace now",
    "ipvlan": "ipvlan ip0 was on top of an interface, and is in another namespace now",
    "moved": "eth0 was moved out of the pod's network namespace, or renamed",
}


@pytest.fixture
def lab(plugin: Path) -> Iterator[Lab]:
    spec = LabSpec(
        NODES, {"x": {}}, (pod("vm", "a"), pod("client", "a")), (OUTSIDE, NEIGHBOR),
        manifests=(policy("deny-all", "vm", ingress=[]),),
    )  # fmt: skip
    with Lab(spec, Tools(plugin=plugin)) as lab:
        yield lab


class Guest:
    """A namespace behind the pod's interface that has the pod's addresses, as a virtual machine does."""

    def __init__(self, lab: Lab, form: str) -> None:
        place = lab.place("x/vm")
        self.pod, self.name = place.netns, f"tt-{secrets.token_hex(4)}"
        self._form = form
        self._addresses = [str(address) for address in place.addresses]
        self._gateways = {v: self._gateway(v) for v in VERSIONS}

    def _gateway(self, version: int) -> str:
        words = run([*exec_prefix(self.pod), "ip", f"-{version}", "route", "show", "default"]).split()
        return words[words.index("via") + 1]

    def take(self) -> None:
        """Take the pod's interface."""
        self._in_pod("sysctl -qw net.ipv6.conf.eth0.accept_dad=0")
        mac = self._mac()
        run(["ip", "netns", "add", self.name])
        self._in_guest("ip link set lo up")
        match self._form:
            case "bridge":
                self._in_pod("ip link add br0 type bridge forward_delay 0")
                self._in_pod(f"ip link add tap0 type veth peer name inner netns {self.name}")
                self._in_pod("ip addr flush dev eth0")
                self._in_pod("ip link set eth0 down")
                self._in_pod("ip link set eth0 address 02:00:00:00:00:01")
                for name in ("eth0", "tap0"):
                    self._in_pod(f"ip link set {name} master br0 up")
                self._in_pod("ip link set br0 up")
                self._in_guest(f"ip link set inner name eth0 address {mac}")
            case "macvlan" | "ipvlan":
                kind, name = (self._form, "mac0") if self._form == "macvlan" else (self._form, "ip0")
                mode = "mode passthru" if kind == "macvlan" else "mode l2"
                self._in_pod(f"ip link add {name} link eth0 type {kind} {mode}")
                self._in_pod("ip addr flush dev eth0")
                self._in_pod(f"ip link set {name} netns {self.name}")
                self._in_guest(f"ip link set {name} name eth0")
            case "moved":
                self._in_pod(f"ip link set eth0 netns {self.name}")
        self._in_guest("sysctl -qw net.ipv6.conf.eth0.accept_dad=0")
        self._in_guest("ip link set eth0 up")
        for text in self._addresses:
            self._in_guest(f"ip addr add {text}/{24 if ':' not in text else 64} dev eth0 nodad")
        for version, gateway in self._gateways.items():
            self._in_guest(f"ip -{version} route replace default via {gateway} dev eth0 onlink")

    def close(self) -> None:
        """Take the namespace away."""
        run(["ip", "netns", "del", self.name])

    def _mac(self) -> str:
        return run([*exec_prefix(self.pod), "cat", "/sys/class/net/eth0/address"]).strip()

    def _in_pod(self, words: str) -> None:
        run([*exec_prefix(self.pod), *words.split()])

    def _in_guest(self, words: str) -> None:
        run([*exec_prefix(self.name), *words.split()])


@contextmanager
def guest(lab: Lab, form: str) -> Iterator[Guest]:
    taken = Guest(lab, form)
    try:
        yield taken
    finally:
        taken.close()


def reached(lab: Lab, netns: str, sources: Sequence[str], version: int) -> set[str]:
    """Send a datagram to the pod's address from each source, several times; return those that arrive in `netns`."""
    found: set[str] = set()
    marks = {source: secrets.token_bytes(8) for source in sources}
    target = str(lab.address_of("x/vm", version))
    with open_socket(netns, FAMILIES[version], socket.SOCK_DGRAM) as receiver:
        receiver.bind(("", PORT))
        receiver.settimeout(0.3)
        for _ in range(4):
            for source, mark in marks.items():
                with lab.open_socket(source, FAMILIES[version], socket.SOCK_DGRAM) as sender:
                    sender.sendto(mark, (target, PORT))
            try:
                while True:
                    heard = receiver.recv(100)
                    found |= {source for source, mark in marks.items() if mark in heard}
            except TimeoutError:
                continue
    return found


def wait_for(lab: Lab, state: str, problem: str = "") -> None:
    """Wait until the pod's endpoint has a state, for this reason."""
    deadline = time.monotonic() + PATIENCE_S
    while ((found := endpoint(lab, "x/vm"))["state"], found["problem"]) != (state, problem):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    if found == "ipvlan" and not _has_ipvlan():
        pytest.skip("this kernel has no ipvlan (CONFIG_IPVLAN)")
    return found


def _has_ipvlan() -> bool:
    name = f"tt-{secrets.token_hex(4)}"
    run(["ip", "netns", "add", name])
    try:
        run([*exec_prefix(name), "ip", "link", "add", "below", "type", "dummy"])
        run([*exec_prefix(name), "ip", "link", "add", "link", "below", "type", "ipvlan"])
    except LabError:
        return False
    finally:
        run(["ip", "netns", "del", name])
    return True


def test_nobody_reaches_what_is_behind_a_taken_interface(lab: Lab, form: str) -> None:
    with guest(lab, form) as taken:
        taken.take()
        wait_for(lab, "closed", FORMS[form])
        for version in VERSIONS:
            assert reached(lab, taken.name, SOURCES, version) == set()
        assert lab.pod_node("x/vm").status()["closed_endpoints"] == {"x/vm": FORMS[form]}


def test_without_an_enforcer_the_same_is_reached(plugin: Path, form: str) -> None:
    """Else the test above shows nothing."""
    spec = LabSpec(NODES, {"x": {}}, (pod("vm", "a"), pod("client", "a")), (OUTSIDE, NEIGHBOR), enforcer=False)
    with Lab(spec, Tools(plugin=plugin)) as plain, guest(plain, form) as taken:
        taken.take()
        for version in VERSIONS:
            assert reached(plain, taken.name, SOURCES, version) == set(SOURCES)


def test_an_endpoint_opens_again_when_the_cause_is_gone(lab: Lab) -> None:
    assert lab.apply(policy("deny-all", "vm", ingress=[{"from": [app("client")]}]))
    netns = lab.place("x/vm").netns
    run([*exec_prefix(netns), "ip", "link", "add", "mac0", "link", "eth0", "type", "macvlan"])
    wait_for(lab, "closed", "macvlan mac0 is on top of eth0")
    assert outcome(lab, "x/client", "x/vm", HTTP.number, timeout_s=2.0) is Outcome.TIMED_OUT
    run([*exec_prefix(netns), "ip", "link", "del", "mac0"])
    wait_for(lab, "enforced")
    deadline = time.monotonic() + PATIENCE_S  # Neighbors that were not found are looked for again.
    while outcome(lab, "x/client", "x/vm", HTTP.number) is not Outcome.CONNECTED:
        assert time.monotonic() < deadline
