# SPDX-License-Identifier: Apache-2.0
"""All limits of the daemon that are no settings, as one value: each part belongs to the module that keeps to it.

The daemon runs with the defaults. Tests construct others, to reach a limit with few packets or within a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from enforcer_daemon.dataplane.queue import QueueSizes
from enforcer_daemon.handshake.leasepairs import LeaseTimes
from enforcer_daemon.handshake.limits import HandshakeLimits
from enforcer_daemon.kube.limits import ClusterLimits
from enforcer_daemon.kube.placement import PlacementLimits
from enforcer_daemon.telemetry.events import EventLimits


@dataclass(frozen=True, slots=True)
class DaemonLimits:
    """Frozen after the start."""

    handshake: HandshakeLimits = field(default_factory=HandshakeLimits)
    leases: LeaseTimes = field(default_factory=LeaseTimes)
    queue: QueueSizes = field(default_factory=QueueSizes)
    cluster: ClusterLimits = field(default_factory=ClusterLimits)
    events: EventLimits = field(default_factory=EventLimits)
    placement: PlacementLimits = field(default_factory=PlacementLimits)
    discovery_interval_s: float = 30.0
    """How often pods that started without the plugin are looked for after the start, seconds. A look reads
    one directory; a pod is enforced at the second look that finds it (docs/registration.md)."""


DEFAULT_LIMITS = DaemonLimits()
