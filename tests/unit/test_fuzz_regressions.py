# SPDX-License-Identifier: Apache-2.0
"""What fuzzing is started with, and what it found: each file through its target, without a fuzzer."""

from __future__ import annotations

from pathlib import Path

import pytest

from enforcer_daemon.handshake import session
from tests.fuzz.datagrams import datagrams
from tests.fuzz.exchange import exchange
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


@pytest.mark.parametrize(
    ("seed", "finding"),
    [
        ("forged", "without the initiator's proof"),
        ("changed-answer", "an answer that the server's enforcer never gave"),
    ],
)
def test_an_exchange_notices_an_enforcer_that_believes_any_proof(
    seed: str, finding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = (path for path in seeds("exchange") if path.name == seed)
    exchange(path.read_bytes())
    monkeypatch.setattr(session, "require_equal", lambda one, other: None)
    with pytest.raises(AssertionError, match=finding):
        exchange(path.read_bytes())


@pytest.mark.parametrize(
    ("seed", "finding"),
    [
        ("forged-proof", "without the initiator's proof"),
        ("changed-answer", "an answer that the server's enforcer never gave"),
    ],
)
def test_flows_of_datagrams_notice_an_enforcer_that_believes_any_proof(
    seed: str, finding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = (path for path in seeds("datagrams") if path.name == seed)
    datagrams(path.read_bytes())
    monkeypatch.setattr(session, "require_equal", lambda one, other: None)
    with pytest.raises(AssertionError, match=finding):
        datagrams(path.read_bytes())
