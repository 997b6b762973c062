# SPDX-License-Identifier: Apache-2.0
"""A namespace user writes the worst objects; what the kernel gets of them, and what others of the node see."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import pytest

from benchmarks.tenants import OBJECTS, _access, blocks, follow, hostile, policy, ports, updates
from enforcer_daemon.dataplane.guard import Guard
from enforcer_daemon.dataplane.guard_rules import GuardedEndpoint
from enforcer_daemon.dataplane.netns import open_in
from enforcer_daemon.model import AttachmentId, PodRef, Protocol
from enforcer_daemon.policy.address_rules import AddressRule
from enforcer_daemon.policy.tables import AddressSet
from tests.kube.lab import KubeLab
from trireme_lab import LabSpec, NodeSpec, Outcome, PodSpec, PortSpec, Tools
from trireme_lab.probe import run_probe

T = TypeVar("T")
PODS = 30
RULES = 100


@pytest.fixture
def netns() -> Iterator[Callable[[Callable[[], T]], T]]:
    """Yield what calls something in a network namespace of its own."""
    name = "trireme-costs"
    subprocess.run(("ip", "netns", "add", name), check=True)
    try:
        with Path(f"/run/netns/{name}").open("rb") as file:
            yield lambda act: open_in(file.fileno(), act)
    finally:
        subprocess.run(("ip", "netns", "del", name), check=True)


def test_sets_of_every_kind_are_what_the_kernel_takes(netns: Callable[..., Any]) -> None:
    rules = tuple(
        AddressRule.of(AddressSet(version, [(base, base + 5), (base + 9, base + 9)]), protocol, ((1, 5), (9, 9)))
        for version, base in ((4, 0x0A000000), (6, 0xFD << 120))
        for protocol in Protocol
    )
    guard = Guard()
    netns(lambda: guard.replace([_endpoint("c", 1, rules)]))
    sets = netns(_sets)
    assert isinstance(sets, list)
    assert {name.partition("_")[0] for name in sets} >= {"addresses4", "addresses6", "ports"}


def _rules(seed: int) -> tuple[AddressRule, ...]:
    """Return rules that share neither addresses nor ports, each with two sets."""
    return tuple(
        AddressRule.of(
            AddressSet(4, [(seed + number * 8 + at * 2,) * 2 for at in range(3)]),
            Protocol.TCP,
            ((1 + number, 1 + number), (9_000 + number, 9_000 + number)),
        )
        for number in range(RULES)
    )


def _endpoint(name: str, number: int, rules: tuple[AddressRule, ...]) -> GuardedEndpoint:
    return GuardedEndpoint(AttachmentId(name, "eth0"), (ip_address(0x0A000000 + number),), rules, rules)


def test_many_pods_with_many_rules_do_not_slow_the_guard_for_others(netns: Callable[..., Any]) -> None:
    heavy, guard = _rules(1 << 20), Guard()
    tenants = [_endpoint(f"t{number}", number, heavy) for number in range(PODS)]

    started = time.perf_counter()
    netns(lambda: guard.replace(tenants))
    netns(lambda: guard.apply(_endpoint("other", 999, (AddressRule(),)[:0])))
    assert time.perf_counter() - started < 10

    sets = netns(lambda: _sets())
    assert len({name for name in sets if name.startswith("addresses4_")}) == RULES
    netns(lambda: guard.apply(*(replace(each, rules=(), egress=()) for each in tenants)))
    assert not [name for name in netns(lambda: _sets()) if name.startswith(("addresses4_", "ports_"))]


def _sets() -> list[str]:
    listed = subprocess.run(
        ("nft", "-t", "list", "table", "inet", "trireme_guard"), capture_output=True, text=True, check=True
    )
    return [line.split()[1] for line in listed.stdout.splitlines() if line.strip().startswith("set ")]


PORT = 7000


@pytest.fixture(scope="module")
def lab() -> Iterator[KubeLab]:
    world = LabSpec(
        nodes=(NodeSpec.numbered("a", 1),),
        pods=(
            PodSpec(PodRef("bench", "client"), "a", {"app": "client"}),
            PodSpec(PodRef("bench", "server"), "a", {"app": "server"}, ports=(PortSpec(PORT),)),
            PodSpec(PodRef("hostile", "pod"), "a", {"app": "x"}, ports=(PortSpec(PORT),)),
        ),
        manifests=(_access({"app": "client"}),),
        settings={"denyWith": "reset"},
    )
    with KubeLab(world, Tools()) as lab:
        yield lab


def _problems(lab: KubeLab) -> list[str]:
    snapshot = lab.node("a").status()["snapshot"]
    assert isinstance(snapshot, dict)
    problems: list[str] = snapshot["problems"]
    return problems


def test_a_policy_beyond_the_limit_is_refused_and_isolates_its_pods(lab: KubeLab) -> None:
    request = replace(lab.request("bench/client", "hostile/pod", PORT), timeout_s=1.0)
    many = policy(
        "hostile", "many", policyTypes=["Ingress"], ingress=[{"from": blocks(9_000), "ports": ports(9_000)}, {}]
    )
    assert run_probe(request).outcome is Outcome.CONNECTED

    lab.api.put(many)
    deadline = time.monotonic() + 10
    while run_probe(request).outcome is not Outcome.REFUSED:
        assert time.monotonic() < deadline

    while not any("hostile/many: spec.ingress[0]" in told and "16384" in told for told in _problems(lab)):
        assert time.monotonic() < deadline
    lab.api.delete("NetworkPolicy", "hostile", "many")


def test_a_megabyte_of_the_worst_policies_delays_no_other_namespace(lab: KubeLab) -> None:
    lab.api.put(*map(hostile, range(OBJECTS)))
    with updates(lab, 5):
        assert statistics.median(follow(lab, 10)) < 1.0
        started = time.perf_counter()
        lab.add_pod(PodSpec(PodRef("bench", "late"), "a", {"app": "late"}))
        assert time.perf_counter() - started < 10
    for number in range(OBJECTS):
        lab.api.delete("NetworkPolicy", "hostile", f"p{number}")
