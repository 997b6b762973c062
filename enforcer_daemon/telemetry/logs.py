# SPDX-License-Identifier: Apache-2.0
"""Structured logs on standard error: JSON, or aligned text if that is a terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, TextIO, cast

import structlog

from enforcer_daemon.settings import LogSettings
from enforcer_daemon.telemetry.lines import open_lines

Logger = structlog.typing.FilteringBoundLogger


def open_log(settings: LogSettings, *, is_aligned: bool | None = None, **context: Any) -> Logger:
    """Set up what every logger of the process writes, and return one that carries `context` in each line.

    `is_aligned` chooses text over JSON; None: if standard error is a terminal.
    """
    renderer: Any = structlog.processors.JSONRenderer()
    if sys.stderr.isatty() if is_aligned is None else is_aligned:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[settings.level.value.upper()]
        ),
        logger_factory=_factory(),
    )
    logger: Logger = structlog.get_logger(**context)
    return logger


def _factory() -> Callable[..., Any]:
    """Return how loggers write: to a pipe or socket without ever waiting for its reader."""
    lines = open_lines(2) if sys.stderr is sys.__stderr__ else None
    if lines is not None:
        # WriteLogger wants a text file, of which it uses two methods.
        return lambda *_: structlog.WriteLogger(cast(TextIO, lines))
    # Standard error is looked up at each line: loggers of modules outlive a redirection of it.
    return lambda *_: structlog.PrintLogger(sys.stderr)
