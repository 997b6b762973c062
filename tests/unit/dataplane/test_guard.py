# SPDX-License-Identifier: Apache-2.0
"""The guard's table as text."""

from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import IPv6Address, ip_address, ip_network

import pytest

from enforcer_daemon.dataplane import guard_egress, guard_fresh, guard_masquerade, guard_spoofing, guard_vouched
from enforcer_daemon.dataplane.guard_render import render_apply, render_remove, render_replace
from enforcer_daemon.dataplane.guard_rules import ALLOWS_ALL, GuardedEndpoint, Links, without_log
from enforcer_daemon.dataplane.guard_sets import new_sets, old_sets
from enforcer_daemon.dataplane.guard_shares import endpoint_sets, first_portion
from enforcer_daemon.model import AttachmentId, Protocol
from enforcer_daemon.policy.address_rules import AddressRule

WEB = GuardedEndpoint(
    AttachmentId("c1", "eth0"),
    (ip_address("10.0.0.5"), ip_address("fd00::5")),
    (
        AddressRule(
            ip_network("10.0.0.0/8"), (ip_network("10.1.0.0/16"), ip_network("10.1.2.0/24")), Protocol.TCP, (80, 90)
        ),
        AddressRule(ip_network("fd00::/8")),
        AddressRule(protocol=Protocol.UDP),
    ),
)


CAGED = replace(WEB, egress=(AddressRule(ip_network("10.9.0.0/16"), (), Protocol.TCP, (443, 443)),))
LINKED = replace(CAGED, links=Links(("veth0",), (IPv6Address("fe80::5"),)))


(NAMED,) = endpoint_sets([WEB])


def contents(lines: list[str]) -> list[str]:
    """Return what follows the names of the endpoint's chains."""
    return [line.split(" ", 5)[5] for line in lines if line.startswith("add rule")]


def test_who_comes_masqueraded_ends_at_a_counted_drop() -> None:
    assert contents(guard_masquerade.apply_lines(None, WEB)) == [
        "meta length >= 201 tcp flags & (fin | syn | rst | ack) == syn accept",
        "ct original ip saddr 10.0.0.5 accept",
        "ct original ip6 saddr fd00::5 accept",
        f"ct original ip saddr @{NAMED} meta l4proto 6 th dport 80-90 accept",
        "ct original ip6 saddr fd00::/8 accept",
        "meta l4proto 17 accept",
        "counter goto drop_unidentified_peer",
    ]


def test_what_an_isolated_pod_sends_needs_a_rule_by_address_for_what_it_dialed_or_where_it_goes() -> None:
    """An answer is one of where it comes from."""
    assert contents(guard_egress.apply_lines(None, CAGED)) == [
        "oif != 0 jump vouched",
        "ct reply ip saddr 10.0.0.5 accept",
        "ct reply ip6 saddr fd00::5 accept",
        "ct original ip daddr 10.9.0.0/16 meta l4proto 6 ct original proto-dst 443-443 accept",
        "ct direction reply ct reply ip saddr 10.9.0.0/16 meta l4proto 6 ct reply proto-src 443-443 accept",
        "ct direction reply counter goto drop_egress_denied",
        "ip daddr 10.0.0.5 accept",
        "ip6 daddr fd00::5 accept",
        "ip daddr 10.9.0.0/16 meta l4proto 6 th dport 443-443 accept",
        "counter goto drop_egress_denied",
    ]


def test_no_frame_of_a_pod_is_believed_whose_rules_name_no_pods() -> None:
    by_address = replace(LINKED, by_identity=False)
    assert contents(guard_egress.apply_lines(None, by_address))[0] == "oif != 0 jump standalone"
    for endpoint in (LINKED, by_address):
        framed = [line for line in guard_spoofing.apply_lines(None, endpoint) if "jump framed" in line]
        assert len(framed) == len(guard_vouched.framed_syns(by_identity=endpoint.by_identity))
        assert any("@enforced4" in line for line in framed) is endpoint.by_identity
    caged = replace(by_address, egress=())
    assert [line for line in guard_spoofing.apply_lines(None, caged) if "framed" in line] == []


