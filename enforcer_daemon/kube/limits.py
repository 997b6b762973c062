# SPDX-License-Identifier: Apache-2.0
"""How the daemon treats the API server: sizes and times that follow from the server's behavior, so no settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClusterLimits:
    """Lists, watches and what is stored of them. Code and tests construct other values."""

    page_size: int = 500
    """Objects in one answer to a list; as kubectl and client-go's pager ask for."""
    request_timeout_s: float = 30.0
    """Silence after which a list is aborted, seconds; half of the API server's own limit (--request-timeout, 60)."""
    watch_silence_s: float = 150.0
    """Silence after which a watch is opened again, seconds. The API server sends a bookmark about every 60, but only of
    a kind that changed since it started; two may be lost."""
    max_backoff_s: float = 30.0
    """The longest wait before the API server is asked again, seconds; as client-go's reflectors."""
    sync_timeout_s: float = 10.0
    """How long a start waits for the API server before what is stored on disk is put in force, seconds. Pods cannot
    start meanwhile."""
    save_interval_s: float = 5.0
    """The shortest time between two writes to disk of what is in force, seconds."""
