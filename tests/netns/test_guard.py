# SPDX-License-Identifier: Apache-2.0
"""The guard against masqueraded flows: who comes under the node's address is evaluated by his own."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from typing import TypeVar

import pytest

from enforcer_daemon.dataplane.addresses import node_addresses
from enforcer_daemon.dataplane.conntrack import Conntrack
from enforcer_daemon.dataplane.guard import Guard
from enforcer_daemon.dataplane.guard_rules import ALLOWS_ALL, GuardedEndpoint
from enforcer_daemon.dataplane.inject import Injector
from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.dataplane.tools import run_in
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.model import AttachmentId, Protocol
from enforcer_daemon.packet.udp import build_udp
from enforcer_daemon.policy.address_rules import AddressRule
from enforcer_daemon.policy.objects import IPBlock
from enforcer_daemon.policy.tables import AddressSet
from enforcer_daemon.verdict import DROP
from tests.netns.lab import (
    BACKENDS,
    DENIED_S,
    NODE,
    NODE_OUTSIDE,
    PATIENCE_S,
    POD,
    REMOTE,
    SYN,
    Lab,
    Recorder,
    open_lab,
    serve,
    tcp_packet,
    wait_until,
)

pytestmark = [pytest.mark.kernel, pytest.mark.stock_kernel]

T = TypeVar("T")
ATTACHMENT = AttachmentId("c1", "eth0")
REMOTE_NETWORK = {4: ip_network("10.88.0.0/24"), 6: ip_network("fd88::/64")}
NODE_PORT = 30080


@pytest.fixture(params=(4, 6), ids=("ipv4", "ipv6"))
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A node with a node port that leads to the pod, masqueraded as kube-proxy does it."""
    with open_lab() as lab:
        BACKENDS["iptables-nft"]().apply(lab.pod, lab.rules())
        for version in (4, 6):
            tool = "iptables" if version == 4 else "ip6tables"
            target = f"{POD[4]}:8080" if version == 4 else f"[{POD[6]}]:8080"
            for protocol in ("tcp", "udp"):
                for chain, option in (("PREROUTING", "-d"), ("OUTPUT", "-d")):
                    rule = f"-t nat -A {chain} {option} {NODE_OUTSIDE[version]} -p {protocol} --dport {NODE_PORT}"
                    run_in(lab.node, (tool, *rule.split(), "-j", "DNAT", "--to", target))
            run_in(lab.node, (tool, *f"-t nat -A POSTROUTING -d {POD[version]} -j MASQUERADE".split()))
        yield lab


def act(lab: Lab, change: Callable[[], T]) -> T:
    """Do what the daemon does in its own namespace, the host's."""
    return open_in(lab.node, change)


def addresses(*networks: str) -> AddressSet:
    return AddressSet.of_blocks(4, [IPBlock(ip_network(network)) for network in networks])


def guarded(*rules: AddressRule) -> GuardedEndpoint:
    return GuardedEndpoint(ATTACHMENT, (ip_address(POD[4]), ip_address(POD[6])), rules)


def test_without_the_guard_a_masqueraded_client_passes_for_the_node(lab: Lab, version: int) -> None:
    with lab.listen(lab.pod, version):
        assert lab.connects(lab.remote, (NODE_OUTSIDE[version], NODE_PORT))


def test_a_masqueraded_client_needs_an_address_rule(lab: Lab, version: int) -> None:
    guard = Guard()
    act(lab, lambda: guard.replace([guarded()]))
    via_node_port = (NODE_OUTSIDE[version], NODE_PORT)
    with lab.listen(lab.pod, version):
        assert not lab.connects(lab.remote, via_node_port, DENIED_S)
        act(lab, lambda: guard.apply(guarded(AddressRule(REMOTE_NETWORK[version], (), Protocol.TCP, (8000, 8080)))))
        assert lab.connects(lab.remote, via_node_port)


def test_a_client_that_the_pod_reset_is_judged_again_on_the_same_ports(lab: Lab, version: int) -> None:
    """To conntrack, whose entry lives on for ten seconds, his next SYN is none of a new connection."""
    guard = Guard()
    act(lab, lambda: guard.replace([guarded(AddressRule(REMOTE_NETWORK[version]))]))
    with lab.listen(lab.pod, version) as listener:
        with _reusing_client(lab, version) as client:
            client.connect((NODE_OUTSIDE[version], NODE_PORT))
            server, _ = listener.accept()
            server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            server.close()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        act(lab, lambda: guard.apply(guarded()))
        with _reusing_client(lab, version) as client:
            client.settimeout(1.5)
            with pytest.raises(TimeoutError):
                client.connect((NODE_OUTSIDE[version], NODE_PORT))


