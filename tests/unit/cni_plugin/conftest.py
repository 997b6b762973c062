# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the plugin tests: those of registration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.registration.live_server import network_namespace, short_directory


@pytest.fixture(scope="session")
def netns_path() -> Iterator[str]:
    with network_namespace() as path:
        yield path


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory
