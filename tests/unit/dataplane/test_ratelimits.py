# SPDX-License-Identifier: Apache-2.0
"""The rules that bound how fast packets are queued, as text."""

from __future__ import annotations

import re

import pytest

from enforcer_daemon.dataplane.ratelimits import QueueLimits, iptables_limits, nft_limits
from enforcer_daemon.dataplane.rules_iptables import iptables_chains
from enforcer_daemon.dataplane.rules_nft import nft_rule_counts, render_nft
from enforcer_daemon.dataplane.ruleset import EndpointRules, Family

LIMITS = QueueLimits(per_source=4_000, total=8_000)
RULES = EndpointRules(("eth0",), 47_474, frozenset(), LIMITS)
FAMILIES: tuple[Family, ...] = (4, 6)
QUEUES = "-j NFQUEUE --queue-num 47474"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rule_that_queues_stands_behind_its_rates(family: Family) -> None:
    names = []
    for chain, rules in iptables_chains(RULES, family)["mangle"].items():
        if QUEUES not in rules:
            continue
        over = [rule for rule in rules if rule.endswith("--queue-num 47475")]
        assert rules[-1 - len(over) : -1] == tuple(over)
        assert len(over) == (1 if chain.endswith("OUT") else 2)
        names += [re.findall(r"hashlimit-name (\S+)", rule)[0] for rule in over]
    assert len(names) == len(set(names)) == 8


def test_nft_counts_every_source_and_all_of_them_before_it_queues() -> None:
    text = render_nft(RULES)
    for each, families_and_directions, together in ((4_000, 4, 1), (8_000, 2, 1), (12_000, 4, 1)):
        rate = f"limit rate over {each}/second burst {each} packets"
        assert text.count(f"saddr {rate} }} queue num 47475") == families_and_directions
        rate = f"limit rate over {2 * each}/second burst {2 * each} packets"
        assert text.count(f" {rate} queue num 47475") == together
    for chain in ("main_in", "main_out", "message_in", "syn_in", "syn_out"):
        lines = [line for line in text.splitlines() if line.startswith(f"add rule inet trireme {chain} ")]
        assert len(lines) == nft_rule_counts(RULES)[chain]
        assert max(n for n, line in enumerate(lines) if "47475" in line) < min(
            n for n, line in enumerate(lines) if "47474" in line
        )


@pytest.mark.parametrize(("wanted", "kept"), [(1_000, 1_000), (3_000, 3_003), (7_000, 7_042), (600_000, 1_000_000)])
def test_a_rate_is_one_that_hashlimit_gives_back(wanted: int, kept: int) -> None:
    (rule,) = iptables_limits(QueueLimits(wanted, wanted), "syn-out", 1, is_ingress=False)
    assert f"--hashlimit-above {kept}/sec --hashlimit-burst {kept} " in rule
    (again,) = iptables_limits(QueueLimits(kept, kept), "syn-out", 1, is_ingress=False)
    assert again == rule


@pytest.mark.parametrize(("kind", "packets"), [("syn-in", 4_000), ("message-in", 8_000), ("other-out", 12_048)])
def test_a_kind_of_which_a_connection_has_more_has_a_higher_rate(kind: str, packets: int) -> None:
    rule = iptables_limits(LIMITS, kind, 1, is_ingress=False)[0]
    assert f"--hashlimit-above {packets}/sec --hashlimit-burst {packets} " in rule


def test_nft_keeps_any_rate() -> None:
    assert "limit rate over 3000/second" in nft_limits(QueueLimits(3_000, 3_000), "syn-out", 1, is_ingress=False)[0]