def _reusing_client(lab: Lab, version: int) -> socket.socket:
    client = lab.open_socket(lab.remote, version)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.bind((REMOTE[version], 7_100))
    return client


@pytest.mark.parametrize(
    ("rule", "is_allowed"),
    [
        (AddressRule(), True),
        (AddressRule(protocol=Protocol.TCP), True),
        (AddressRule(protocol=Protocol.UDP), False),
        (AddressRule(ports=(8080, 8080), protocol=Protocol.TCP), True),
        (AddressRule(ports=(8081, 9000), protocol=Protocol.TCP), False),
        (AddressRule(ports=(NODE_PORT, NODE_PORT), protocol=Protocol.TCP), False),
        (AddressRule(ip_network("10.0.0.0/8")), True),
        (AddressRule(ip_network("10.77.0.0/24")), False),  # the node's address is not the client's
        (AddressRule(ip_network("10.0.0.0/8"), (ip_network("10.88.0.0/16"), ip_network("10.88.0.0/24"))), False),
        (AddressRule(ip_network("10.0.0.0/8"), (ip_network("10.99.0.0/16"),)), True),
        (AddressRule(ip_network("fd88::/16")), False),
        (AddressRule.of(None, Protocol.TCP, ((80, 80), (8080, 8085))), True),
        (AddressRule.of(None, Protocol.TCP, ((80, 8079), (8081, 9000))), False),
        (AddressRule.of(addresses("10.88.0.0/16", "192.0.2.0/24"), Protocol.TCP, ((80, 80), (8080, 8080))), True),
        (AddressRule.of(addresses("10.87.0.0/16", "192.0.2.0/24"), Protocol.TCP, ((80, 80), (8080, 8080))), False),
    ],
)
def test_address_rules(lab: Lab, rule: AddressRule, is_allowed: bool) -> None:
    act(lab, lambda: Guard().replace([guarded(rule)]))
    with lab.listen(lab.pod, 4):
        wait_s = PATIENCE_S if is_allowed else DENIED_S
        assert lab.connects(lab.remote, (NODE_OUTSIDE[4], NODE_PORT), wait_s) is is_allowed


def test_the_node_itself_passes_also_masqueraded(lab: Lab, version: int) -> None:
    act(lab, lambda: Guard().replace([guarded()]))
    with lab.listen(lab.pod, version):
        assert lab.connects(lab.node, (POD[version], 8080))
        assert lab.connects(lab.node, (NODE_OUTSIDE[version], NODE_PORT))


def test_masqueraded_datagrams_are_judged_too(lab: Lab, version: int) -> None:
    guard = Guard()
    act(lab, lambda: guard.replace([guarded()]))
    with (
        lab.open_socket(lab.pod, version, socket.SOCK_DGRAM) as service,
        lab.open_socket(lab.remote, version, socket.SOCK_DGRAM) as client,
    ):
        service.bind((POD[version], 8080))
        client.sendto(b"denied", (NODE_OUTSIDE[version], NODE_PORT))
        client.sendto(bytes(600), (NODE_OUTSIDE[version], NODE_PORT))  # only a SYN can carry a frame here
        act(lab, lambda: guard.apply(guarded(AddressRule(REMOTE_NETWORK[version]))))
        client.sendto(b"allowed", (NODE_OUTSIDE[version], NODE_PORT))
        assert service.recv(1024) == b"allowed"


def test_a_framed_syn_reaches_the_queue_and_its_true_source_can_be_found(lab: Lab, version: int) -> None:
    act(lab, lambda: Guard().replace([guarded()]))
    evaluate = Recorder(lambda *_: DROP)
    injector = Injector(lab.remote)
    with serve(lab, evaluate), open_in(lab.node, Conntrack) as conntrack:
        syn = tcp_packet((REMOTE[version], 7000), (NODE_OUTSIDE[version], NODE_PORT), SYN, b"f" * 600)
        assert injector.send(syn)
        injector.close()
        assert wait_until(lambda: len(evaluate.seen) == 1)
        packet = evaluate.seen[0][0]
        offset = 20 if version == 4 else 40
        port = int.from_bytes(packet[offset : offset + 2], "big")
        node, pod = ip_address(NODE[version]), ip_address(POD[version])
        assert conntrack.original_source(6, node, port, pod, 8080) == ip_address(REMOTE[version])
        assert conntrack.original_source(6, node, port ^ 1, pod, 8080) is None


