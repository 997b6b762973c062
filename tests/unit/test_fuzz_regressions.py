# SPDX-License-Identifier: Apache-2.0
"""What fuzzing is started with, and what it found: each file through its target, without a fuzzer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, Target, cost_s, regressions, seeds

CASES = [
    pytest.param(target, path, id=f"{name}/{path.name}") for name, target in TARGETS.items() for path in seeds(name)
]


@pytest.mark.parametrize(("target", "path"), CASES)
def test_every_known_input_is_a_value_or_its_error(target: Target, path: Path) -> None:
    # A budget is for a machine of its own; what is ten times as slow is another kind of algorithm.
    assert cost_s(target, path.read_bytes()) < 10 * target.budget_s


def test_every_target_has_seeds_and_every_folder_a_target() -> None:
    fuzz = Path(__file__).parents[1] / "fuzz"
    assert {path.name for path in (fuzz / "corpus").iterdir()} == set(TARGETS)
    assert {path.name for path in (fuzz / "regressions").iterdir()} <= set(TARGETS)
    assert all(set(seeds(name)) > set(regressions(name)) for name in TARGETS)
