# SPDX-License-Identifier: Apache-2.0
"""The guard on interfaces, without a daemon: which end is whose, and interfaces that come, go and change hands."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from shutil import which
from typing import TypeVar

import pytest

from enforcer_daemon.dataplane.addresses import interface
from enforcer_daemon.dataplane.droplog import DropLog
from enforcer_daemon.dataplane.guard import Guard
from enforcer_daemon.dataplane.guard_links import find_links, passed_by_tc
from enforcer_daemon.dataplane.guard_rules import ALLOWS_ALL, GuardedEndpoint, Links
from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.dataplane.tools import run_in
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import AttachmentId, Protocol
from enforcer_daemon.policy.address_rules import AddressRule
from tests.netns.lab import ACK, DENIED_S, NODE, PATIENCE_S, POD, REMOTE, SYN, Lab, ip, open_lab, tcp_packet

pytestmark = [pytest.mark.kernel, pytest.mark.stock_kernel]

T = TypeVar("T")
IP_TRANSPARENT = 19  # linux/in.h
SPOOFED = "10.77.0.99"
ETHERTYPES = {4: 0x0800, 6: 0x86DD}
_SYNS_PER_S = 50
"""So few that a flood of any machine exceeds it."""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with open_lab() as lab:
        yield lab


def act(lab: Lab, change: Callable[[], T]) -> T:
    """Do what the daemon does in its own namespace, the host's."""
    return open_in(lab.node, change)


def guarded(lab: Lab, container: str = "c1") -> GuardedEndpoint:
    links = act(lab, lambda: find_links(lab.pod, {"eth0": ("pod0",)}))
    addresses = ip_address(POD[4]), ip_address(POD[6])
    return GuardedEndpoint(AttachmentId(container, "eth0"), addresses, ALLOWS_ALL, ALLOWS_ALL, links)


def gets_through(lab: Lab, source: str, within_s: float = PATIENCE_S) -> bool:
    """Send a datagram from the pod under an address; return whether the remote host hears it in that time."""
    with (
        lab.open_socket(lab.remote, 4, socket.SOCK_DGRAM) as remote,
        lab.open_socket(lab.pod, 4, socket.SOCK_DGRAM) as pod,
    ):
        remote.bind((REMOTE[4], 5000))
        remote.settimeout(within_s)
        pod.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
        pod.bind((source, 0))
        pod.sendto(b"hello", (REMOTE[4], 5000))
        try:
            return remote.recv(8) == b"hello"
        except TimeoutError:
            return False


def test_the_other_end_is_found_and_guarded(lab: Lab) -> None:
    endpoint = guarded(lab)
    assert endpoint.links.names == ("pod0",)
    assert endpoint.links.problem == ""
    assert all(address.is_link_local for address in endpoint.links.link_locals)
    guard = Guard()
    act(lab, lambda: guard.replace([]))
    assert gets_through(lab, SPOOFED)
    act(lab, lambda: guard.apply(endpoint))
    assert not gets_through(lab, SPOOFED, DENIED_S)
    assert gets_through(lab, POD[4])
    assert act(lab, guard.drops)["spoofed-source"] == 1
    offenders = run_in(lab.node, ("nft", "list", "set", "netdev", "trireme_guard", "offenders"))
    assert '"pod0" counter packets 1' in offenders
    act(lab, lambda: guard.remove(endpoint.attachment))
    assert gets_through(lab, SPOOFED)


