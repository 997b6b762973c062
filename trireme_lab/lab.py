# SPDX-License-Identifier: Apache-2.0
"""A running lab: start it, change it, send traffic in it, and leave nothing behind.

    with Lab(spec) as lab:
        assert lab.probe("shop/web", "shop/db", 5432).outcome.is_allowed

Places are named as in scenarios: `shop/web` is a pod, `host:laptop` a host, `node:a` a node, `service:shop/db` a
Service (a target only). Methods raise LabError unless they say otherwise. Not thread-safe, but for the probes and
sockets; start the lab in a thread that outlives it, because its daemons end with that thread.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import TracebackType
from typing import Self

from enforcer_daemon.model import IPAddress, PodRef, Protocol
from trireme_lab.authority import write_authority
from trireme_lab.capture import Capture
from trireme_lab.datagrams import ask_all
from trireme_lab.errors import LabError
from trireme_lab.links import SetUp, Step
from trireme_lab.manifests import ObjectRef, namespace_manifest, pod_manifest, pod_ref
from trireme_lab.netns import (
    add_netns,
    delete_all,
    exec_prefix,
    load_bridge_filter,
    netns_path,
    open_socket,
    run,
    set_up,
    write_sysctls,
)
from trireme_lab.network import (
    ROUTED_BRIDGE_SYSCTLS,
    ROUTER_SYSCTLS,
    fabric_steps,
    node_rules,
    routed_bridge_steps,
    uplink_steps,
)
from trireme_lab.node import Node, NodeDirectories
from trireme_lab.probe import Outcome, Probe, ProbeResult, run_probe
from trireme_lab.process import NetnsProcess
from trireme_lab.rundir import RunDirectory, netns_names
from trireme_lab.sandbox import IFNAME, Place, Runtime, Sandbox, SandboxRequest
from trireme_lab.servers import Servers
from trireme_lab.settings import daemon_settings
from trireme_lab.spec import HostSpec, LabSpec, Manifest, PodSpec, PortSpec
from trireme_lab.tools import Tools
from triremectl.admin_client import AdminError

_CONCURRENT_ADDS = 4
_PAYLOAD_BYTES = 16


class Lab:
    """One spec. A context manager: entering starts it, leaving removes every trace of it."""

    def __init__(self, spec: LabSpec, tools: Tools | None = None) -> None:
        """Prepare; nothing is touched before the lab is entered."""
        self.spec = spec
        self.tools = tools if tools is not None else Tools()
        self.nodes: dict[str, Node] = {}
        self.pods: dict[PodRef, Sandbox] = {}
        self._specs: dict[PodRef, PodSpec] = {}
        self._places: dict[str, Place] = {}
        self._runtimes: dict[tuple[str, bool], Runtime] = {}
        self._stack = ExitStack()

    # Start and end.

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self) -> None:
        self._directory = RunDirectory()
        self._stack.callback(self._directory.remove)
        self._stack.callback(lambda: delete_all(netns_names(self.name)))
        self._servers = Servers()
        self._stack.callback(self._servers.close)
        self._make_network()
        self._start_daemons()
        self._make_pods()
        self._apply_services()

    @property
    def name(self) -> str:
        """The lab's name, with which the names of its namespaces begin."""
        return self._directory.name

    @property
    def directory(self) -> Path:
        """The lab's own directory; gone with it."""
        return self._directory.path

    def _netns(self, *parts: str) -> str:
        return "-".join((self.name, *parts))

    def _make_network(self) -> None:
        load_bridge_filter()
        outside = [host for host in self.spec.hosts if host.node is None]
        fabric = self._netns("fabric")
        places = [
            *(Place(f"node:{node.name}", self._netns("node", node.name), node.addresses) for node in self.spec.nodes),
            *(Place(f"host:{host.name}", self._host_netns(host), host.addresses) for host in outside),
        ]
        for name in (fabric, *(place.netns for place in places)):
            add_netns(name)
        networks = {f"node:{node.name}": node.pod_networks for node in self.spec.nodes}
        # Whoever is outside reaches external addresses of Services through the first node.
        external = tuple(ip_network(address) for service in self.spec.services for address in service.external_ips)
        networks[f"node:{self.spec.nodes[0].name}"] += external
        for name in (fabric, *(place.netns for place in places if place.name in networks)):
            write_sysctls(name, ROUTER_SYSCTLS)
        steps: list[Step] = [SetUp("lo")]
        for number, place in enumerate(places):
            steps += fabric_steps(number, netns_path(place.netns), place.addresses, networks.get(place.name, ()))
        set_up(fabric, steps)
        for place in places:
            set_up(place.netns, uplink_steps(place.addresses))
            self._places[place.name] = place
        for node in self.spec.nodes:
            if node.is_routed:
                netns = self.place(f"node:{node.name}").netns
                set_up(netns, routed_bridge_steps(node))
                write_sysctls(netns, ROUTED_BRIDGE_SYSCTLS)
        for host in outside:
            self._serve(self.place(f"host:{host.name}"), host.ports)

    def _host_netns(self, host: HostSpec) -> str:
        return self._netns("host", host.name)

    def _start_daemons(self) -> None:
        authority = write_authority(self.directory, str(self.spec.settings.get("trustDomain", "cluster.local")))
        objects = [namespace_manifest(name, labels) for name, labels in self.spec.namespaces.items()]
        for spec in self.spec.nodes:
            directories = NodeDirectories(self.directory / spec.name)
            directories.make()
            enforcer = self.tools.enforcer if self.spec.enforcer else None
            node = Node(spec, self.place(f"node:{spec.name}").netns, directories, enforcer)
            self.nodes[spec.name] = node
            self._stack.callback(node.close)
            node.write_settings(daemon_settings(self.spec, spec, directories, authority))
            for manifest in (*objects, *self.spec.manifests):
                node.put(manifest)
            node.start()
        for node in self.nodes.values():
            node.wait_ready()

    def _make_pods(self) -> None:
        inside = [host for host in self.spec.hosts if host.node is not None]
        with ThreadPoolExecutor(_CONCURRENT_ADDS) as executor:
            futures = [
                *(executor.submit(self.add_pod, spec) for spec in self.spec.pods),
                *(executor.submit(self._add_bridged_host, host) for host in inside),
            ]
            for future in futures:
                future.result()

    # Looking around.

    def node(self, name: str) -> Node:
        """Return a node by name."""
        try:
            return self.nodes[name]
        except KeyError:
            raise LabError(f"no node {name}") from None

    def place(self, name: str) -> Place:
        """Return a pod, host or node by its name in scenarios."""
        try:
            return self._places[name]
        except KeyError:
            raise LabError(f"no place {name}") from None

    def namespaces(self) -> dict[str, str]:
        """Return the network namespace of every place by the place's name."""
        return {place.name: place.netns for place in self._places.values()}

    def has_pod(self, name: str) -> bool:
        """Return whether a place is a pod that runs now."""
        return name in map(str, self._specs)

    def pod_node(self, pod: str) -> Node:
        """Return the node that a pod runs on."""
        return self.node(self._spec(pod).node)

    def _spec(self, pod: str) -> PodSpec:
        namespace, _, name = pod.partition("/")
        try:
            return self._specs[PodRef(namespace, name)]
        except KeyError:
            raise LabError(f"no pod {pod}") from None

    def address_of(self, target: str, version: int = 4) -> IPAddress:
        """Return what a client dials for a target: a place, a Service, or an address as text."""
        for service in self.spec.services:
            if target == f"service:{service.namespace}/{service.name}":
                return Place(target, "", service.addresses).address(version)
        if target in self._places:
            return self._places[target].address(version)
        try:
            return ip_address(target)
        except ValueError:
            raise LabError(f"no target {target}") from None

    # Pods.

    def add_pod(self, spec: PodSpec) -> Place:
        """Make a pod as a runtime does, and let it listen on its ports. Returns when CNI ADD has."""
        node = self.node(spec.node)
        if spec.service_account != "default" or any(port.name for port in spec.ports):
            node.put(pod_manifest(spec, spec.labels))  # what CNI arguments cannot say
        request = SandboxRequest(
            name=str(spec.pod),
            netns=self._netns("pod", spec.pod.namespace, spec.pod.name),
            addresses=spec.addresses,
            cni_args={
                "IgnoreUnknown": "1",
                "K8S_POD_NAMESPACE": spec.pod.namespace,
                "K8S_POD_NAME": spec.pod.name,
                "K8S_POD_UID": f"{spec.pod.namespace}-{spec.pod.name}",
            },
            labels=spec.labels,
        )
        sandbox = self._runtime(node, is_enforced=self.spec.enforcer).add(request)
        self._specs[spec.pod], self.pods[spec.pod] = spec, sandbox
        self._places[str(spec.pod)] = sandbox.place
        self._serve(sandbox.place, spec.ports)
        return sandbox.place

    def remove_pod(self, pod: str) -> None:
        """Remove a pod as a runtime does: its processes, CNI DEL, its namespace."""
        spec = self._spec(pod)
        self._servers.close_owner(pod)
        node = self.node(spec.node)
        del self._places[pod], self._specs[spec.pod]
        self._runtime(node, is_enforced=self.spec.enforcer).delete(self.pods.pop(spec.pod))
        node.remove(pod_ref(spec.pod))

    def check_pod(self, pod: str) -> None:
        """Run CNI CHECK for a pod; raise LabError if the chain finds fault."""
        spec = self._spec(pod)
        self._runtime(self.node(spec.node), is_enforced=self.spec.enforcer).check(self.pods[spec.pod])

    def _runtime(self, node: Node, *, is_enforced: bool) -> Runtime:
        key = node.name, is_enforced
        if key not in self._runtimes:
            self._runtimes[key] = Runtime(node, self.tools, is_enforced=is_enforced)
        return self._runtimes[key]

    def _add_bridged_host(self, host: HostSpec) -> Place:
        request = SandboxRequest(f"host:{host.name}", self._host_netns(host), host.addresses, {}, {})
        place = self._runtime(self.node(str(host.node)), is_enforced=False).add(request).place
        self._places[place.name] = place
        self._serve(place, host.ports)
        return place

    def _apply_services(self) -> None:
        backends = []
        for service in self.spec.services:
            places = [self.pods[pod].place for pod in service.pods]
            places += [self.place(f"host:{name}") for name in service.hosts]
            backends.append((service, [address for place in places for address in place.addresses]))
        for node in self.nodes.values():
            run([*exec_prefix(node.netns), "nft", "-f", "-"], node_rules(backends))

    # Policies and labels.

    def apply(self, *manifests: Manifest, is_awaited: bool = True) -> bool:
        """Add or replace objects on every node; say whether every running daemon has taken the change over.

        With `is_awaited` false, return True at once.
        """

        def put(node: Node) -> None:
            for manifest in manifests:
                node.put(manifest)

        return self._change(self.nodes.values(), put, is_awaited)

    def remove(self, *references: ObjectRef) -> bool:
        """Take objects away on every node; returns as `apply` does. Raises LabError for an object that no node has."""
        known = dict.fromkeys(references, False)

        def take(node: Node) -> None:
            for reference in references:
                known[reference] |= node.remove(reference)

        is_effective = self._change(self.nodes.values(), take)
        for reference, was_there in known.items():
            if not was_there:
                raise LabError(f"no {reference.kind} {reference.namespace}/{reference.name} to remove")
        return is_effective

    def label_namespace(self, name: str, labels: Mapping[str, str]) -> bool:
        """Replace a Kubernetes namespace's labels on every node; returns as `apply` does."""
        return self.apply(namespace_manifest(name, labels))

    def label(self, pod: str, labels: Mapping[str, str]) -> bool:
        """Replace a pod's labels; returns as `apply` does.

        Only the pod's own node is told: the others learn labels from handshakes alone.
        """
        spec = replace(self._spec(pod), labels=dict(labels))
        self._specs[spec.pod] = spec
        manifest = pod_manifest(spec, labels)
        return self._change([self.node(spec.node)], lambda node: node.put(manifest))

    def _change(self, nodes: Iterable[Node], act: Callable[[Node], None], is_awaited: bool = True) -> bool:
        before: dict[str, int] = {}
        nodes = list(nodes)
        for node in nodes:
            if is_awaited and node.has_enforcer:
                with suppress(AdminError):  # a daemon that was stopped reads everything when it starts
                    before[node.name] = node.generation()
        for node in nodes:
            act(node)
        return all(self.nodes[name].wait_for_change(generation) for name, generation in before.items())

    # Traffic.

    def request(self, source: str, target: str, port: int, version: int = 4) -> Probe:
        """Return the probe for a TCP connection between two places by name; `dataclasses.replace` changes the rest."""
        return Probe(
            self.place(source).netns, self.address_of(target, version), port, timeout_s=self.tools.probe_timeout_s
        )

    def probe(
        self, source: str, target: str, port: int, version: int = 4, protocol: Protocol = Protocol.TCP
    ) -> ProbeResult:
        """Try one connection and say what came of it."""
        return run_probe(replace(self.request(source, target, port, version), protocol=protocol))

    def probe_all(self, probes: Sequence[Probe]) -> list[ProbeResult]:
        """Try many connections at once; results in the order of the probes."""
        with ThreadPoolExecutor(self.tools.concurrent_probes) as executor:
            return list(executor.map(run_probe, probes))

    def ask_all(self, probes: Sequence[Probe], quiet_s: float) -> list[ProbeResult]:
        """Try many UDP probes at once, and stop waiting when nobody answered for `quiet_s`.

        A datagram that a server got but whose answer never came is SILENT: no denial, since the application had it.
        """
        payloads = [secrets.token_bytes(_PAYLOAD_BYTES) for _ in probes]
        results = ask_all(probes, payloads, quiet_s)
        heard = self._servers.heard()
        return [
            replace(result, outcome=Outcome.SILENT) if result.outcome.is_denied and payload in heard else result
            for payload, result in zip(payloads, results, strict=True)
        ]

    def open_socket(self, place: str, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """Return a new socket that lives at the place. The caller owns it; an open socket keeps its namespace alive."""
        return open_socket(self.place(place).netns, family, kind)

    def listen(self, place: str, port: PortSpec, address: IPAddress | None = None) -> None:
        """Let a place answer on one more port: on all its addresses, or on the given one alone (as the loopback's)."""
        there = self.place(place)
        self._serve(there if address is None else replace(there, addresses=(address,)), [port])

    def _serve(self, place: Place, ports: Iterable[PortSpec]) -> None:
        for port in ports:
            for address in place.addresses:
                self._servers.listen(place.name, place.netns, address, port.number, port.protocol)

    def run(self, place: str, *argv: str) -> str:
        """Run a command at a place to its end and return its output; raise LabError if it fails."""
        return run([*exec_prefix(self.place(place).netns), *argv])

    def spawn(self, place: str, *argv: str) -> NetnsProcess:
        """Start a program at a place; it ends with the lab at the latest. Its output is kept in a file of the lab."""
        output = self.directory / f"spawn-{time.monotonic_ns()}.log"
        process = NetnsProcess(self.place(place).netns, argv, output)
        self._stack.callback(process.stop)
        return process

    def capture(self, place: str, ifname: str = IFNAME) -> Capture:
        """Record the packets of an interface until the capture is closed."""
        return Capture(self.place(place).netns, ifname)
