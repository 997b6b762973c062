# SPDX-License-Identifier: Apache-2.0
"""The node's keys over time: renewed when due, and taken from the operator's files whenever those change.

The files are compared by content, so that it does not matter how they are replaced (rename, rewrite, the symbolic links
of a mounted Secret). What cannot be used changes nothing: the last good keys and bundle stay in force, and `problem`
says why. It is tried again at each look, so that a half-written set of files heals with its last write.
"""

from __future__ import annotations

from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from enforcer_daemon.errors import SettingsError
from enforcer_daemon.identity.external import external_files, open_external_identity
from enforcer_daemon.identity.keystore import NodeIdentity, open_node_identity
from enforcer_daemon.settings import CredentialSource, Settings


class Renewal(NamedTuple):
    """What a look at the keys has changed."""

    is_credential_new: bool = False
    """Tokens must be signed anew."""
    is_bundle_new: bool = False
    """Peers must be verified anew."""
    is_problem_new: bool = False
    """`problem` has changed; it may be gone."""


class NodeKeys:
    """The identity that is in force, and why there is no newer one."""

    __slots__ = ("_seen", "_settings", "identity", "problem")

    def __init__(self, settings: Settings, wall_now: float) -> None:
        """Open or make the node's keys; raise SettingsError or OSError where that cannot be done."""
        self._settings = settings
        self._seen = _operators_files(settings)  # Before they are read: a change in between is seen at the next look.
        self.identity: NodeIdentity = open_identity(settings, wall_now)
        self.problem = ""
        """Why the present files, or a renewal that is due, could not be taken over; empty if all is well."""

    def look(self, wall_now: float) -> Renewal:
        """Take over what has changed or is due; call it about once a second."""
        seen = _operators_files(self._settings)
        credential = self.identity.credential
        is_due = not credential.not_before <= wall_now < self.identity.renew_at
        if seen == self._seen and not is_due and not self.problem:
            return Renewal()
        before, problem = self.identity, ""
        try:
            self.identity = open_identity(self._settings, wall_now)
            self._seen = seen
        except (SettingsError, OSError) as err:
            problem = str(err)
        is_problem_new, self.problem = problem != self.problem, problem
        return Renewal(
            self.identity.credential.der != before.credential.der, self.identity.bundle != before.bundle, is_problem_new
        )

    def problems(self, wall_now: float) -> list[str]:
        """Say all that an operator should mend."""
        found = [self.problem] if self.problem else []
        if wall_now > self.identity.credential.not_after:
            found.append("this node's certificate has expired: its pods can prove nothing to others")
        now = datetime.fromtimestamp(wall_now, UTC)
        for authority in self.identity.bundle.authorities:
            name = authority.subject.rfc4514_string()
            if now > authority.not_valid_after_utc:
                found.append(f"authority {name} of the trust bundle has expired")
            elif now < authority.not_valid_before_utc:
                found.append(f"authority {name} of the trust bundle is not yet valid")
        return found


def open_identity(settings: Settings, wall_now: float) -> NodeIdentity:
    """Open the node's identity, wherever the settings say that it comes from."""
    if settings.credentials.source is CredentialSource.AUTHORITY:
        return open_node_identity(settings, wall_now)
    return open_external_identity(settings, wall_now)


def _operators_files(settings: Settings) -> tuple[bytes, ...]:
    credentials = settings.credentials
    if credentials.source is not CredentialSource.AUTHORITY:
        return tuple(_digest(path) for path in external_files(settings))
    paths = (credentials.ca_certificate, credentials.ca_key, credentials.trust_bundle)
    return tuple(_digest(path) for path in paths if path is not None)


def _digest(path: Path) -> bytes:
    """Stand for a file's content, or for the error that hides it; a key's own bytes are not kept."""
    try:
        return sha256(path.read_bytes()).digest()
    except OSError as err:
        return str(err).encode()