def test_a_flood_of_syns_ends_at_the_pods_interface(lab: Lab) -> None:
    """By packet socket, past the rules inside the pod. The interface has one rate for both families; data has none."""
    guard, endpoint = Guard(syns_per_s=_SYNS_PER_S), guarded(lab)
    act(lab, lambda: guard.replace([endpoint]))

    def dropped(version: int, flags: int, count: int) -> int:
        before = act(lab, guard.drops)["packet-rate"]
        packet = tcp_packet((POD[version], 8080), (REMOTE[version], 6000), flags)
        target = ("eth0", ETHERTYPES[version], 0, 0, interface(lab.node, "pod0").mac)
        with open_in(lab.pod, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)) as sock:
            for _ in range(count):
                sock.sendto(packet, target)
        return act(lab, guard.drops)["packet-rate"] - before

    began = time.monotonic()
    first = dropped(4, SYN, _SYNS_PER_S) + dropped(6, SYN | ACK, 10 * _SYNS_PER_S)
    passed = 11 * _SYNS_PER_S - first
    assert _SYNS_PER_S <= passed <= _SYNS_PER_S * (2 + time.monotonic() - began)
    assert dropped(4, ACK, 10 * _SYNS_PER_S) == 0
    time.sleep(1.5)  # A second's worth is there again.
    assert dropped(6, SYN, _SYNS_PER_S) == 0
    act(lab, lambda: guard.remove(endpoint.attachment))
    assert dropped(4, SYN, 10 * _SYNS_PER_S) == 0


@pytest.mark.parametrize("version", [4, 6])
def test_the_daemon_hears_of_a_syn_that_policy_forbids(lab: Lab, version: int) -> None:
    guard, endpoint = Guard(), replace(guarded(lab), egress=())
    act(lab, lambda: guard.replace([endpoint]))
    packet = tcp_packet((POD[version], 4_444), (REMOTE[version], 6_000), SYN)
    target = ("eth0", ETHERTYPES[version], 0, 0, interface(lab.node, "pod0").mac)
    with act(lab, DropLog) as log:
        with open_in(lab.pod, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)) as sock:
            sock.sendto(packet, target)
        deadline = time.monotonic() + PATIENCE_S
        while not (told := log.read(8)):
            assert time.monotonic() < deadline, "nothing is told"
            time.sleep(0.01)
    assert [(notice.prefix, notice.packet) for notice in told] == [("egress-denied", packet)]


def test_the_nodes_own_connections_have_no_rate(lab: Lab) -> None:
    """Nor have they inside the pod: what a pod answers its node leaves all of the rate to its own connections."""
    guard = Guard(syns_per_s=_SYNS_PER_S)
    node = {version: ip_address(address) for version, address in NODE.items()}

    def dropped(version: int, target: str, flags: int, count: int = 5 * _SYNS_PER_S) -> int:
        before = act(lab, guard.drops)["packet-rate"]
        packet = tcp_packet((POD[version], 8080), (target, 6000), flags)
        link = ("eth0", ETHERTYPES[version], 0, 0, interface(lab.node, "pod0").mac)
        with open_in(lab.pod, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)) as sock:
            for _ in range(count):
                sock.sendto(packet, link)
        return act(lab, guard.drops)["packet-rate"] - before

    act(lab, lambda: guard.set_node_addresses(node.values()))
    act(lab, lambda: guard.replace([guarded(lab)]))
    assert [dropped(version, NODE[version], SYN | ACK) for version in (4, 6)] == [0, 0]
    assert dropped(4, REMOTE[4], SYN, _SYNS_PER_S) == 0
    assert dropped(4, NODE[4], SYN) > 0
    act(lab, lambda: guard.set_node_addresses([node[4]]))
    assert dropped(4, NODE[4], SYN | ACK) == 0
    assert dropped(6, NODE[6], SYN | ACK) > 0


def test_without_names_the_kernel_is_asked(lab: Lab) -> None:
    assert act(lab, lambda: find_links(lab.pod, {"eth0": ()})).names == ("pod0",)


@pytest.mark.parametrize(("ifname", "named"), [("eth0", ("out0",)), ("eth0", ("nosuch",)), ("eth1", ("pod0",))])
def test_an_interface_that_is_not_the_pods_is_never_taken(lab: Lab, ifname: str, named: tuple[str, ...]) -> None:
    links = act(lab, lambda: find_links(lab.pod, {ifname: named}))
    assert links.names == ()
    assert links.problem == f"{ifname} has no end of its own on the node: raw packets from it are not checked"


def test_a_macvlan_has_no_end_on_the_node(lab: Lab) -> None:
    ip(lab.node, "link add mv0 link out0 type macvlan mode bridge")
    ip(lab.node, f"link set mv0 netns /proc/{os.getpid()}/fd/{lab.pod}")
    assert act(lab, lambda: find_links(lab.pod, {"mv0": ("out0",)})).names == ()


