"""Structured logs: one line an event, to stderr, with service and request_id bound. No prompt text, no keys."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import FilteringBoundLogger, Processor

from fleet.errors import SettingsError

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(*, service: str, level: str, log_format: str) -> None:
    """Set up structlog and the standard library's logging alike, once per process.

    Raises:
        SettingsError: unknown level or format.
    """
    if level not in LEVELS:
        raise SettingsError(f"BATON_LOG_LEVEL = {level!r}: one of {', '.join(LEVELS)}")
    if log_format not in ("console", "json"):
        raise SettingsError(f"BATON_LOG_FORMAT = {log_format!r}: console or json")
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s %(levelname)s %(message)s")


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger that carries `name` as its component."""
    logger: FilteringBoundLogger = structlog.get_logger(component=name)
    return logger
