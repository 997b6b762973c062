# SPDX-License-Identifier: Apache-2.0
"""The rules as text."""

from __future__ import annotations

import re
from ipaddress import ip_address

import pytest

from enforcer_daemon.dataplane.backends import parse_saved
from enforcer_daemon.dataplane.ratelimits import QueueLimits
from enforcer_daemon.dataplane.rules_iptables import iptables_chains, render_iptables, render_iptables_addresses
from enforcer_daemon.dataplane.rules_nft import nft_rule_counts, render_nft, render_nft_addresses
from enforcer_daemon.dataplane.ruleset import FAMILIES, EndpointRules, Family

RULES = EndpointRules(
    ifnames=("eth0", "net1"),
    queue_number=47474,
    node_addresses=frozenset(map(ip_address, ("10.0.0.9", "10.0.0.1", "fd00::1"))),
    limits=QueueLimits(per_source=4_000, total=8_000),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_packet_that_nothing_lets_through_is_queued_without_bypass(family: Family) -> None:
    mangle = iptables_chains(RULES, family)["mangle"]
    for chain in ("TRIREME-IN", "TRIREME-OUT", "TRIREME-SYN-IN", "TRIREME-SYN-OUT", "TRIREME-MESSAGE-IN"):
        assert mangle[chain][-1] == "-j NFQUEUE --queue-num 47474"
    nft = render_nft(RULES)
    assert nft.count("queue num 47474\n") == 8
    assert "bypass" not in nft + render_iptables(RULES, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_syn_is_sent_off_before_a_released_flow_is_let_through(family: Family) -> None:
    for chain, syn_chain in (("TRIREME-IN", "TRIREME-SYN-IN"), ("TRIREME-OUT", "TRIREME-SYN-OUT")):
        rules = iptables_chains(RULES, family)["mangle"][chain]
        syn = rules.index(f"-p tcp -m tcp --tcp-flags SYN SYN -g {syn_chain}")
        assert syn < rules.index("-m connmark ! --mark 0x0/0xc0000000 -j RETURN")


def test_each_registered_interface_and_no_other_leads_to_the_rules() -> None:
    mangle = iptables_chains(RULES, 4)["mangle"]
    assert mangle["TRIREME-INGRESS"] == ("-i eth0 -g TRIREME-IN", "-i net1 -g TRIREME-IN")
    assert mangle["TRIREME-EGRESS"] == ("-o eth0 -g TRIREME-OUT", "-o net1 -g TRIREME-OUT")


def test_the_text_names_each_family_its_own_addresses_in_order() -> None:
    assert render_iptables_addresses(RULES.node_addresses, 4).splitlines() == [
        "*mangle",
        ":TRIREME-FROM-NODE - [0:0]",
        ":TRIREME-TO-NODE - [0:0]",
        "-A TRIREME-FROM-NODE -s 10.0.0.1/32 -j MARK --set-xmark 0x40000000/0x40000000",
        "-A TRIREME-FROM-NODE -s 10.0.0.9/32 -j MARK --set-xmark 0x40000000/0x40000000",
        "-A TRIREME-TO-NODE -d 10.0.0.1/32 -j MARK --set-xmark 0x40000000/0x40000000",
        "-A TRIREME-TO-NODE -d 10.0.0.9/32 -j MARK --set-xmark 0x40000000/0x40000000",
        "COMMIT",
    ]
    assert render_nft_addresses(RULES.node_addresses).splitlines() == [
        "flush set inet trireme node4",
        "add element inet trireme node4 { 10.0.0.1, 10.0.0.9 }",
        "flush set inet trireme node6",
        "add element inet trireme node6 { fd00::1 }",
    ]


def test_a_node_without_addresses_gives_empty_sets() -> None:
    assert render_nft_addresses(()) == "flush set inet trireme node4\nflush set inet trireme node6\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mark_is_written_under_a_mask_of_ours(family: Family) -> None:
    for rule in render_iptables(RULES, family).splitlines():
        if "MARK --set-xmark" in rule:
            assert re.search(r"/0x(fffff000|40000000|20000000)$", rule)
        if rule.startswith("-A TRIREME-CONSUME") and "save-mark" in rule:
            assert rule.endswith("--nfmask 0x9ffff000 --ctmask 0xfffff000")
        elif "save-mark" in rule or "restore-mark" in rule:
            assert rule.endswith("--nfmask 0xfffff000 --ctmask 0xfffff000")


def test_nft_makes_chains_but_never_deletes_one() -> None:
    text = render_nft(RULES)
    assert "delete" not in text
    assert text.count("type filter hook") == 5
    assert sum(nft_rule_counts(RULES).values()) == text.count("add rule")


def test_saved_rules_are_read_by_table_whatever_protocols_are_called() -> None:
    saved = "# comment\n*mangle\n:X - [0:0]\n-A X -p 58 -j RETURN\n-A X ! -p 6 -j Y\nCOMMIT\n*raw\nCOMMIT\n"
    assert parse_saved(saved) == {"mangle": ["X -p ipv6-icmp -j RETURN", "X ! -p tcp -j Y"], "raw": []}
