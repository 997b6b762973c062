# SPDX-License-Identifier: Apache-2.0
"""What can go wrong in a lab: the world could not be built, or the scenario is not well formed."""

from __future__ import annotations


class LabError(Exception):
    """The lab cannot do what it was asked; the text says what failed and what the failing command wrote."""


class ScenarioError(LabError):
    """The scenario file is wrong; the text begins with the path of the field."""