def test_a_bridge_that_hides_packets_is_reported(lab: Lab) -> None:
    ip(lab.node, "link add br0 type bridge")
    ip(lab.node, "link set pod0 master br0")
    on = act(lab, lambda: find_links(lab.pod, {"eth0": ("pod0",)}))
    run_in(lab.node, ("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=0"))
    off = act(lab, lambda: find_links(lab.pod, {"eth0": ("pod0",)}))
    assert on.problem == ""
    assert off.problem.startswith("net.bridge.bridge-nf-call-iptables is not 1")


def test_what_stands_above_a_bridge_port_is_found(lab: Lab) -> None:
    """The node's IP stack shows these as the input interface of the pod's packets."""
    assert act(lab, lambda: find_links(lab.pod, {"eth0": ("pod0",)})).devices == ()
    for command in ("link add br0 type bridge", "link set pod0 master br0"):
        ip(lab.node, command)
    assert act(lab, lambda: find_links(lab.pod, {"eth0": ("pod0",)})).devices == ("br0",)
    ip(lab.node, "link add br0.7 link br0 type macvlan mode bridge")
    links = act(lab, lambda: find_links(lab.pod, {"eth0": ("pod0",)}))
    assert (links.devices, links.is_traced) == (("br0", "br0.7"), True)


def test_a_pod_behind_what_is_no_bridge_is_not_traced_and_says_so(lab: Lab) -> None:
    try:
        ip(lab.node, "link add team0 type bond")
    except DataplaneError:
        pytest.skip("this kernel has no master of another kind")
    ip(lab.node, "link set pod0 down")
    ip(lab.node, "link set pod0 master team0")
    links = act(lab, lambda: find_links(lab.pod, {"eth0": ("pod0",)}))
    assert (links.devices, links.is_traced) == ((), False)
    assert "pod0 is a port of what is no bridge" in links.problem


def test_who_cannot_be_traced_is_not_compared(lab: Lab) -> None:
    """Else everything that such a pod sends would be dropped."""
    guard, endpoint = Guard(), guarded(lab)
    ip(lab.node, "link add other0 type veth peer name other1")
    elsewhere = replace(endpoint, links=replace(endpoint.links, names=("other0",)))
    act(lab, lambda: guard.replace([replace(elsewhere, links=replace(elsewhere.links, is_traced=False))]))
    assert gets_through(lab, POD[4])
    act(lab, lambda: guard.apply(elsewhere))
    assert not gets_through(lab, POD[4], DENIED_S)
    act(lab, lambda: guard.apply(endpoint))
    assert gets_through(lab, POD[4])


@pytest.mark.parametrize("kind", ["ingress", "clsact"])
def test_tc_that_sees_packets_first_is_reported(lab: Lab, kind: str) -> None:
    assert act(lab, passed_by_tc) == frozenset()
    run_in(lab.node, ("tc", "qdisc", "add", "dev", "pod0", kind))
    assert act(lab, passed_by_tc) == {"pod0"}


def test_an_interface_that_vanished_stands_in_nobodys_way(lab: Lab) -> None:
    guard, endpoint = Guard(), guarded(lab)
    act(lab, lambda: guard.replace([endpoint]))
    ip(lab.node, "link del pod0")
    other = replace(
        endpoint, attachment=AttachmentId("c2", "eth0"), addresses=(ip_address("10.77.0.3"),), links=Links()
    )
    act(lab, lambda: guard.apply(other))
    act(lab, lambda: guard.apply(replace(endpoint, egress=())))
    act(lab, lambda: guard.remove(endpoint.attachment))
    listing = run_in(lab.node, ("nft", "list", "table", "netdev", "trireme_guard"))
    assert "link_" not in listing.replace("from_link_local", "")


def test_a_record_of_a_vanished_interface_does_not_keep_the_guard_from_starting(lab: Lab) -> None:
    guard = Guard()
    gone = GuardedEndpoint(AttachmentId("c2", "eth0"), (ip_address("10.77.0.3"),), (), (), Links(("gone0",)))
    act(lab, lambda: guard.replace([gone, guarded(lab)]))
    assert not gets_through(lab, SPOOFED, DENIED_S)
    act(lab, lambda: guard.remove(gone.attachment))


