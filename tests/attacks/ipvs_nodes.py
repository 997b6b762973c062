# SPDX-License-Identifier: Apache-2.0
"""Nodes of a lab with kube-proxy in IPVS mode, where the kernel has IPVS."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from enforcer_daemon.model import IPNetwork
from tests.attacks import ipvs
from tests.attacks.kube_proxy import Front
from trireme_lab import Lab
from trireme_lab.netns import exec_prefix, run, write_sysctls

_TOOLS = ("ipvsadm", "ipset")
_IPVS = Path("/proc/net/ip_vs")
_RESTORE = {4: "iptables-restore", 6: "ip6tables-restore"}


def require_ipvs() -> None:
    """Skip the test where the kernel has no IPVS; a distribution's has (make test-vm)."""
    if not _IPVS.exists() and shutil.which("modprobe"):
        subprocess.run(["modprobe", "ip_vs"], check=False, capture_output=True)
    if not _IPVS.exists():
        pytest.skip("this kernel has no IPVS")
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    assert not missing, f"install {', '.join(missing)}"


@contextmanager
def ipvs_services(lab: Lab, fronts: Sequence[Front], clusters: Sequence[IPNetwork]) -> Iterator[None]:
    """Have all nodes of a lab translate by IPVS for the time of the block; `clusters`: the networks of all pods."""
    with ExitStack() as stack:
        for name, node in lab.nodes.items():
            _apply(stack, lab, name, node.netns, fronts, clusters)
        yield


def _apply(
    stack: ExitStack, lab: Lab, name: str, netns: str, fronts: Sequence[Front], clusters: Sequence[IPNetwork]
) -> None:
    inside, spec = exec_prefix(netns), lab.node(name).spec
    own = [*spec.addresses, *(network[1] for network in spec.pod_networks)]
    write_sysctls(netns, ipvs.SYSCTLS)
    stack.callback(run, [*inside, "ip", "link", "delete", ipvs.DUMMY])
    run([*inside, "ip", "-batch", "-"], "\n".join([*ipvs.link_lines(fronts), ""]))
    stack.callback(run, [*inside, "ipvsadm", "--clear"])
    run([*inside, "ipvsadm", "--restore"], "\n".join([*ipvs.server_lines(fronts, own), ""]))
    stack.callback(run, [*inside, "ipset", "destroy"])  # Of both families, after the rules that name them.
    for version in (cluster.version for cluster in clusters):
        run([*inside, "ipset", "restore"], "\n".join([*ipvs.set_lines(fronts, spec.pod_networks, version), ""]))
    for cluster in clusters:
        empty = "".join(f"*{table}\nCOMMIT\n" for table in ("nat", "filter"))
        stack.callback(run, [*inside, _RESTORE[cluster.version]], empty)
        run([*inside, _RESTORE[cluster.version]], ipvs.iptables_text(cluster))
