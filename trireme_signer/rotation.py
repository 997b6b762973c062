# SPDX-License-Identifier: Apache-2.0
"""The cluster's authorities over time: who signs, who is trusted, and when a new one is made. Pure.

Everything follows from the authorities' own dates, so replicas and restarts agree without a record of steps. A new
authority is trusted first and signs only after a delay in which every node has learnt of it; the old one is trusted
until the last certificate that it signed has ended. So at no moment a node shows what another does not believe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from enforcer_daemon.identity.authority import BACKDATING, Authority, make_authority

_MARGIN = timedelta(minutes=10)
"""Beyond the end of the last certificate: clocks differ, and handshakes that began before it still run."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When authorities change."""

    lifetime: timedelta = timedelta(days=365)
    """Of an authority's certificate; a new one is made at half of it."""
    delay: timedelta = timedelta(hours=24)
    """From the making of an authority until it signs: the time in which the bundle reaches every node."""
    certificate_lifetime: timedelta = timedelta(hours=24)
    """The longest certificate that is signed."""


@dataclass(frozen=True, slots=True)
class Keeper:
    """An authority as it is kept: without a key once it signs no more."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey | None

    @property
    def made_at(self) -> datetime:
        return self.certificate.not_valid_before_utc + BACKDATING

    def __repr__(self) -> str:
        return f"Keeper({self.certificate.serial_number:x}, made {self.made_at:%Y-%m-%d %H:%M:%SZ}, key redacted)"


@dataclass(frozen=True, slots=True)
class Authorities:
    """What is in force at a moment, oldest first."""

    kept: tuple[Keeper, ...]
    signer: Authority

    @property
    def bundle(self) -> tuple[x509.Certificate, ...]:
        """All that nodes believe."""
        return tuple(keeper.certificate for keeper in self.kept)


def advance(
    kept: Sequence[Keeper], trust_domain: str, schedule: Schedule, now: datetime, replace_before: datetime | None = None
) -> Authorities:
    """Return what is in force now; makes a new authority where one is due.

    `replace_before`: authorities made before this moment are to be replaced although they are not old (a stolen key).
    """
    ordered = [keeper for keeper in sorted(kept, key=lambda keeper: keeper.made_at) if not _has_ended(keeper, now)]
    if not ordered or _is_due(ordered[-1], schedule, now, replace_before) or ordered[-1].key is None:
        made = make_authority(trust_domain, now, schedule.lifetime)
        ordered.append(Keeper(made.certificate, made.key))
    at = _signing(ordered, schedule, now)
    signer = ordered[at]
    assert signer.key is not None  # noqa: S101 - _signing picks among those with a key
    trusted = [keeper for i, keeper in enumerate(ordered) if i >= at or _is_needed(ordered, i, schedule, now)]
    cut = tuple(
        Keeper(keeper.certificate, keeper.key if keeper.made_at >= signer.made_at else None) for keeper in trusted
    )
    return Authorities(cut, Authority(signer.certificate, signer.key))


def _has_ended(keeper: Keeper, now: datetime) -> bool:
    return keeper.certificate.not_valid_after_utc <= now


def _is_due(newest: Keeper, schedule: Schedule, now: datetime, replace_before: datetime | None) -> bool:
    life = newest.certificate.not_valid_after_utc - newest.made_at
    return now >= newest.made_at + life / 2 or (replace_before is not None and newest.made_at < replace_before <= now)


def _signing(ordered: Sequence[Keeper], schedule: Schedule, now: datetime) -> int:
    """The newest that has been known long enough; where there is none, the oldest that can sign."""
    able = [i for i, keeper in enumerate(ordered) if keeper.key is not None]
    ripe = [i for i in able if ordered[i].made_at + schedule.delay <= now]
    return ripe[-1] if ripe else able[0]


def _is_needed(ordered: Sequence[Keeper], at: int, schedule: Schedule, now: datetime) -> bool:
    """Whether certificates of this authority can still be in use, although a later one signs."""
    last_signed = ordered[at + 1].made_at + schedule.delay
    return now < last_signed + schedule.certificate_lifetime + _MARGIN
