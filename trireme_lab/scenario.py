# SPDX-License-Identifier: Apache-2.0
"""Scenario files: a spec, and steps that change it and say which flows must pass. Format: docs/lab.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path

from enforcer_daemon.documents import DocumentError, read_document
from enforcer_daemon.errors import SettingsError
from enforcer_daemon.model import IPAddress, IPNetwork, PodRef, Protocol
from enforcer_daemon.reasons import Reason
from enforcer_daemon.settings_file import decode_settings
from trireme_lab.errors import ScenarioError
from trireme_lab.fields import (
    Fields,
    flag,
    labels,
    list_of,
    mapping,
    name,
    one_of,
    parsed_by,
    port_number,
    seconds,
    text,
)
from trireme_lab.manifests import ObjectRef, object_ref
from trireme_lab.node import NodeDirectories
from trireme_lab.settings import daemon_settings
from trireme_lab.spec import (
    MAX_NODES,
    SERVICE_NETWORKS,
    HostSpec,
    LabSpec,
    Manifest,
    NodeSpec,
    PodSpec,
    PortSpec,
    ServicePort,
    ServiceSpec,
)

SHIPPED = Path(__file__).parent / "scenarios"

_PROTOCOLS = {protocol.name: protocol for protocol in (Protocol.TCP, Protocol.UDP)}
_REASONS = {reason.value: reason for reason in Reason}
_PLACES = "NAMESPACE/POD, host:NAME or node:NAME"
_TARGETS = "NAMESPACE/POD, host:NAME, node:NAME, service:NAMESPACE/NAME or an IP address"


@dataclass(frozen=True, slots=True)
class Flow:
    """A connection to try, and what must come of it."""

    source: str
    target: str
    port: int
    is_allowed: bool
    reason: Reason | None = None
    """Why a denied flow must be denied; None: any reason will do."""
    protocol: Protocol = Protocol.TCP
    version: int = 4
    """Which IP version to use where the target has both."""


@dataclass(frozen=True, slots=True)
class LabelChange:
    """New labels for a pod or a namespace; they replace all it had."""

    target: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Step:
    """Changes, made in the order of these fields, and then flows."""

    title: str = ""
    remove: tuple[ObjectRef, ...] = ()
    apply: tuple[Manifest, ...] = ()
    label_namespaces: tuple[LabelChange, ...] = ()
    label_pods: tuple[LabelChange, ...] = ()
    flows: tuple[Flow, ...] = ()


@dataclass(frozen=True, slots=True)
class Scenario:
    """A world and its story."""

    title: str
    spec: LabSpec
    steps: tuple[Step, ...]
    timeout_s: float = 3.0
    """How long a client waits for a connection, seconds."""


def load_scenario(file_or_name: str) -> Scenario:
    """Read a scenario file, or a shipped scenario by its name; raise ScenarioError that names file and field."""
    shipped = SHIPPED / f"{file_or_name}.yaml"
    path = shipped if "/" not in file_or_name and shipped.is_file() else Path(file_or_name)
    try:
        tree = read_document(path.read_text(encoding="utf-8"))
    except OSError as err:
        known = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
        raise ScenarioError(f"{path}: {err.strerror or err} (shipped scenarios: {known})") from err
    except DocumentError as err:
        raise ScenarioError(f"{path}:{err.line}: {err}") from err
    except UnicodeDecodeError as err:
        raise ScenarioError(f"{path}: not YAML: {err}") from err
    try:
        return decode_scenario(tree)
    except ScenarioError as err:
        raise ScenarioError(f"{path}: {err}") from err


def decode_scenario(tree: object) -> Scenario:
    """Turn a parsed scenario file into values; raise ScenarioError that begins with the field's path."""
    with Fields(tree) as fields:
        scenario = Scenario(
            title=fields.take("title", text, ""),
            spec=_decode_spec(fields),
            steps=fields.take("steps", _decode_steps, ()),
            timeout_s=fields.take("timeoutSeconds", seconds, 3.0),
        )
    _check_settings(scenario.spec)
    _check_names(scenario.spec, scenario.steps)
    _check_removals(scenario.spec, scenario.steps)
    return scenario


def in_step(number: int, title: str) -> str:
    """Return the words that tell people which step is meant; they count from 1."""
    return f" (in step {number}: {title})" if title else f" (in step {number})"