def test_an_interface_goes_to_the_endpoint_that_states_it_last(lab: Lab) -> None:
    """A name that comes again for a new pod, before the old pod's deletion."""
    guard, old, new = Guard(), guarded(lab), guarded(lab, "c2")
    old = replace(old, addresses=(ip_address(SPOOFED),))
    act(lab, lambda: guard.replace([old]))
    assert not gets_through(lab, POD[4], DENIED_S)
    act(lab, lambda: guard.apply(new))
    ip(lab.pod, "neigh flush all nud failed")  # its ARP was spoofed, too
    ip(lab.pod, "neigh flush all")
    assert gets_through(lab, POD[4])
    assert not gets_through(lab, SPOOFED, DENIED_S)
    act(lab, lambda: guard.remove(old.attachment))
    assert not gets_through(lab, SPOOFED, DENIED_S)


def test_what_the_kernel_refuses_changes_nothing(lab: Lab) -> None:
    guard, endpoint = Guard(), guarded(lab)
    act(lab, lambda: guard.replace([endpoint]))
    unfit = replace(endpoint, egress=(AddressRule(protocol=Protocol.TCP, ports=(80, 70)),))
    with pytest.raises(DataplaneError):
        act(lab, lambda: guard.apply(unfit))
    assert not gets_through(lab, SPOOFED, DENIED_S)
    assert gets_through(lab, POD[4])


@pytest.mark.parametrize("family", ["inet", "netdev"])
def test_tables_that_somebody_removed_are_made_anew_by_the_next_change(lab: Lab, family: str) -> None:
    guard, endpoint = Guard(), guarded(lab)
    act(lab, lambda: guard.replace([endpoint]))
    run_in(lab.node, ("nft", "delete", "table", family, "trireme_guard"))
    other = GuardedEndpoint(AttachmentId("c2", "eth0"), (ip_address("10.77.0.3"),), (), ())
    act(lab, lambda: guard.apply(other))
    assert not gets_through(lab, SPOOFED, DENIED_S)
    run_in(lab.node, ("nft", "delete", "table", family, "trireme_guard"))
    act(lab, lambda: guard.remove(other.attachment))
    assert not gets_through(lab, SPOOFED, DENIED_S)


def test_without_nft_the_guard_says_so(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    guard = Guard()
    guard.replace([])
    guard.apply(GuardedEndpoint(AttachmentId("c1", "eth0"), (ip_address(POD[4]),), ()))
    guard.remove(AttachmentId("c1", "eth0"))
    assert guard.problem == "nft is missing on the node: nothing is guarded there"
    assert guard.drops() == {}


@pytest.mark.parametrize("message", ["Operation not supported", "Cannot allocate memory"])
def test_only_a_kernel_without_such_chains_is_guarded_without_them(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, message: str
) -> None:
    old_kernel = tmp_path / "nft"
    old_kernel.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && {{ echo "{message}" >&2; exit 1; }}\nexec {which("nft")} "$@"\n'
    )
    old_kernel.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    guard, endpoint = Guard(), guarded(lab)
    if message != "Operation not supported":
        with pytest.raises(DataplaneError, match=message):
            act(lab, lambda: guard.replace([endpoint]))
        return
    act(lab, lambda: guard.replace([endpoint]))
    act(lab, lambda: guard.apply(replace(endpoint, egress=())))
    assert guard.problem.startswith("the kernel has no nft chains on interfaces")
    assert not gets_through(lab, POD[4], DENIED_S)  # The rest works.
    act(lab, lambda: guard.remove(endpoint.attachment))


def test_an_interface_knows_its_driver_and_its_other_end(lab: Lab) -> None:
    inner, outer = interface(lab.pod, "eth0"), interface(lab.node, "pod0")
    assert (inner.kind, inner.peer, outer.peer) == ("veth", outer.index, inner.index)
    assert interface(lab.pod, "lo").peer == 0
    assert ip_address(NODE[4]) in outer.addresses
