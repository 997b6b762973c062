# SPDX-License-Identifier: Apache-2.0
"""How the iptables backends keep their chains: not doubled, repaired, taken away without a trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from enforcer_daemon.dataplane.backends import RulesBackend
from enforcer_daemon.dataplane.tools import run_in
from enforcer_daemon.errors import DataplaneError
from tests.netns.lab import IPTABLES, Lab, make_backend, open_lab

pytestmark = pytest.mark.kernel


@pytest.fixture(params=IPTABLES)
def backend(request: pytest.FixtureRequest) -> RulesBackend:
    return make_backend(request.param)


@pytest.fixture
def lab(backend: RulesBackend) -> Iterator[Lab]:
    with open_lab() as lab:
        backend.apply(lab.pod, lab.rules())
        yield lab


def test_rules_applied_again_are_not_doubled(lab: Lab, backend: RulesBackend) -> None:
    tool = f"{backend.name}-save"
    before = _rules(run_in(lab.pod, (tool,)))
    backend.apply(lab.pod, dataclasses.replace(lab.rules(), queue_number=7))
    backend.apply(lab.pod, lab.rules())
    assert _rules(run_in(lab.pod, (tool,))) == before
    assert sum("-j TRIREME-INGRESS" in rule for rule in before) == 1


@pytest.mark.parametrize(
    "damage",
    ["-t mangle -F TRIREME-IN", "-t mangle -D PREROUTING 1", "-t mangle -I PREROUTING 1 -j ACCEPT", "-t raw -F",
     "-t filter -A OUTPUT -j TRIREME-CLEAR"],
)  # fmt: skip
def test_damage_is_seen_and_repaired(lab: Lab, backend: RulesBackend, damage: str) -> None:
    assert backend.is_intact(lab.pod, lab.rules())
    run_in(lab.pod, (backend.name, *damage.split()))
    assert not backend.is_intact(lab.pod, lab.rules())
    backend.apply(lab.pod, lab.rules())
    assert backend.is_intact(lab.pod, lab.rules())


def test_remove_leaves_nothing_and_can_be_repeated(lab: Lab, backend: RulesBackend) -> None:
    for _ in range(2):
        backend.remove(lab.pod)
        assert not backend.is_intact(lab.pod, lab.rules())
        assert "TRIREME" not in run_in(lab.pod, (f"{backend.name}-save",))


def test_a_broken_rule_is_refused_with_what_the_tool_said(lab: Lab, backend: RulesBackend) -> None:
    with pytest.raises(DataplaneError, match="restore failed"):
        backend.apply(lab.pod, dataclasses.replace(lab.rules(), ifnames=("a" * 40,)))
    assert backend.is_intact(lab.pod, lab.rules())


def _rules(saved: str) -> list[str]:
    return [line for line in saved.splitlines() if line.startswith("-A")]
