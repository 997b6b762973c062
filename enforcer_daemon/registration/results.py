# SPDX-License-Identifier: Apache-2.0
"""The runtime's own records of its pods: libcni's result cache, one file for each attachment. Pure.

libcni writes a file after the last plugin of an ADD and removes it after a DEL, whether or not our plugin was in the
chain. Source: libcni/api.go, cachedInfo ("cniCacheV1"); `netns` is there from libcni 1.2 on. Earlier ones leave it to
the interfaces' `sandbox` in the result, which many plugins fill in, to say where the pod is.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cni_plugin import messages
from cni_plugin.result import read_prev_result
from cni_plugin.spec import CniError
from enforcer_daemon.registration.request import AddRequest, decode_add

KIND = "cniCacheV1"
POD_INTERFACE = "eth0"
"""What kubelet's runtimes call a pod's interface; others are secondary networks, whose chains lack our plugin."""
_PLUGIN = "trireme"


@dataclass(frozen=True, slots=True)
class CachedResult:
    """A pod's attachment as the runtime remembers it."""

    request: AddRequest
    """As our plugin would have sent it; `netns_path` is empty."""
    paths: tuple[str, ...]
    """Where the pod's namespace is said to be, if anywhere."""


def decode_cached(data: bytes) -> CachedResult | None:
    """Read one file; None if it is not of a pod that is to be enforced. Raise MessageError that names the field."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as err:
        raise messages.MessageError(f"not JSON: {err}") from err
    if not isinstance(tree, dict) or tree.get("kind") != KIND:
        return None  # a result of libcni before 0.8, which does not say whose it is
    arguments = _arguments(tree.get("cniArgs"))
    namespace, name = arguments.get("K8S_POD_NAMESPACE", ""), arguments.get("K8S_POD_NAME", "")
    ifname = tree.get("ifName")
    if not namespace or not name or ifname != POD_INTERFACE or _is_passed_through(tree.get("config"), namespace):
        return None
    container_id, network, result = tree.get("containerId"), tree.get("networkName"), tree.get("result")
    if not isinstance(container_id, str) or messages.container_id_fault(container_id):
        raise messages.MessageError("containerId: must be a container's id")
    if not isinstance(network, str) or messages.network_fault(network):
        raise messages.MessageError("networkName: must be a network's name")
    if not isinstance(result, dict):
        raise messages.MessageError("result: must be an object")
    try:
        found = read_prev_result(result, ifname)
    except CniError as err:
        raise messages.MessageError(err.message.replace("prevResult", "result")) from err
    message = messages.Add(
        attachment=messages.Attachment(container_id, ifname),
        netns_path="",
        network=network,
        namespace=namespace,
        pod=name,
        uid=arguments.get("K8S_POD_UID", ""),
        labels={},
        ips=found.ips,
        host_interfaces=found.host_interfaces,
        mtu=found.mtu,
    )
    return CachedResult(decode_add(message), _paths(tree.get("netns"), result))


def _arguments(pairs: object) -> dict[str, str]:
    if not isinstance(pairs, list):
        return {}
    return {
        pair[0]: pair[1]
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
    }


def _is_passed_through(config: object, namespace: str) -> bool:
    """Tell a pod that our plugin saw at its ADD and was told not to enforce; or one whose chain begins with Multus."""
    plugins = _plugins(config)
    if plugins and plugins[0].get("type") == "multus":
        return True  # The file of the network that Multus handed the pod on to says the same and more.
    excluded = [plugin.get("excludedNamespaces") for plugin in plugins if plugin.get("type") == _PLUGIN]
    return any(isinstance(names, list) and namespace in names for names in excluded)


def _plugins(config: object) -> list[Mapping[str, Any]]:
    """Read the chain of the ADD, which is there in base64; an unreadable one says nothing."""
    if not isinstance(config, str):
        return []
    try:
        tree = json.loads(base64.b64decode(config, validate=True))
    except (binascii.Error, ValueError, RecursionError):
        return []
    plugins = tree.get("plugins", [tree]) if isinstance(tree, dict) else []
    return [plugin for plugin in plugins if isinstance(plugin, dict)] if isinstance(plugins, list) else []


def _paths(netns: object, result: Mapping[str, Any]) -> tuple[str, ...]:
    listed = result.get("interfaces")
    interfaces = listed if isinstance(listed, list) else []
    named = [netns, *(entry.get("sandbox") for entry in interfaces if isinstance(entry, dict))]
    return tuple(dict.fromkeys(path for path in named if isinstance(path, str) and path.startswith("/")))
