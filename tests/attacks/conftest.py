# SPDX-License-Identifier: Apache-2.0
"""The attacks run on the whole product, as the end-to-end tests do."""

from __future__ import annotations

from tests.e2e.conftest import plugin

__all__ = ["plugin"]
