# SPDX-License-Identifier: Apache-2.0
"""A small world on one machine: nodes, pods and policies, with real packets, to try and to test the enforcer."""

from __future__ import annotations

from triremectl.lab.errors import LabError, ScenarioError
from triremectl.lab.lab import Lab
from triremectl.lab.probe import Outcome, Probe, ProbeResult
from triremectl.lab.tools import Tools
from triremectl.lab.world import HostSpec, NodeSpec, PodSpec, PortSpec, ServicePort, ServiceSpec, WorldSpec

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
