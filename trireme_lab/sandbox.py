# SPDX-License-Identifier: Apache-2.0
"""Pods as a container runtime makes them: a network namespace, then the node's CNI chain."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_interface
from pathlib import Path

from enforcer_daemon.model import IPAddress
from trireme_lab.chain import load_conflist, node_conflist
from trireme_lab.cni_runtime import CniError, CniRuntime
from trireme_lab.errors import LabError
from trireme_lab.links import SetUp
from trireme_lab.netns import add_netns, delete_all, exec_prefix, netns_path, set_up
from trireme_lab.node import Node
from trireme_lab.tools import Tools

IFNAME = "eth0"


@dataclass(frozen=True, slots=True)
class Place:
    """Somewhere that connections come from and go to."""

    name: str
    netns: str
    addresses: tuple[IPAddress, ...]

    def address(self, version: int = 4) -> IPAddress:
        """Return its first address of the IP version; raise LabError if it has none."""
        for address in self.addresses:
            if address.version == version:
                return address
        raise LabError(f"{self.name}: has no IPv{version} address")


@dataclass(frozen=True, slots=True)
class SandboxRequest:
    """What the kubelet would tell the runtime about a pod."""

    name: str
    netns: str
    addresses: Sequence[IPAddress]
    cni_args: Mapping[str, str]
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A pod's network as it stands."""

    place: Place
    container_id: str
    request: SandboxRequest


class Runtime:
    """Makes and removes sandboxes on one node."""

    def __init__(self, node: Node, tools: Tools, *, is_enforced: bool) -> None:
        self._node = node
        directories = node.directories
        conflist = node_conflist(
            load_conflist(tools.conflist),
            node.spec.pod_networks,
            directories.cni / "networks",
            directories.run,
            is_enforced=is_enforced,
            is_routed=node.spec.is_routed,
        )
        plugin_dirs: list[Path] = [*tools.reference_plugins, tools.plugin.parent]
        self._runtime = CniRuntime(conflist, plugin_dirs, directories.cni / "cache", exec_prefix(node.netns))

    def add(self, request: SandboxRequest) -> Sandbox:
        """Make the namespace and run ADD; raise LabError with the plugin's own words."""
        container_id = secrets.token_hex(32)
        add_netns(request.netns)
        set_up(request.netns, [SetUp("lo")])
        prefix = {n.version: n.prefixlen for n in self._node.spec.pod_networks}
        capabilities = {"ips": [f"{a}/{prefix[a.version]}" for a in request.addresses]} if request.addresses else {}
        try:
            result = self._runtime.add(
                container_id,
                netns_path(request.netns),
                IFNAME,
                cni_args={**request.cni_args, "K8S_POD_INFRA_CONTAINER_ID": container_id} if request.cni_args else {},
                capability_args=capabilities,
                cni_labels=request.labels,
            )
        except CniError as err:
            raise LabError(f"{request.name} on node {self._node.name}: CNI ADD: {err}") from err
        addresses = tuple(ip_interface(ip["address"]).ip for ip in result["ips"])
        return Sandbox(Place(request.name, request.netns, addresses), container_id, request)

    def delete(self, sandbox: Sandbox) -> None:
        """Run DEL and remove the namespace."""
        try:
            self._runtime.delete(sandbox.container_id, IFNAME)
        except CniError as err:
            raise LabError(f"{sandbox.place.name} on node {self._node.name}: CNI DEL: {err}") from err
        finally:
            delete_all([sandbox.place.netns])

    def check(self, sandbox: Sandbox) -> None:
        """Run CHECK; raise LabError if the chain finds fault."""
        try:
            self._runtime.check(sandbox.container_id, IFNAME)
        except CniError as err:
            raise LabError(f"{sandbox.place.name} on node {self._node.name}: CNI CHECK: {err}") from err
