# SPDX-License-Identifier: Apache-2.0
"""Name resolution with real software: dnsmasq serves; glibc and musl ask in pods with a resolv.conf of their own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from enforcer_daemon.model import IPAddress, PodRef, Protocol
from tests.e2e.operation_world import NODES, app, block, pod, policy
from trireme_lab import HostSpec, Lab, LabSpec, ServicePort, ServiceSpec

DNS_PORTS: list[dict[str, object]] = [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
MAY_ASK: dict[str, object] = {"podSelector": {"matchLabels": {"dns": "allowed"}}}
OUTSIDE = HostSpec("outside", (ip_address("203.0.113.53"), ip_address("2001:db8::53")))
OUTSIDE_BLOCKS = ("203.0.113.53/32", "2001:db8::53/128")
SERVERS = ("x/dns-a", "x/dns-b", "host:outside")
NAMES = 1_000
"""Names `nNUMBER.many.test` that every server knows, each with an address of either family."""
WIDE = "wide.test"
WIDE_COUNT = 60
"""Addresses of WIDE: too many for a datagram of 512 bytes, so that resolvers ask again by TCP."""
_START_TIMEOUT_S = 20.0
_RESOLVE = Path(__file__).with_name("resolve.py")
# `ip netns exec` has made a mount namespace of the program's own.
_WITH_OWN_FILES = (
    'mount --bind "$0/resolv.conf" /etc/resolv.conf && mount --bind "$0/nsswitch.conf" /etc/nsswitch.conf && exec "$@"'
)


SERVICE = ServiceSpec(
    "x",
    "dns",
    (ip_address("10.96.0.53"), ip_address("fd00:10:96::53")),
    (PodRef("x", "dns-a"), PodRef("x", "dns-b")),
    (ServicePort(53, 53, Protocol.UDP), ServicePort(53, 53, Protocol.TCP)),
)
MANIFESTS = (
    policy("deny-all", ingress=[], egress=[]),
    policy("resolver", "dns", ingress=[{"from": [MAY_ASK], "ports": DNS_PORTS}]),
    policy("may-ask", "client", egress=[{"to": [app("dns")], "ports": DNS_PORTS}]),
    policy("ask-outside", "ask-outside", egress=[{"to": block(*OUTSIDE_BLOCKS), "ports": DNS_PORTS}]),
)
WORLD = LabSpec(
    NODES,
    {"x": {}},
    pods=(
        pod("dns-a", "a", app="dns"),
        pod("dns-b", "b", app="dns"),
        pod("client", "a", dns="allowed"),
        pod("stranger", "a", app="client"),
        pod("ask-outside", "a"),
    ),
    hosts=(OUTSIDE, HostSpec("client", node="a"), HostSpec("dns", node="b")),
    services=(SERVICE,),
    manifests=MANIFESTS,
)


def addresses_of(name: str) -> list[IPAddress]:
    """Return what the servers say of a name, sorted."""
    if name == WIDE:
        return [IPv4Address(f"198.19.0.{number}") for number in range(1, WIDE_COUNT + 1)]
    number = int(name.removeprefix("n").partition(".")[0])
    return [IPv4Address(0xC612_0000 + number), IPv6Address((0x2001_0DB8_0018 << 80) + number)]


def name(number: int) -> str:
    """Return the name with this number, below NAMES."""
    return f"n{number}.many.test"


@dataclass(frozen=True, slots=True)
class Servers:
    """The resolvers of a lab, and what they were asked."""

    lab: Lab

    def start(self, *places: str) -> None:
        """Start dnsmasq at the places; return when all of them serve."""
        hosts = self.lab.directory / "hosts"
        known = [*map(name, range(NAMES)), WIDE]
        hosts.write_text("".join(f"{address} {each}\n" for each in known for address in addresses_of(each)))
        for place in places:
            listen = ",".join(map(str, self.lab.place(place).addresses))
            self.lab.spawn(
                place, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts",
                "--user=root", "--pid-file=", f"--addn-hosts={hosts}", "--bind-interfaces",
                f"--listen-address={listen}", "--log-queries", f"--log-facility={self._log(place)}",
            )  # fmt: skip
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not all("read " in self._text(place) for place in places):  # the last thing it says when it starts
            assert time.monotonic() < deadline, [self._text(place) for place in places]
            time.sleep(0.01)

    def asked(self, place: str, what: str) -> int:
        """Return how many queries for a name, of any type, have reached a server."""
        return sum(f"] {what} from " in line for line in self._text(place).splitlines())

    def questions(self, place: str) -> int:
        """Return how many queries have reached a server."""
        return self._text(place).count(": query[")

    def _log(self, place: str) -> Path:
        return self.lab.directory / f"dnsmasq-{place.replace('/', '-').replace(':', '-')}.log"

    def _text(self, place: str) -> str:
        log = self._log(place)
        return log.read_text() if log.exists() else ""


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a program saw of one name."""

    name: str
    addresses: list[IPAddress]
    error: str
    seconds: float

    @property
    def is_right(self) -> bool:
        return self.addresses == addresses_of(self.name)


def files_for(lab: Lab, nameservers: Sequence[IPAddress], options: str = "") -> Path:
    """Write a pod's resolv.conf and nsswitch.conf; return their directory."""
    directory = lab.directory / f"etc-{time.monotonic_ns()}"
    directory.mkdir()
    lines = [f"nameserver {server}" for server in nameservers] + [f"options {options}"] * bool(options)
    (directory / "resolv.conf").write_text("\n".join(lines) + "\n")
    (directory / "nsswitch.conf").write_text("hosts: dns\n")
    return directory


def look_up(lab: Lab, place: str, files: Path, names: Sequence[str], *, in_flight: int = 1) -> list[Lookup]:
    """Resolve names by glibc's getaddrinfo(), both families, so many at a time."""
    listed = files / "names"
    listed.write_text(" ".join(names))
    found = json.loads(run_with(lab, place, files, sys.executable, str(_RESOLVE), str(in_flight), str(listed)))
    return [
        Lookup(each["name"], sorted(map(ip_address, each["addresses"]), key=_order), each["error"], each["seconds"])
        for each in found
    ]


def _order(address: IPAddress) -> tuple[int, int]:
    return address.version, int(address)


def run_with(lab: Lab, place: str, files: Path, *argv: str) -> str:
    """Run a program at a place with its own resolv.conf and nsswitch.conf."""
    return lab.run(place, "sh", "-c", _WITH_OWN_FILES, str(files), *argv)
