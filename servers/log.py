"""How the coordinator speaks to its operator: one structured line per fact, readable on a terminal, JSON elsewhere.

Decides the form of a line, never what is worth one. Invariants: a value under a name that sounds like a secret is not printed;
a line never contains a prompt or an answer (nobody passes them in); text from outside cannot start a line of its own.
"""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final, TextIO

import structlog

_SECRET_NAMES: Final = ("token", "secret", "credential", "authorization", "api_key", "cookie", "password")
_LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(level: str, form: str | None, *, stream: TextIO | None = None) -> None:
    """Set up logging of this process. `form`: `console`, `json`, or None to choose by whether `stream` (stderr) is a terminal."""
    out = stream if stream is not None else sys.stderr
    terminal = out.isatty()
    console = form == "console" or (form is None and terminal)
    processors: list[structlog.types.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if not console else "%H:%M:%S", utc=not console),
        hide_secrets,
    ]
    if console:
        processors.append(structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=structlog.dev.plain_traceback))
    else:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=False,
    )
    _adopt_libraries()


def hide_secrets(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: values whose names sound like secrets are starred out."""
    for name in line:
        if any(secret in name.lower() for secret in _SECRET_NAMES):
            line[name] = "***"
    return line


class _Adopted(logging.Handler):
    """Lines of libraries that use `logging`, in our form."""

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelno if record.levelno in _LEVELS.values() else logging.WARNING
        structlog.get_logger().log(level, record.getMessage(), logger=record.name, exc_info=record.exc_info)


def _adopt_libraries() -> None:
    for name in ("hypercorn.error", "quart.app", "servers.web"):
        logger = logging.getLogger(name)
        logger.handlers = [_Adopted()]
        logger.setLevel(logging.WARNING)
        logger.propagate = False