def _check_names(spec: LabSpec, steps: Sequence[Step]) -> None:
    """Raise ScenarioError for the first place in the steps that the lab does not have, before anything starts."""
    pods = {str(pod.pod) for pod in spec.pods}
    places = {*pods, *(f"host:{host.name}" for host in spec.hosts), *(f"node:{node.name}" for node in spec.nodes)}
    targets = {*places, *(f"service:{service.namespace}/{service.name}" for service in spec.services)}
    hosts = {host.name for host in spec.hosts}
    for index, service in enumerate(spec.services):
        for position, host in enumerate(service.hosts):
            _check_name(f"services[{index}].hosts[{position}]", host, hosts, "the name of a host")
    for number, step in enumerate(steps, 1):
        path, where = f"steps[{number - 1}]", in_step(number, step.title)
        for index, change in enumerate(step.label_pods):
            _check_name(f"{path}.labelPods[{index}].name", change.target, pods, f"NAMESPACE/POD{where}")
        for index, flow in enumerate(step.flows):
            _check_name(f"{path}.flows[{index}].from", flow.source, places, f"{_PLACES}{where}")
            if not _is_address(flow.target):
                _check_name(f"{path}.flows[{index}].to", flow.target, targets, f"{_TARGETS}{where}")


def _check_settings(spec: LabSpec) -> None:
    """Raise ScenarioError if a node's enforcer would not start."""
    lab = Path("/lab")
    for index, node in enumerate(spec.nodes):
        try:
            decode_settings(daemon_settings(spec, node, NodeDirectories(lab), (lab / "ca.pem", lab / "ca-key.pem")))
        except SettingsError as err:
            text = str(err)
            is_name = text.startswith("node: ")
            raise ScenarioError(f"nodes[{index}].name: {text[6:]}" if is_name else f"settings.{text}") from err


def _check_removals(spec: LabSpec, steps: Sequence[Step]) -> None:
    """Raise ScenarioError if a policy is removed that is not there then."""
    there = {object_ref(manifest) for manifest in spec.manifests}
    for number, step in enumerate(steps, 1):
        for index, reference in enumerate(step.remove):
            if reference.kind == "NetworkPolicy" and reference not in there:
                name = f"{reference.namespace}/{reference.name}"
                path = f"steps[{number - 1}].remove[{index}]"
                raise ScenarioError(f"{path}: there is no policy {name} by then{in_step(number, step.title)}")
        there -= set(step.remove)
        there |= {object_ref(manifest) for manifest in step.apply}


def _check_name(path: str, name: str, known: Collection[str], forms: str) -> None:
    if name not in known:
        raise ScenarioError(f"{path}: this lab has no {name}; must be {forms}")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _decode_spec(fields: Fields) -> LabSpec:
    nodes = fields.take("nodes", list_of(mapping))
    if not 0 < len(nodes) <= MAX_NODES:
        raise ScenarioError(f"nodes: must be 1 to {MAX_NODES}")
    return LabSpec(
        nodes=tuple(_decode_node(node, f"nodes[{index}]", index + 1) for index, node in enumerate(nodes)),
        namespaces=dict(fields.take("namespaces", list_of(_decode_namespace), [])),
        pods=fields.take("pods", list_of(_decode_pod), []),
        hosts=fields.take("hosts", list_of(_decode_host), []),
        services=fields.take("services", list_of(_decode_service), []),
        manifests=fields.take("policies", list_of(_decode_manifest), []),
        settings=fields.take("settings", mapping, {}),
        enforcer=fields.take("enforcer", flag, True),
    )


def _decode_node(tree: object, path: str, number: int) -> NodeSpec:
    with Fields(tree, path) as fields:
        default = NodeSpec.numbered(fields.take("name", name), number)
        return NodeSpec(
            name=default.name,
            addresses=fields.take("addresses", _addresses, [str(a) for a in default.addresses]),
            pod_networks=fields.take("podNetworks", _networks, [str(n) for n in default.pod_networks]),
        )


def _decode_namespace(tree: object, path: str) -> tuple[str, Mapping[str, str]]:
    with Fields(tree, path) as fields:
        return fields.take("name", name), fields.take("labels", labels, {})


def _decode_pod(tree: object, path: str) -> PodSpec:
    with Fields(tree, path) as fields:
        return PodSpec(
            pod=fields.take("name", _pod_ref),
            node=fields.take("node", name),
            labels=fields.take("labels", labels, {}),
            addresses=fields.take("addresses", _addresses, []),
            ports=fields.take("ports", list_of(_decode_port), []),
            service_account=fields.take("serviceAccount", name, "default"),
        )


def _decode_host(tree: object, path: str) -> HostSpec:
    with Fields(tree, path) as fields:
        return HostSpec(
            name=fields.take("name", name),
            addresses=fields.take("addresses", _addresses, []),
            ports=fields.take("ports", list_of(_decode_port), []),
            node=fields.take("node", name) if fields.has("node") else None,
        )


def _decode_port(tree: object, path: str) -> PortSpec:
    if not isinstance(tree, Mapping):
        return PortSpec(port_number(tree, path))
    with Fields(tree, path) as fields:
        return PortSpec(
            number=fields.take("port", port_number),
            protocol=fields.take("protocol", one_of(_PROTOCOLS), "TCP"),
            name=fields.take("name", text, ""),
        )


