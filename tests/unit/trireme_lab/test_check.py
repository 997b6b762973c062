# SPDX-License-Identifier: Apache-2.0
"""Cases on the wire, without the wire: who shares a world, who is where, what is dialed, and what is counted."""

from __future__ import annotations

import json
from collections import Counter
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from enforcer_daemon.model import PodRef
from enforcer_daemon.sources.directory import DirectorySource
from trireme_lab.chain import SHIPPED_CONFLIST, load_conflist, node_conflist
from trireme_lab.check.dial import Dial, Unprobed, dial_of
from trireme_lab.check.objects import TURN_NAMESPACE, case_file
from trireme_lab.check.plan import SharedLab, layout_of, sample, share_labs, spec_of
from trireme_lab.check.run import Attempt, CaseResult
from trireme_lab.check.score import Score
from trireme_lab.errors import ScenarioError
from trireme_lab.links import AddRoute
from trireme_lab.network import POD_BRIDGE, routed_bridge_steps
from trireme_lab.probe import Outcome, ProbeResult
from trireme_lab.why import Denial
from triremectl.cases import Case, decode_case

OWN_CASES = Path(__file__).parents[2] / "vectors" / "cases" / "wire.jsonl"
WEB = {"namespace": "x", "name": "web", "ip": "10.0.0.1", "labels": {"app": "web"}}
DB = {"namespace": "x", "name": "db", "ips": ["172.20.0.9", "fd00::9"], "labels": {},
      "containerPorts": [{"name": "sql", "port": 5432}, {"name": "sql", "port": 53, "protocol": "UDP"}]}  # fmt: skip
NODES = [{"name": "n1", "ip": "192.168.60.11"}, {"name": "n2", "ip": "192.0.2.2"}]
POLICY = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "p", "namespace": "x"},
    "spec": {
        "podSelector": {},
        "ingress": [{"from": [{"ipBlock": {"cidr": "10.1.2.3/8", "except": ["10.1.2.3/16"]}}]}],
    },
}


def _probe(source: str, destination: str, port: int | str = 80, **fields: str) -> dict[str, Any]:
    return {"from": source, "to": destination, "port": port, "protocol": "TCP", "expected": "allow", **fields}


def _case(name: str = "c", **fields: object) -> Case:
    return decode_case({"name": name, "namespaces": [{"name": "x"}], "pods": [WEB, DB], "policies": [], **fields})


def _dial(case: Case) -> Dial | Unprobed:
    return dial_of(layout_of(case), case, case.probes[0])


def _names(worlds: list[SharedLab]) -> list[list[str]]:
    return [[case.name for case in world.cases] for world in worlds]


def test_cases_share_a_world_unless_a_name_or_an_address_means_two_things() -> None:
    moved, usurper = {**WEB, "ip": "10.0.0.2"}, {**WEB, "name": "other"}
    worlds = share_labs(
        [
            _case("first"),
            _case("labels differ", pods=[{**WEB, "labels": {"app": "else"}}]),
            _case("moved", pods=[moved]),
            _case("usurper", pods=[usurper]),
            _case("another pod", pods=[{**WEB, "name": "more", "ip": "10.0.0.7"}]),
            _case("a host where a pod was", pods=[DB], probes=[_probe("10.0.0.1", "x/db")]),
            _case("elsewhere", pods=[{**WEB, "node": "n1"}]),
        ]
    )
    assert _names(worlds) == [
        ["first", "labels differ", "another pod"],
        ["moved", "usurper"],
        ["a host where a pod was"],
        ["elsewhere"],
    ]


def test_steps_of_a_sequence_run_in_order_in_one_world() -> None:
    steps = [_case(f"s{step}", sequence={"id": "q", "step": step, "of": 3}) for step in (2, 3, 1)]
    assert _names(share_labs([_case("a"), steps[0], _case("b"), *steps[1:]])) == [["a", "s1", "s2", "s3", "b"]]


def test_a_sequence_that_moves_a_pod_runs_in_several_worlds() -> None:
    moved = {**WEB, "ip": "10.0.0.2"}
    steps = [_case(f"s{n}", pods=[p], sequence={"id": "q", "step": n, "of": 2}) for n, p in ((1, WEB), (2, moved))]
    assert _names(share_labs(steps)) == [["s1"], ["s2"]]


def test_one_address_of_two_pods_is_refused() -> None:
    with pytest.raises(ScenarioError, match=r"address 10\.0\.0\.1: of x/web and of x/other"):
        layout_of(_case(pods=[WEB, {**WEB, "name": "other"}]))


def test_a_sample_is_the_same_for_the_same_seed_and_keeps_sequences_whole() -> None:
    cases = [_case(f"c{n}", sequence={"id": f"q{n // 3}", "step": n, "of": 3}) for n in range(30)]
    chosen = sample(cases, 7, seed=5)
    assert [case.name for case in sample(reversed(cases), 7, seed=5)] == [case.name for case in chosen]
    assert len(chosen) == 9
    assert all(len({case.objects.sequence for case in chosen[i : i + 3]}) == 1 for i in (0, 3, 6))
    assert [case.name for case in sample(cases, 7, seed=6)] != [case.name for case in chosen]
    assert len(sample(cases, 100, seed=5)) == 30


