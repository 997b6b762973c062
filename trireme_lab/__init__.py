# SPDX-License-Identifier: Apache-2.0
"""A small world on one machine: nodes, pods and policies, with real packets, to try and to test the enforcer."""

from __future__ import annotations

from trireme_lab.errors import LabError, ScenarioError
from trireme_lab.lab import Lab
from trireme_lab.probe import Outcome, Probe, ProbeResult
from trireme_lab.tools import Tools
from trireme_lab.world import HostSpec, NodeSpec, PodSpec, PortSpec, ServicePort, ServiceSpec, WorldSpec

__all__ = [
    "HostSpec",
    "Lab",
    "LabError",
    "NodeSpec",
    "Outcome",
    "PodSpec",
    "PortSpec",
    "Probe",
    "ProbeResult",
    "ScenarioError",
    "ServicePort",
    "ServiceSpec",
    "Tools",
    "WorldSpec",
]
