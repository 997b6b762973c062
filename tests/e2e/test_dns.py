# SPDX-License-Identifier: Apache-2.0
"""Resolvers in pods, allowed by their labels under a default deny: glibc and musl, UDP and TCP, through a Service."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.e2e.bad_network import bad_network
from tests.e2e.dns_world import (
    NAMES,
    WIDE,
    WORLD,
    Servers,
    addresses_of,
    files_for,
    look_up,
    name,
    run_with,
)
from tests.e2e.operation_world import denials
from trireme_lab import Lab, LabError, Tools

pytestmark = pytest.mark.kernel

CLIENT, STRANGER, SERVICE = "x/client", "x/stranger", "service:x/dns"
RESOLVERS = ("x/dns-a", "x/dns-b")
"""On the client's own node, and on the other."""
ON_STOCK_KERNEL = pytest.param(SERVICE, marks=pytest.mark.stock_kernel)
VERSIONS = [4, 6]
ONCE = "timeout:30 attempts:1"
"""The most patience that glibc has, however slow the machine, for an answer to the first question alone."""
PATIENT = "timeout:30 attempts:5"
IN_FLIGHT = 50
PLAIN_CLIENT, PLAIN_RESOLVER = "host:client", "host:dns"
"""On the same nodes as x/client and x/dns-b, and not enforced: the same network without the agent."""
LOST_LOOKUPS = 200
"""With the agent, and as many without, in each family."""
WITHOUT_RETRIES = 0.815
"""Of lookups with two questions each, whose answers both came at the first try: 0.95 to the power of 4."""
STANDARD_ERRORS = 4.0
"""One more of them than chance brings in 30,000 runs."""


@pytest.fixture(scope="module")
def servers(plugin: Path) -> Iterator[Servers]:
    with Lab(WORLD, Tools(plugin=plugin)) as lab:
        servers = Servers(lab)
        servers.start(*RESOLVERS, PLAIN_RESOLVER)
        yield servers


@pytest.fixture(scope="module")
def musl_lookup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a program that asks musl's resolver."""
    program = tmp_path_factory.mktemp("musl") / "lookup"
    source = Path(__file__).with_name("lookup.c")
    subprocess.run(["musl-gcc", "-static", "-Wall", "-Werror", "-o", str(program), str(source)], check=True)
    return program


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", [*RESOLVERS, ON_STOCK_KERNEL])
@pytest.mark.parametrize("options", ["", "single-request", "single-request-reopen"])
def test_glibc_finds_both_families_at_the_first_try(servers: Servers, target: str, version: int, options: str) -> None:
    """A and AAAA leave one socket at the same moment, unless the options say otherwise; WIDE is asked by TCP, too."""
    files = files_for(servers.lab, [servers.lab.address_of(target, version)], f"{ONCE} {options}")
    found = look_up(servers.lab, CLIENT, files, [name(1), WIDE])
    assert all(lookup.is_right for lookup in found), found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", [*RESOLVERS, ON_STOCK_KERNEL])
def test_musl_finds_both_families(servers: Servers, musl_lookup: Path, target: str, version: int) -> None:
    files = files_for(servers.lab, [servers.lab.address_of(target, version)])
    printed = run_with(servers.lab, CLIENT, files, str(musl_lookup), name(2))
    assert {ip_address(line) for line in printed.split()} == set(addresses_of(name(2)))


def test_musl_asks_all_servers_at_once(servers: Servers, musl_lookup: Path) -> None:
    """Its questions to three servers of both families leave one socket."""
    lab = servers.lab
    files = files_for(lab, [lab.address_of(RESOLVERS[0]), lab.address_of(RESOLVERS[1], 6), lab.address_of(SERVICE)])
    printed = run_with(lab, CLIENT, files, str(musl_lookup), name(3))
    assert {ip_address(line) for line in printed.split()} == set(addresses_of(name(3)))


@pytest.mark.parametrize(("target", "version"), [("x/dns-a", 4), ("x/dns-b", 6)])
def test_nobody_else_is_heard(servers: Servers, musl_lookup: Path, target: str, version: int) -> None:
    lab = servers.lab
    secret = name(700 + version)
    files = files_for(lab, [lab.address_of(target, version)], "timeout:1 attempts:1")
    (found,) = look_up(lab, STRANGER, files, [secret])
    assert found.error
    with pytest.raises(LabError):
        run_with(lab, STRANGER, files, str(musl_lookup), secret)
    assert servers.asked(target, secret) == 0
    assert denials(lab, target)[-1] == "ingress-denied"


@pytest.mark.stock_kernel
@pytest.mark.parametrize("version", VERSIONS)
def test_2000_questions_with_50_at_once_are_all_answered(servers: Servers, version: int) -> None:
    lab = servers.lab
    files = files_for(lab, [lab.address_of(SERVICE, version)], PATIENT)
    found = look_up(lab, CLIENT, files, [name(number) for number in range(NAMES)], in_flight=IN_FLIGHT)
    assert [lookup for lookup in found if not lookup.is_right] == []
    assert all(servers.questions(resolver) for resolver in RESOLVERS)


@pytest.mark.slow
def test_five_percent_loss_each_way_costs_no_more_lookups_than_without_the_agent(servers: Servers) -> None:
    """A lookup asks twice, with five seconds for each try. What is lost of the handshakes must not add to that."""
    lab = servers.lab
    names = [name(number) for number in range(LOST_LOOKUPS)]
    ways = {(CLIENT, RESOLVERS[1]): 0, (PLAIN_CLIENT, PLAIN_RESOLVER): 0}
    lookups = [(client, resolver, version) for client, resolver in ways for version in VERSIONS]

    def count_right(client: str, resolver: str, version: int) -> int:
        files = files_for(lab, [lab.address_of(resolver, version)])
        return sum(lookup.is_right for lookup in look_up(lab, client, files, names, in_flight=25))

    with bad_network(lab, "delay", "2ms", "loss", "5%"), ThreadPoolExecutor(len(lookups)) as executor:
        found = executor.map(lambda lookup: count_right(*lookup), lookups)
        for (client, resolver, _), right in zip(lookups, found, strict=True):
            ways[client, resolver] += right
    total = len(VERSIONS) * LOST_LOOKUPS
    enforced, plain = (right / total for right in ways.values())
    mean = (enforced + plain) / 2
    error = math.sqrt(2 * mean * (1 - mean) / total)
    print(f"lookups answered: {enforced:.1%} with the agent, {plain:.1%} without")  # noqa: T201
    assert plain - enforced <= STANDARD_ERRORS * error
    assert enforced > WITHOUT_RETRIES
