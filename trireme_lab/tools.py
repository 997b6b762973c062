# SPDX-License-Identifier: Apache-2.0
"""The programs that a lab is made of."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from trireme_lab.chain import SHIPPED_CONFLIST

_PLUGIN_DIRS = ("/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni")


def _beside_python(name: str) -> Path:
    return Path(sys.executable).parent / name


@dataclass(frozen=True, slots=True)
class Tools:
    """Where the programs are, and how patient the lab is with them."""

    plugin: Path = field(default_factory=lambda: _beside_python("trireme"))
    """The CNI plugin, a file named `trireme`; default: the script beside the Python that runs the lab."""
    enforcer: tuple[str, ...] = field(default_factory=lambda: (str(_beside_python("trireme-enforcer")),))
    """The daemon's command; ` --config FILE` is appended."""
    reference_plugins: tuple[Path, ...] = field(
        default_factory=lambda: tuple(Path(path) for path in _PLUGIN_DIRS if Path(path).is_dir())
    )
    """Where bridge, host-local and portmap are."""
    conflist: Path = SHIPPED_CONFLIST
    """The chain that pods are made by."""
    probe_timeout_s: float = 3.0
    """How long a client waits, seconds; conformance suites wait three."""
    concurrent_probes: int = 64
    """Denied probes take the whole timeout, so many run at once."""