def test_what_no_policy_isolates_is_not_looked_up() -> None:
    assert guard_egress.apply_lines(None, WEB) == []
    assert guard_masquerade.apply_lines(None, replace(WEB, rules=ALLOWS_ALL)) == []


def test_a_link_that_stays_is_not_touched() -> None:
    moved = replace(LINKED, links=Links(("veth1",)))
    assert [line for line in guard_spoofing.apply_lines(LINKED, LINKED) if "veth" in line] == []
    verbs = [line.split()[0] for line in guard_spoofing.apply_lines(LINKED, moved) if "link_" in line]
    assert verbs == ["add", "flush", "delete", "add", "add"]


def test_no_chain_is_made_on_a_link_that_vanished() -> None:
    assert [line for line in guard_spoofing.apply_lines(None, LINKED, {"veth0"}) if "link_" in line] == []


def test_a_pod_speaks_under_its_own_addresses_alone() -> None:
    lines = guard_spoofing.apply_lines(None, replace(LINKED, egress=ALLOWS_ALL))
    elements = [line.removeprefix("add element netdev trireme_guard ") for line in lines if "element" in line]
    assert elements[:3] == [
        'senders4 { "veth0" . 10.0.0.5 }',
        'senders6 { "veth0" . fd00::5 }',
        'locals6 { "veth0" . fe80::5 }',
    ]
    assert len(elements) == 4
    assert elements[3].startswith('stated { "veth0" : jump stated_')


def test_an_endpoint_that_is_no_longer_isolated_keeps_nothing_of_it() -> None:
    lines = render_apply(CAGED, replace(CAGED, egress=ALLOWS_ALL, rules=ALLOWS_ALL), on_links=True).splitlines()
    assert [line for line in lines if line.startswith("add element")] == []
    assert len([line for line in lines if line.startswith("delete element")]) == 4
    assert len([line for line in lines if line.startswith("delete chain")]) == 3


def test_only_addresses_that_changed_are_touched() -> None:
    moved = replace(WEB, addresses=(ip_address("fd00::5"), ip_address("10.0.0.6")))
    lines = render_apply(WEB, moved, on_links=False).splitlines()
    elements = [line for line in lines if "element" in line and not re.search("fresh_|unclean", line)]
    assert elements[0] == "delete element inet trireme_guard endpoints4 { 10.0.0.5 }"
    assert elements[1].startswith("add element inet trireme_guard endpoints4 { 10.0.0.6 : goto endpoint_")
    assert elements[2:] == [
        "delete element inet trireme_guard pods4 { 10.0.0.5 }",
        "add element inet trireme_guard pods4 { 10.0.0.6 }",
        "delete element inet trireme_guard own4 { 10.0.0.5 }",
        "add element inet trireme_guard own4 { 10.0.0.6 }",
    ]
    assert {line.split("{ ")[1].split()[0] for line in lines if "fresh_" in line} == {"10.0.0.5", "10.0.0.6"}


def test_an_address_is_fresh_for_as_long_as_its_releases_elsewhere_may_last() -> None:
    lines = guard_fresh.freshen_lines([ip_address("10.0.0.5")])
    assert [line.replace("element inet trireme_guard ", "") for line in lines] == [
        "add fresh_tcp4 { 10.0.0.5 timeout 600s }",
        "delete fresh_tcp4 { 10.0.0.5 }",
        "add fresh_udp4 { 10.0.0.5 timeout 120s }",
        "delete fresh_udp4 { 10.0.0.5 }",
        "add fresh_tcp4 { 10.0.0.5 timeout 600s }",
        "add fresh_udp4 { 10.0.0.5 timeout 120s }",
    ]


def test_an_unclean_address_is_so_for_as_long_as_it_is_fresh() -> None:
    lines = guard_fresh.freshen_lines([ip_address("10.0.0.5")], is_clean=False)
    assert lines[-1] == "add element inet trireme_guard unclean4 { 10.0.0.5 timeout 600s }"


