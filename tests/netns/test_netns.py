# SPDX-License-Identifier: Apache-2.0
"""Namespaces, settings and addresses, on the kernel."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
import uvloop

from enforcer_daemon.dataplane.addresses import interface, node_addresses, watch_addresses
from enforcer_daemon.dataplane.backends import choose_backend
from enforcer_daemon.dataplane.guard_links import passed_by_tc
from enforcer_daemon.dataplane.netns import (
    current_netns,
    new_netns,
    open_in,
    read_sysctl,
    tune_conntrack,
    write_sysctl,
)
from enforcer_daemon.dataplane.tools import run, run_in
from enforcer_daemon.errors import DataplaneError, NetnsError
from enforcer_daemon.model import IPAddress
from enforcer_daemon.nsfs import netns_id
from enforcer_daemon.settings import RulesBackend

pytestmark = [pytest.mark.kernel, pytest.mark.stock_kernel]


@pytest.fixture
def netns() -> Iterator[int]:
    fd = new_netns()
    try:
        run_in(fd, ("ip", "link", "add", "eth0", "mtu", "1400", "type", "veth", "peer", "name", "peer0"))
        run_in(fd, ("ip", "link", "set", "lo", "up"))
        yield fd
    finally:
        os.close(fd)


def own_netns() -> str:
    return str(Path("/proc/thread-self/ns/net").readlink())


def test_work_is_done_inside_and_the_caller_stays_outside(netns: int) -> None:
    outside = own_netns()
    inside = open_in(netns, own_netns)
    assert inside != outside
    assert own_netns() == outside
    assert inside == f"net:[{netns_id(netns).inode}]"


def test_an_error_of_the_work_reaches_the_caller(netns: int) -> None:
    with pytest.raises(ZeroDivisionError):
        open_in(netns, lambda: 1 // 0)


def test_what_is_no_network_namespace_is_refused() -> None:
    with Path("/dev/null").open() as null:
        with pytest.raises(NetnsError, match="not of a namespace"):
            netns_id(null.fileno())
        with pytest.raises(NetnsError, match="cannot be entered"):
            open_in(null.fileno(), own_netns)
    fd = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    try:
        with pytest.raises(NetnsError, match="not of a network namespace"):
            netns_id(fd)
    finally:
        os.close(fd)


def test_namespaces_are_told_apart(netns: int) -> None:
    here = current_netns()
    again = os.dup(netns)
    try:
        assert netns_id(again) == netns_id(netns) != netns_id(here)
    finally:
        os.close(here)
        os.close(again)


def test_conntrack_is_tuned_inside_alone(netns: int) -> None:
    choose_backend(RulesBackend.AUTO)  # The first thing that a daemon does; its rules load the kernel's module.
    name = "netfilter.nf_conntrack_tcp_timeout_time_wait"
    here = current_netns()
    try:
        before = read_sysctl(here, name)
        assert tune_conntrack(netns) == ()
        assert read_sysctl(netns, name) == "5"
        assert read_sysctl(netns, "netfilter.nf_conntrack_tcp_be_liberal") == "1"
        assert read_sysctl(here, name) == before
    finally:
        os.close(here)


def test_conntrack_is_tuned_where_proc_is_read_only(netns: int, tmp_path: Path) -> None:
    """As in a container, which the node's directory is mounted into at another place."""
    script = f"""
import sys
from pathlib import Path
from enforcer_daemon.dataplane.netns import read_sysctl, tune_conntrack
assert len(tune_conntrack({netns})) == 3
assert tune_conntrack({netns}, Path(sys.argv[1])) == ()
print(read_sysctl({netns}, "netfilter.nf_conntrack_tcp_be_liberal"))
"""
    mounts = (
        f"mount --bind /proc/sys/net {tmp_path} && mount --bind /proc/sys /proc/sys"
        ' && mount -o remount,bind,ro /proc/sys && exec "$0" -c "$1" "$2"'
    )
    choose_backend(RulesBackend.AUTO)
    command = ("unshare", "--mount", "sh", "-c", mounts, sys.executable, script, str(tmp_path))
    done = subprocess.run(command, pass_fds=[netns], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_a_setting_that_is_refused_is_named(netns: int) -> None:
    with pytest.raises(NetnsError, match=r"net\.netfilter.no_such_setting: cannot be read"):
        read_sysctl(netns, "netfilter.no_such_setting")
    with pytest.raises(NetnsError, match=r"net\.core.somaxconn: cannot be set to many: Invalid argument"):
        write_sysctl(netns, "core.somaxconn", "many")


def test_an_interface_shows_its_mtu_and_addresses(netns: int) -> None:
    run_in(netns, ("ip", "addr", "add", "10.1.2.3/32", "dev", "eth0"))
    run_in(netns, ("ip", "addr", "add", "fd01::3/64", "dev", "eth0", "nodad"))
    found = interface(netns, "eth0")
    assert found.mtu == 1400
    assert found.addresses == (ip_address("10.1.2.3"), ip_address("fd01::3"))
    with pytest.raises(NetnsError, match="interface eth1"):
        interface(netns, "eth1")


def test_node_addresses_hold_the_bridges_link_local_one_but_no_loopback_no_services_and_no_veths(netns: int) -> None:
    run_in(netns, ("ip", "link", "add", "cni0", "type", "bridge"))
    run_in(netns, ("ip", "link", "set", "peer0", "master", "cni0"))
    for name in ("eth0", "peer0", "cni0"):
        run_in(netns, ("ip", "link", "set", name, "up"))
    for name, address in (
        ("eth0", "10.1.2.3/24"),
        ("eth0", "fd01::3/64"),
        ("cni0", "fe80::1/64"),
        ("peer0", "fe80::2/64"),
    ):
        run_in(netns, ("ip", "addr", "replace", address, "dev", name))
    run_in(netns, ("ip", "link", "add", "kube-ipvs0", "type", "veth", "peer", "name", "peer1"))
    run_in(netns, ("ip", "addr", "add", "10.96.0.1/32", "dev", "kube-ipvs0"))
    found = open_in(netns, node_addresses)
    assert {ip_address(text) for text in ("10.1.2.3", "fd01::3", "fe80::1")} <= found
    assert ip_address("fe80::2") not in found
    own = [address for address in interface(netns, "eth0").addresses if address.is_link_local]
    assert len(own) == 1
    assert own[0] not in found
    assert not found & {ip_address("10.96.0.1"), ip_address("::1")}


@pytest.mark.parametrize("loop_factory", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
def test_a_change_of_addresses_is_seen(netns: int, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def story() -> list[frozenset[IPAddress]]:
        seen: list[frozenset[IPAddress]] = []
        async for addresses in watch_addresses():
            seen.append(addresses)
            if len(seen) == 1:
                await asyncio.to_thread(run_in, netns, ("ip", "addr", "add", "10.5.0.1/32", "dev", "eth0"))
            elif len(seen) == 2:
                await asyncio.to_thread(run_in, netns, ("ip", "addr", "del", "10.5.0.1/32", "dev", "eth0"))
            else:
                break
        return seen

    def watch() -> list[frozenset[IPAddress]]:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(asyncio.wait_for(story(), 10))

    seen = open_in(netns, watch)
    assert seen == [frozenset(), frozenset({ip_address("10.5.0.1")}), frozenset()]


def test_interfaces_are_read_while_a_loop_runs_and_no_descriptor_is_left(netns: int) -> None:
    """The daemon reads them on its own loop's thread too, again and again for weeks."""
    directory = Path("/proc/self/fd")

    async def read() -> None:
        assert interface(netns, "eth0").kind == "veth"
        assert open_in(netns, passed_by_tc) == frozenset()
        node_addresses()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(read())
        before = sorted(path.name for path in directory.iterdir())
        for _ in range(50):
            runner.run(read())
        assert sorted(path.name for path in directory.iterdir()) == before


def test_a_tool_that_fails_or_is_missing_is_named() -> None:
    with pytest.raises(DataplaneError, match=r"nft failed with status 1: .*syntax error"):
        run(("nft", "-c", "-f", "-"), "nonsense")
    with pytest.raises(DataplaneError, match="no-such-tool: "):
        run(("no-such-tool",))
