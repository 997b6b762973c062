# SPDX-License-Identifier: Apache-2.0
"""How long each guarded address is fresh yet: kept while tables are replaced, and recovered from an earlier daemon's.

The kernel's sets are the record: their elements expire by themselves, also while no daemon runs, and a crash loses
nothing of them. Beside each address stands whose it is (`GuardedEndpoint.life`), as the comment of the element. An
address that another pod had, or its pod under another identity, is fresh from the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from enforcer_daemon.dataplane.guard_rules import NAME, GuardedEndpoint
from enforcer_daemon.dataplane.netlink import (
    NETLINK_NETFILTER,
    NFT_GETSETELEM,
    NFTA_DATA_VALUE,
    NFTA_LIST_ELEMENTS,
    NFTA_LIST_SET,
    NFTA_LIST_TABLE,
    NFTA_SET_ELEM_EXPIRATION,
    NFTA_SET_ELEM_KEY,
    NFTA_SET_ELEM_USERDATA,
    decode_attributes,
    decode_nested,
    dump,
    encode_attribute,
    netfilter_attributes,
    netfilter_head,
)
from enforcer_daemon.dataplane.tampering import NFPROTO_INET
from enforcer_daemon.errors import DataplaneError
from enforcer_daemon.handshake.lapse import TCP_LAPSE_S, UDP_LAPSE_S
from enforcer_daemon.model import IPAddress

FRESH_S: Mapping[str, float] = {"fresh_tcp": TCP_LAPSE_S, "fresh_udp": UDP_LAPSE_S}
UNCLEAN_S: Mapping[str, float] = {"unclean": TCP_LAPSE_S}
TIMES_S: Mapping[str, float] = {**FRESH_S, **UNCLEAN_S}
"""The sets of addresses, without their family, and how long an address stays in each, seconds."""
OWN = "own"
"""The set of all guarded addresses, without its family."""

_UDATA_COMMENT = 0  # NFTNL_UDATA_SET_ELEM_COMMENT


@dataclass(frozen=True, slots=True)
class _Life:
    """Whose an address is, and until when it is in which set, monotonic seconds."""

    of: str
    until: Mapping[str, float]


class FreshTimes:
    """The times of all guarded addresses."""

    __slots__ = ("_lives",)

    def __init__(self) -> None:
        self._lives: dict[IPAddress, _Life] = {}

    def left(self, address: IPAddress, now: float) -> dict[str, float]:
        """Return the sets that an address is in, and for how long yet, seconds; one that is not guarded is fresh."""
        life = self._lives.get(address)
        until = _begun(now) if life is None else life.until
        return {name: deadline - now for name, deadline in until.items() if deadline > now}

    def take(self, endpoints: Iterable[GuardedEndpoint], now: float) -> None:
        """Take over endpoints; an address that is new, or another's than before, is fresh from now on."""
        for endpoint in endpoints:
            for address in endpoint.addresses:
                if self.is_another(address, endpoint.life):
                    self._lives[address] = _Life(endpoint.life, _begun(now))

    def is_another(self, address: IPAddress, life: str) -> bool:
        """Tell whether an address was another pod's until now, or nobody's."""
        before = self._lives.get(address)
        return before is None or before.of != life

    def begin(self, addresses: Iterable[IPAddress], now: float, *, is_clean: bool) -> None:
        """Let the time of guarded addresses begin; an unclean one stays so for its time."""
        for address in addresses:
            life = self._lives[address]
            until = {**life.until, **_begun(now)}
            if not is_clean:
                until |= {name: now + seconds for name, seconds in UNCLEAN_S.items()}
            self._lives[address] = _Life(life.of, until)

    def keep(self, addresses: Iterable[IPAddress]) -> None:
        """Forget all addresses but these."""
        kept = frozenset(addresses)
        self._lives = {address: life for address, life in self._lives.items() if address in kept}

    def recover(self, now: float) -> None:
        """Take over what an earlier daemon's tables say in the current namespace; raise DataplaneError."""
        until: dict[IPAddress, dict[str, float]] = {}
        for name in TIMES_S:
            for key, left_s, _ in _elements(name):
                until.setdefault(ip_address(key), {})[name] = now + left_s
        for key, _, life in _elements(OWN):
            if life:  # Else of a version that did not write whose an address is.
                address = ip_address(key)
                self._lives[address] = _Life(life, until.get(address, {}))


def _begun(now: float) -> dict[str, float]:
    return {name: now + seconds for name, seconds in FRESH_S.items()}


def _elements(name: str) -> Iterator[tuple[bytes, float, str]]:
    """Yield key, seconds left and comment of the elements of a set of both families."""
    for version in (4, 6):
        names = ((NFTA_LIST_TABLE, NAME), (NFTA_LIST_SET, f"{name}{version}"))
        request = b"".join(encode_attribute(kind, text.encode() + b"\0") for kind, text in names)
        try:
            bodies = dump(NETLINK_NETFILTER, NFT_GETSETELEM, netfilter_head(NFPROTO_INET) + request)
        except OSError as err:
            raise DataplaneError(f"elements of {name}{version}: {err}") from err
        for body in bodies:
            listed = netfilter_attributes(body).get(NFTA_LIST_ELEMENTS, b"")
            yield from map(_decode_element, decode_nested(listed))


def _decode_element(data: bytes) -> tuple[bytes, float, str]:
    element = decode_attributes(data)
    key = decode_attributes(element.get(NFTA_SET_ELEM_KEY, b"")).get(NFTA_DATA_VALUE, b"")
    if len(key) not in (4, 16):
        raise DataplaneError(f"nf_tables: an element of {len(key)} bytes is no address")
    left_ms = int.from_bytes(element.get(NFTA_SET_ELEM_EXPIRATION, b""), "big")
    return key, left_ms / 1e3, _comment(element.get(NFTA_SET_ELEM_USERDATA, b""))


def _comment(userdata: bytes) -> str:
    """Return the comment of an element (libnftnl's udata: type, length, value); empty if there is none."""
    offset = 0
    while offset + 2 <= len(userdata):
        kind, length = userdata[offset], userdata[offset + 1]
        if kind == _UDATA_COMMENT:
            return userdata[offset + 2 : offset + 2 + length].rstrip(b"\0").decode("ascii", "replace")
        offset += 2 + length
    return ""
