# SPDX-License-Identifier: Apache-2.0
"""Where distributions keep CNI configurations and plugins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_OWN_BIN = Path("/var/lib/trireme/cni-bin")
"""For systems whose plugin directory is read-only; the runtime's settings must name it as well."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A distribution's directories, as the node sees them."""

    conf_dir: Path
    bin_dir: Path
    runtime_configs: tuple[Path, ...] = (Path("/etc/containerd/config.toml"), Path("/etc/crio"))
    """Files and directories in which containerd's and CRI-O's settings are looked for."""


_NET_D = Path("/etc/cni/net.d")
_K3S = Path("/var/lib/rancher/k3s")
_RKE2 = Path("/var/lib/rancher/rke2")
_MICROK8S = Path("/var/snap/microk8s/current")

LAYOUTS = {
    "default": Layout(_NET_D, Path("/opt/cni/bin")),
    "debian": Layout(_NET_D, Path("/usr/lib/cni")),
    "k3s": Layout(_K3S / "agent/etc/cni/net.d", _K3S / "data/cni", (_K3S / "agent/etc/containerd/config.toml",)),
    "rke2": Layout(_NET_D, Path("/opt/cni/bin"), (_RKE2 / "agent/etc/containerd/config.toml",)),
    "kind": Layout(_NET_D, Path("/opt/cni/bin")),
    "gke": Layout(_NET_D, Path("/home/kubernetes/bin")),
    "microk8s": Layout(
        _MICROK8S / "args/cni-network", _MICROK8S / "opt/cni/bin", (_MICROK8S / "args/containerd.toml",)
    ),
    "bottlerocket": Layout(_NET_D, _OWN_BIN),
    "flatcar": Layout(_NET_D, _OWN_BIN),
    "talos": Layout(_NET_D, _OWN_BIN, (Path("/etc/cri/containerd.toml"), Path("/etc/cri/conf.d"))),
}


def runtime_configs(name: str) -> tuple[Path, ...]:
    """Return where a layout's node has its runtime's settings; for `default`, all places."""
    if name != "default":
        return LAYOUTS[name].runtime_configs
    return tuple(dict.fromkeys(path for layout in LAYOUTS.values() for path in layout.runtime_configs))