def test_pods_without_a_node_are_spread_and_have_routes_of_their_own() -> None:
    world = spec_of(layout_of(_case(probes=[_probe("203.0.113.9", "x/db"), _probe("fd01::5", "x/db")])), "reset")
    assert [(spec.pod, spec.node) for spec in world.pods] == [
        (PodRef("x", "web"), "spare-1"), (PodRef("x", "db"), "spare-2"),
    ]  # fmt: skip
    assert [node.pod_networks for node in world.nodes] == [
        (ip_network("10.0.0.1/32"),),
        (ip_network("172.20.0.9/32"), ip_network("fd00::9/128")),
    ]
    assert [(host.name, str(host.addresses[0])) for host in world.hosts] == [
        ("203.0.113.9", "203.0.113.9"), ("fd01--5", "fd01::5"),
    ]  # fmt: skip


def test_nodes_have_the_addresses_of_the_case_and_others_do_not_take_them() -> None:
    nodes = spec_of(layout_of(_case(pods=[{**WEB, "node": "n1"}, DB], nodes=NODES)), "drop").nodes
    assert [node.name for node in nodes] == ["n1", "n2", "spare-1", "spare-2"]
    assert [ip_address("192.168.60.11") in node.addresses for node in nodes] == [True, False, False, False]
    assert nodes[1].addresses[0] == ip_address("192.0.2.2")
    assert all({address.version for address in node.addresses} == {4, 6} for node in nodes)


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        (_probe("x/web", "x/db"), ("x/web", "10.0.0.1", "x/db", "172.20.0.9", 80)),
        (_probe("x/db", "x/web"), ("x/db", "172.20.0.9", "x/web", "10.0.0.1", 80)),
        (_probe("x/web", "x/db", "sql"), ("x/web", "10.0.0.1", "x/db", "172.20.0.9", 5432)),
        (_probe("x/web", "x/db", "sql", protocol="UDP"), ("x/web", "10.0.0.1", "x/db", "172.20.0.9", 53)),
        (_probe("fd01::5", "x/db"), ("host:fd01--5", "fd01::5", "x/db", "fd00::9", 80)),
        (_probe("fd01::5", "fd00::9", "sql"), ("host:fd01--5", "fd01::5", "x/db", "fd00::9", 5432)),
        (_probe("192.0.2.2", "x/web"), ("node:n2", "192.0.2.2", "x/web", "10.0.0.1", 80)),
        (_probe("x/agent", "x/web"), ("node:n2", "192.0.2.2", "x/web", "10.0.0.1", 80)),
        (_probe("x/web", "127.0.0.1"), ("x/web", None, "x/web", "127.0.0.1", 80)),
        (_probe("x/db", "::1", "sql"), ("x/db", None, "x/db", "::1", 5432)),
    ],
)
def test_a_probe_is_dialled_between_places(probe: dict[str, Any], expected: tuple[Any, ...]) -> None:
    agent = {"namespace": "x", "name": "agent", "ip": "192.0.2.2", "hostNetwork": True}
    dial = _dial(_case(pods=[WEB, DB, agent], nodes=NODES, probes=[probe]))
    assert isinstance(dial, Dial)
    source = None if dial.source_address is None else str(dial.source_address)
    assert (dial.source, source, dial.target, str(dial.address), dial.port) == expected


def test_what_cannot_be_dialled_has_its_reason() -> None:
    ended = {**WEB, "name": "job", "ip": "10.0.0.8", "phase": "Failed"}
    assert _dial(_case(probes=[_probe("x/db", "x/web", "sql")])) is Unprobed.NO_SUCH_PORT
    assert _dial(_case(pods=[WEB, ended], probes=[_probe("x/job", "x/web")])) is Unprobed.ENDED_POD
    assert _dial(_case(probes=[_probe("x/web", "203.0.113.9", "sql")])) is Unprobed.NO_SUCH_PORT


def test_ends_of_different_families_are_an_error() -> None:
    with pytest.raises(ScenarioError, match="no addresses of one family"):
        _dial(_case(probes=[_probe("fd01::5", "x/web")]))


def test_a_case_is_one_file_that_the_daemon_reads(tmp_path: Path) -> None:
    case = _case(namespaces=[{"name": "x", "labels": {"team": "a"}}], policies=[POLICY], requires=["legacy-cidr"])
    (tmp_path / "case.json").write_text(json.dumps(case_file(case, {PodRef("x", "db")}, turn=7)))
    world = DirectorySource(tmp_path).read()
    assert world.problems == ()
    assert list(world.pods) == [PodRef("x", "db")]
    assert {(port.name, port.number) for port in world.pods[PodRef("x", "db")].named_ports} == {
        ("sql", 5432),
        ("sql", 53),
    }
    assert world.labels_of("x")["team"] == "a"
    assert world.labels_of(TURN_NAMESPACE)["turn"] == "7"
    assert len(world.policies) == 1


