# SPDX-License-Identifier: Apache-2.0
"""The CNI configuration of a lab node: the shipped chain with this node's networks and directories. Pure but for
reading the shipped file."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from enforcer_daemon.model import IPNetwork
from trireme_lab.errors import LabError
from trireme_lab.network import ROUTED_GATEWAY_V6

SHIPPED_CONFLIST = Path(__file__).with_name("10-trireme.conflist")
TRIREME = "trireme"
"""Type of our plugin's entry."""
ADD_TIMEOUT_S = 45
"""How long a pod waits for its registration, unless the given chain says it: an emulated machine is slow."""


def load_conflist(path: Path) -> dict[str, Any]:
    """Read a conflist; raise LabError that names the file."""
    try:
        conflist = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise LabError(f"{path}: {err}") from err
    if not isinstance(conflist, dict) or not isinstance(conflist.get("plugins"), list):
        raise LabError(f"{path}: plugins: must be a list")
    return conflist


def node_conflist(
    shipped: Mapping[str, Any],
    networks: Sequence[IPNetwork],
    ipam_dir: Path,
    run_dir: Path,
    *,
    is_enforced: bool,
    is_routed: bool = False,
) -> dict[str, Any]:
    """Return the chain for one node: its networks in the IPAM, its daemon's sockets, nothing shared with others.

    With `is_routed` the runtime gives each pod its addresses, and the pod sends everything to the node. Without
    enforcement our plugin's entry is left out; all else stays, so that the two worlds can be compared.
    """
    conflist: dict[str, Any] = copy.deepcopy(dict(shipped))
    plugins = [p for p in conflist["plugins"] if is_enforced or p.get("type") != TRIREME]
    for plugin in plugins:
        if plugin.get("type") == TRIREME:
            plugin["runDir"] = str(run_dir)
            plugin.setdefault("addTimeoutSeconds", ADD_TIMEOUT_S)
        if "ipam" in plugin and is_routed:
            plugin |= {"isGateway": False, "ipam": _routed_ipam(networks)}
        elif "ipam" in plugin:
            default = {4: "0.0.0.0/0", 6: "::/0"}
            versions = sorted({network.version for network in networks})
            plugin["ipam"] = {
                **plugin["ipam"],
                "ranges": [[{"subnet": str(network)}] for network in networks],
                "routes": [{"dst": default[version]} for version in versions],
                "dataDir": str(ipam_dir),
            }
    conflist["plugins"] = plugins
    return conflist


def _routed_ipam(networks: Sequence[IPNetwork]) -> dict[str, Any]:
    routes = {4: {"dst": "0.0.0.0/0"}, 6: {"dst": "::/0", "gw": ROUTED_GATEWAY_V6}}
    return {"type": "static", "routes": [routes[version] for version in sorted({n.version for n in networks})]}
