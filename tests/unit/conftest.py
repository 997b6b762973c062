# SPDX-License-Identifier: Apache-2.0
"""What each unit test begins with."""

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def _logging_as_imported() -> Iterator[None]:
    """Undo what a test configures, such as a level above which no later test in this process would find a line."""
    yield
    structlog.reset_defaults()
