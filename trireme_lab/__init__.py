# SPDX-License-Identifier: Apache-2.0
"""A small world on one machine: nodes, pods and policies, with real packets, to try and to test the enforcer."""

from __future__ import annotations

from trireme_lab.errors import LabError, ScenarioError
from trireme_lab.lab import Lab
from trireme_lab.probe import Outcome, Probe, ProbeResult
from trireme_lab.spec import HostSpec, LabSpec, NodeSpec, PodSpec, PortSpec, ServicePort, ServiceSpec
from trireme_lab.tools import Tools

__all__ = [
    "HostSpec",
    "Lab",
    "LabError",
    "LabSpec",
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
]
