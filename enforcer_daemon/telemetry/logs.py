# SPDX-License-Identifier: Apache-2.0
"""Structured logs on standard error: JSON for machines, or aligned text for people."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from enforcer_daemon.settings import LogSettings

Logger = structlog.typing.FilteringBoundLogger


def open_log(settings: LogSettings, **context: Any) -> Logger:
    """Set up what every logger of the process writes, and give one that carries `context` in each line."""
    renderer: Any = structlog.processors.JSONRenderer()
    if settings.format == "console":
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
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.level.upper()]),
        # Standard error is looked up at each line: loggers of modules outlive a redirection of it.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
    logger: Logger = structlog.get_logger(**context)
    return logger