def test_cidrs_are_left_alone_unless_the_case_is_old() -> None:
    fine = json.loads(json.dumps(POLICY).replace("10.1.2.3/8", "10.0.0.0/8").replace("10.1.2.3/16", "10.1.0.0/16"))
    old, new = _case(policies=[POLICY], requires=["legacy-cidr"]), _case(policies=[fine])
    written = [case_file(case, (), turn=1)["items"] for case in (old, new)]
    assert written[0] == written[1]


def _attempt(case: Case, outcome: Outcome, **fields: Any) -> Attempt:
    dial = _dial(case)
    assert isinstance(dial, Dial)
    return Attempt(case.probes[0], dial, ProbeResult(outcome), **fields)


@pytest.mark.parametrize(
    ("expected", "outcomes"),
    [
        ("allow", [Outcome.CONNECTED]),
        ("deny", [Outcome.REFUSED, Outcome.TIMED_OUT, Outcome.RESET]),
    ],
)
def test_cut_connections_and_missing_routes_are_never_as_expected(expected: str, outcomes: list[Outcome]) -> None:
    case = _case(probes=[_probe("x/web", "x/db", expected=expected)])
    assert {o for o in Outcome if _attempt(case, o).is_as_expected} == set(outcomes)


def test_the_score_tells_differences_and_counts_the_rest() -> None:
    case = _case(probes=[_probe("x/web", "x/db")])
    score = Score()
    denial = Denial("x/db", "ingress", "ingress-denied", ("x/p",))
    unprobed = Counter({"SCTP": 1, "UDP": 2, "a reason": 1})
    good = CaseResult(case, (_attempt(case, Outcome.CONNECTED, tries=2),), unprobed)
    bad = CaseResult(case, (_attempt(case, Outcome.REFUSED, tries=2, denial=denial),), Counter())
    assert score.add(good) == []
    assert score.is_passed
    assert score.add(bad) == [
        "c: x/web -> x/db TCP 80: expected allow, found refused",
        "  egress of x/web: allowed (not-isolated)",
        "  ingress of x/db: allowed (not-isolated)",
        "  the enforcer of x/db: ingress-denied (ingress) by x/p",
    ]
    assert not score.is_passed
    assert score.summary() == [
        "2 UDP and 1 SCTP probes not probed",
        "1 probes not probed: a reason",
        "1 allowed probes took a second try",
        "1 of 2 probes as expected (2 cases)",
    ]


def test_nothing_tried_is_no_success() -> None:
    assert not Score().is_passed


def test_own_cases_are_judged_as_they_say() -> None:
    for line in OWN_CASES.read_text(encoding="utf-8").splitlines():
        case = decode_case(json.loads(line))
        for probe in case.probes:
            verdict = case.cluster.evaluate(probe)
            assert (verdict.verdict, verdict.denied_by) == (probe.expected, probe.denied_by), f"{case.name}: {probe}"


def test_an_address_of_a_pod_with_two_is_judged_as_the_one_that_is_dialled() -> None:
    block = {"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "fd00::/16"}}]}]}
    web = {**WEB, "ips": ["fd02::1"]}
    case = _case(
        pods=[web, DB],
        policies=[{**POLICY, "spec": block}],
        probes=[_probe("fd00::9", "x/web", expected="allow"), _probe("172.20.0.9", "x/web", expected="deny")],
    )
    assert [case.cluster.evaluate(probe).verdict for probe in case.probes] == ["allow", "deny"]


def test_a_routed_node_leaves_addresses_to_the_runtime() -> None:
    (node,) = spec_of(layout_of(_case(pods=[{**DB, "node": "n1"}], nodes=NODES[:1])), "reset").nodes
    shipped = load_conflist(SHIPPED_CONFLIST)
    chain = node_conflist(shipped, node.pod_networks, Path("/i"), Path("/r"), is_enforced=True, is_routed=True)
    bridge = chain["plugins"][0]
    assert bridge["capabilities"] == {"ips": True}
    assert not bridge["isGateway"]
    assert bridge["ipam"] == {"type": "static", "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0", "gw": "fe80::2"}]}
    assert bridge["bridge"] == POD_BRIDGE
    assert routed_bridge_steps(node)[3:] == [
        AddRoute(ip_network("172.20.0.9/32"), POD_BRIDGE, source=ip_address("192.168.60.11")),
        AddRoute(ip_network("fd00::9/128"), POD_BRIDGE, source=node.addresses[1]),
    ]


def test_a_case_with_cluster_policies_is_refused() -> None:
    policy = {
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": "top"},
        "spec": {"tier": "Admin", "priority": 0, "subject": {"namespaces": {}}},
    }

    with pytest.raises(ScenarioError, match="ClusterNetworkPolicy is not enforced"):
        layout_of(_case(policies=[policy]))
