# SPDX-License-Identifier: Apache-2.0
"""What Services ask for and do not get: addresses that are not virtual, with the reasons.

Kept by Service as it changes, so that nobody walks over all Services. Where not all are named, namespaces take turns:
no tenant hides what another is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from itertools import chain, islice, zip_longest

from enforcer_daemon.kube.table import Key
from enforcer_daemon.ratelimiter import RateLimiter
from enforcer_daemon.telemetry.logs import Logger

_MAX_NAMED = 4
"""Addresses of one Service that are named for one reason."""
_MAX_FOLLOWED = 256
"""Services that are logged, and become Events, at a time."""
_LINES_PER_S = 1.0
_LINES_AT_ONCE = 60.0
"""Lines in the log: any user of a namespace causes some."""
WHOLE = b""
"""In place of an address: the reason concerns the Service as a whole."""


class IgnoredAddresses:
    """The reasons by Service and address."""

    def __init__(self) -> None:
        self._by_namespace: dict[str, dict[Key, dict[bytes, str]]] = {}
        self._count = 0
        self.revision = 0
        """Rises with each change."""

    def __len__(self) -> int:
        """Return how many Services do not get all that they ask for."""
        return self._count

    def put(self, key: Key, packed: bytes, why: str) -> None:
        """Note why an address of a Service is not virtual; empty: it is."""
        services = self._by_namespace.setdefault(key[0], {})
        found = services.get(key, {})
        if found.get(packed, "") == why:
            if not services:
                del self._by_namespace[key[0]]
            return
        self.revision += 1
        if why:
            self._count += key not in services
            services.setdefault(key, {})[packed] = why
            return
        del found[packed]
        if not found:
            self.drop(key)

    def drop(self, key: Key) -> None:
        """Forget a Service."""
        services = self._by_namespace.get(key[0], {})
        if services.pop(key, None) is not None:
            self._count -= 1
            self.revision += 1
            if not services:
                del self._by_namespace[key[0]]

    def of(self, key: Key) -> str:
        """Return what a Service does not get, and why; empty if it gets all."""
        return _in_words(self._by_namespace.get(key[0], {}).get(key, {}))

    def told(self, most: int) -> dict[Key, str]:
        """Return what so many Services at most do not get, and why."""
        return {key: _in_words(reasons) for key, reasons in islice(self._in_turns(), most)}

    def _in_turns(self) -> Iterator[tuple[Key, dict[bytes, str]]]:
        rounds = zip_longest(*(services.items() for services in self._by_namespace.values()))
        return (found for found in chain.from_iterable(rounds) if found is not None)


class IgnoredLog:
    """Logs which Services begin to ask for what they do not get, and which no longer do."""

    def __init__(self, ignored: IgnoredAddresses, log: Logger, now: float) -> None:
        self._ignored = ignored
        self._log = log
        self._limiter = RateLimiter(_LINES_PER_S, _LINES_AT_ONCE, now)
        self._revision = 0
        self.told: Mapping[Key, str] = {}
        """What was ignored at the last look, of a limited number of Services."""

    def follow(self, now: float) -> None:
        """Log what changed since the last look; cheap if nothing did."""
        if self._ignored.revision == self._revision:
            return
        before, self.told = self.told, self._ignored.told(_MAX_FOLLOWED)
        self._revision = self._ignored.revision
        for key, text in self.told.items():
            if before.get(key) != text and self._limiter.take(now):
                self._log.warning("addresses of a Service are not virtual", service="/".join(key), problem=text)
        for key in before.keys() - self.told.keys():
            if not self._ignored.of(key) and self._limiter.take(now):
                self._log.info("no address of the Service is ignored", service="/".join(key))


def _in_words(reasons: Mapping[bytes, str]) -> str:
    by_reason: dict[str, list[bytes]] = {}
    for packed, why in reasons.items():
        by_reason.setdefault(why, []).append(packed)
    return "; ".join(_sentence(addresses, why) for why, addresses in by_reason.items())


def _sentence(addresses: list[bytes], why: str) -> str:
    if addresses == [WHOLE]:
        return f"not all is virtual: {why}"
    named = ", ".join(str(ip_address(packed)) for packed in addresses[:_MAX_NAMED])
    more = f" and {len(addresses) - _MAX_NAMED} more" if len(addresses) > _MAX_NAMED else ""
    return f"{named}{more} {'is' if len(addresses) == 1 else 'are'} not virtual: {why}"
