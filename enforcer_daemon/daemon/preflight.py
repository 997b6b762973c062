# SPDX-License-Identifier: Apache-2.0
"""What `--check-config` sees beyond the settings: the files and directories that they name. Writes nothing."""

from __future__ import annotations

import os
from pathlib import Path

from enforcer_daemon.identity.external import check_external_files
from enforcer_daemon.identity.keystore import check_files
from enforcer_daemon.settings import CredentialSource, Settings
from enforcer_daemon.sources.limits import limit_problems
from enforcer_daemon.sources.manifests import manifest_files, read_file, unique_objects


def find_problems(settings: Settings, wall_now: float) -> list[str]:
    """Return one line for each thing that would keep the daemon from starting, or an object out of force."""
    return [
        *_unusable("stateDir", settings.state_dir),
        *_unusable("registration.runDir", settings.registration.run_dir),
        *_credential_problems(settings, wall_now),
        *_policy_problems(settings.policy_dir),
    ]


def _credential_problems(settings: Settings, wall_now: float) -> list[str]:
    match settings.credentials.source:
        case CredentialSource.AUTHORITY:
            return check_files(settings)
        case CredentialSource.FILES:
            return check_external_files(settings, wall_now)
        case CredentialSource.KUBERNETES:
            return []  # Its files are the daemon's own.


def _unusable(key: str, path: Path) -> list[str]:
    """Look at a directory that the daemon makes where it is missing: at the nearest one that is there."""
    try:
        there = next(each for each in (path, *path.parents) if each.exists() or each.is_symlink())
        if not there.is_dir():
            return [f"{key}: {path}: cannot be used: {there} is not a directory"]
    except OSError as err:
        return [f"{key}: {path}: cannot be used: {err.strerror}"]
    if not os.access(there, os.W_OK | os.X_OK):
        return [f"{key}: {path}: cannot be used: {there} cannot be written"]
    return []


def _policy_problems(directory: Path | None) -> list[str]:
    if directory is None:
        return []
    try:
        files = [read_file(path) for path in manifest_files(directory)]
    except OSError as err:
        return [f"policyDir: {directory}: {err.strerror}"]
    found, problems = unique_objects(files)
    problems += limit_problems(found)
    return [f"policyDir: {problem}" for problem in problems]