def test_an_endpoint_that_stays_as_it_was_is_not_fresh_again() -> None:
    assert [line for line in render_apply(WEB, CAGED, on_links=False).splitlines() if "fresh" in line] == []


def test_a_kernel_that_does_not_log_gets_all_other_rules() -> None:
    lines = render_replace([WEB], [ip_network("10.0.0.0/8")], on_links=False).splitlines()
    left = without_log(lines)
    assert {line.split()[4] for line in lines if line not in left} == {
        "drop_egress_denied",
        "drop_unknown_flow",
        "stray",
    }
    assert [line for line in left if " log " in line] == []


def test_remove_takes_elements_before_the_chains_they_lead_to() -> None:
    lines = render_remove(LINKED, on_links=True).splitlines()
    for prefix in ("endpoint_", "egress_", "stated_", "syn_"):
        (deleted,) = [at for at, line in enumerate(lines) if line.startswith("delete chain") and prefix in line]
        family = lines[deleted].split()[2]
        assert max(at for at, line in enumerate(lines) if line.startswith(f"delete element {family}")) > 0
        chains = {"endpoint_": "endpoints", "egress_": "sources", "stated_": "stated", "syn_": "opened"}
        assert all(at < deleted for at, line in enumerate(lines) if f" {chains[prefix]}" in line and "element" in line)


def test_the_rate_of_syns_stands_before_all_else() -> None:
    sent = [
        line for line in guard_spoofing.skeleton((), 500) if line.startswith(f"add rule {guard_spoofing.TABLE} sent")
    ]
    assert sent[0].split(" ", 5)[5] == (
        "tcp flags & syn == syn update @openings { iifname limit rate over 500/second burst 500 packets } "
        "counter goto drop_packet_rate"
    )


def test_replace_begins_with_nothing() -> None:
    lines = render_replace((), (), on_links=True, node_addresses=(ip_address("fd00::1"),)).splitlines()
    assert "add element inet trireme_guard node6 { fd00::1 }" in lines
    assert lines[:3] == [f"{verb} table netdev trireme_guard" for verb in ("add", "delete", "add")]
    assert lines[3:6] == [f"{verb} table inet trireme_guard" for verb in ("add", "delete", "add")]


def test_the_first_transaction_has_all_endpoints_but_not_the_rules_of_the_largest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("enforcer_daemon.dataplane.guard_shares.MAX_REPLACED", 12)
    large = replace(CAGED, attachment=AttachmentId("c0", "eth0"), rules=WEB.rules * 3)

    first, second = first_portion([large, CAGED])

    assert first == CAGED
    assert second == replace(large, rules=(), egress=())
    assert first_portion([replace(large, egress=ALLOWS_ALL)])[0].egress == ALLOWS_ALL


def test_a_set_is_made_once_however_many_pods_and_rules_compare_with_it() -> None:
    others = [replace(WEB, attachment=AttachmentId(f"c{number}", "eth0")) for number in range(3)]
    lines = render_replace(others, (), on_links=False).splitlines()
    made = [line for line in lines if line.startswith(f"add set inet trireme_guard {NAMED} ")]
    definition = "{ type ipv4_addr; flags interval; elements = { 10.0.0.0-10.0.255.255, 10.2.0.0-10.255.255.255 }; }"
    assert made == [f"add set inet trireme_guard {NAMED} {definition}"]
    assert sum(f"@{NAMED}" in line for line in lines) >= 3


def test_sets_are_made_before_their_rules_and_taken_away_when_none_uses_them() -> None:
    before, after = endpoint_sets([WEB]), endpoint_sets([replace(WEB, rules=())])
    assert new_sets(["inet t"], {}, before) == [f"add set inet t {NAMED} {before[NAMED]}"]
    assert new_sets(["inet t"], before, before) == old_sets(["inet t"], before, before) == []
    assert old_sets(["inet t", "netdev t"], before, after) == [f"delete set {t} t {NAMED}" for t in ("inet", "netdev")]