def _decode_service(tree: object, path: str) -> ServiceSpec:
    with Fields(tree, path) as fields:
        reference = fields.take("name", _pod_ref)
        return ServiceSpec(
            namespace=reference.namespace,
            name=reference.name,
            addresses=fields.take("addresses", list_of(parsed_by(_service_address))),
            pods=fields.take("pods", list_of(_pod_ref), []),
            ports=fields.take("ports", list_of(_decode_service_port)),
            hosts=fields.take("hosts", list_of(text), []),
            external_ips=fields.take("externalIPs", _addresses, []),
        )


def _decode_service_port(tree: object, path: str) -> ServicePort:
    with Fields(tree, path) as fields:
        port = fields.take("port", port_number)
        return ServicePort(
            port=port,
            target_port=fields.take("targetPort", port_number, port),
            protocol=fields.take("protocol", one_of(_PROTOCOLS), "TCP"),
            node_port=fields.take("nodePort", port_number) if fields.has("nodePort") else None,
        )


def _decode_steps(value: object, path: str) -> tuple[Step, ...]:
    trees = list_of(lambda tree, _: tree)(value, path)
    return tuple(_decode_numbered_step(tree, f"{path}[{index}]", index + 1) for index, tree in enumerate(trees))


def _decode_numbered_step(tree: object, path: str, number: int) -> Step:
    try:
        return _decode_step(tree, path)
    except ScenarioError as err:
        title = tree.get("title") if isinstance(tree, Mapping) else None
        raise ScenarioError(f"{err}{in_step(number, title if isinstance(title, str) else '')}") from err


def _decode_step(tree: object, path: str) -> Step:
    with Fields(tree, path) as fields:
        return Step(
            title=fields.take("title", text, ""),
            remove=fields.take("remove", list_of(_decode_reference), []),
            apply=fields.take("apply", list_of(_decode_manifest), []),
            label_namespaces=fields.take("labelNamespaces", list_of(_decode_namespace_labels), []),
            label_pods=fields.take("labelPods", list_of(_decode_pod_labels), []),
            flows=fields.take("flows", list_of(_decode_flow), []),
        )


def _decode_reference(tree: object, path: str) -> ObjectRef:
    with Fields(tree, path) as fields:
        return ObjectRef(
            fields.take("kind", name, "NetworkPolicy"), fields.take("namespace", name), fields.take("name", name)
        )


def _decode_manifest(tree: object, path: str) -> Manifest:
    manifest = mapping(tree, path)
    try:
        object_ref(manifest)
    except ScenarioError as err:
        raise ScenarioError(f"{path}.{err}") from err
    return manifest


def _decode_namespace_labels(tree: object, path: str) -> LabelChange:
    with Fields(tree, path) as fields:
        return LabelChange(fields.take("name", name), fields.take("labels", labels))


def _decode_pod_labels(tree: object, path: str) -> LabelChange:
    with Fields(tree, path) as fields:
        return LabelChange(str(fields.take("name", _pod_ref)), fields.take("labels", labels))


def _decode_flow(tree: object, path: str) -> Flow:
    with Fields(tree, path) as fields:
        flow = Flow(
            source=fields.take("from", name),
            target=fields.take("to", name),
            port=fields.take("port", port_number),
            is_allowed=fields.take("expect", one_of({"allow": True, "deny": False})),
            reason=fields.take("reason", one_of(_REASONS)) if fields.has("reason") else None,
            protocol=fields.take("protocol", one_of(_PROTOCOLS), "TCP"),
            version=fields.take("family", one_of({"IPv4": 4, "IPv6": 6}), "IPv4"),
        )
    if flow.is_allowed and flow.reason is not None:
        raise ScenarioError(f"{path}.reason: is for flows with expect: deny")
    return flow


def _split_pod_name(value: str) -> PodRef:
    namespace, slash, pod = value.partition("/")
    if not (namespace and slash and pod) or "/" in pod:
        raise ValueError("must be NAMESPACE/NAME")
    return PodRef(namespace, pod)


def _ip_address(value: str) -> IPAddress:
    return ip_address(value)


def _service_address(value: str) -> IPAddress:
    address = ip_address(value)
    if not any(address in network for network in SERVICE_NETWORKS):
        raise ValueError(f"{address} is not in {' or '.join(map(str, SERVICE_NETWORKS))}")
    return address


def _ip_network(value: str) -> IPNetwork:
    return ip_network(value)


_pod_ref = parsed_by(_split_pod_name)
_addresses = list_of(parsed_by(_ip_address))
_networks = list_of(parsed_by(_ip_network))