def test_nobody_passes_for_the_node_from_outside(lab: Lab, version: int) -> None:
    """Linux routes what states an address of its own as source, in IPv6."""
    guard, injector = Guard(), Injector(lab.remote)
    act(lab, lambda: guard.set_node_addresses(open_in(lab.node, node_addresses)))
    act(lab, lambda: guard.replace([GuardedEndpoint(ATTACHMENT, guarded().addresses, ALLOWS_ALL)]))
    evaluate = Recorder(lambda *_: DROP)
    try:
        with lab.open_socket(lab.pod, version, socket.SOCK_DGRAM) as service, serve(lab, evaluate):
            service.bind((POD[version], 8080))
            for source in (NODE, NODE_OUTSIDE):
                for length in (0, 600):
                    ends = (source[version], 4_000 + length), (POD[version], 8080)
                    assert injector.send(tcp_packet(*ends, SYN, bytes(length)))
                    assert injector.send(_datagram(*ends, bytes(length)))
            with lab.open_socket(lab.node, version, socket.SOCK_DGRAM) as node:
                node.sendto(b"the node", (POD[version], 8080))
            assert service.recv(1024) == b"the node"
    finally:
        injector.close()
    assert evaluate.seen == []
    assert act(lab, guard.drops)["spoofed-source"] == (8 if version == 6 else 0)


def test_an_address_that_the_node_got_later_is_nobody_elses_either(lab: Lab) -> None:
    guard, injector = Guard(), Injector(lab.remote)
    act(lab, lambda: guard.replace([guarded()]))
    act(lab, lambda: guard.set_node_addresses([ip_address("fd99::1")]))
    try:
        assert injector.send(_datagram(("fd99::1", 4_000), (POD[6], 8080), b"forged"))
        assert wait_until(lambda: act(lab, guard.drops)["spoofed-source"] == 1)
        act(lab, lambda: guard.set_node_addresses([ip_address("fd99::2")]))
        for source in ("fd99::1", "fd99::2"):
            assert injector.send(_datagram((source, 4_000), (POD[6], 8080), b"forged"))
        assert wait_until(lambda: act(lab, guard.drops)["spoofed-source"] == 2)
    finally:
        injector.close()


def _datagram(source: tuple[str, int], target: tuple[str, int], payload: bytes) -> bytes:
    return build_udp(ip_address(source[0]).packed, ip_address(target[0]).packed, (source[1], target[1]), payload)


def test_an_endpoint_that_is_removed_is_no_longer_guarded(lab: Lab) -> None:
    guard = Guard()
    act(lab, lambda: guard.replace([guarded()]))
    act(lab, lambda: guard.remove(ATTACHMENT))
    act(lab, lambda: guard.remove(ATTACHMENT))
    with lab.listen(lab.pod, 4):
        assert lab.connects(lab.remote, (NODE_OUTSIDE[4], NODE_PORT))


def test_an_address_goes_to_the_endpoint_that_states_it_last(lab: Lab) -> None:
    guard = Guard()
    newer = GuardedEndpoint(AttachmentId("c2", "eth0"), (ip_address(POD[4]),), (AddressRule(),))
    act(lab, lambda: guard.replace([guarded()]))
    act(lab, lambda: guard.apply(newer))
    with lab.listen(lab.pod, 4):
        assert lab.connects(lab.remote, (NODE_OUTSIDE[4], NODE_PORT))
        act(lab, lambda: guard.remove(ATTACHMENT))
        assert lab.connects(lab.remote, (NODE_OUTSIDE[4], NODE_PORT))


def test_a_new_daemon_replaces_what_the_old_one_left(lab: Lab) -> None:
    act(lab, lambda: Guard().replace([guarded()]))
    guard = Guard()
    act(lab, lambda: guard.replace([guarded(AddressRule(protocol=Protocol.TCP))]))
    listing = run_in(lab.node, ("nft", "list", "table", "inet", "trireme_guard"))
    assert listing.count("chain endpoint_") == 1
    act(lab, guard.remove_tables)
    with pytest.raises(DataplaneError, match="No such file"):
        run_in(lab.node, ("nft", "list", "table", "inet", "trireme_guard"))
