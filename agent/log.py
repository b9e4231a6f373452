"""How an agent speaks to its operator: one line per fact, on standard output, and the last of them kept for `GET /logs`.

Decides the form of a line, never what is worth one. Invariants: at most `LINES_MAX` lines are kept; no line shows a token.
"""

import logging
import re
import sys
from collections import deque
from collections.abc import MutableMapping
from typing import Any, Final, TextIO

import structlog

LINES_MAX: Final = 2000
LINE_MAX_CHARS: Final = 4000
_LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_SECRETS: Final = ("token", "credential", "secret")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class LogTail:
    """A stream that passes lines on to `out` and remembers the last ones, without colours."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lines: deque[str] = deque(maxlen=LINES_MAX)

    def write(self, text: str) -> None:
        self._out.write(text)
        self._lines.extend(line[:LINE_MAX_CHARS] for line in _COLOUR.sub("", text).splitlines())

    def flush(self) -> None:
        self._out.flush()

    def last(self, count: int) -> list[str]:
        """The newest `count` lines, oldest first."""
        return list(self._lines)[-count:]


def configure(level: str, form: str | None, *, out: TextIO | None = None) -> LogTail:
    """Set up this process's log. `form`: `console`, `json`, or None to choose by whether `out` (standard output) is a terminal."""
    stream = out if out is not None else sys.stdout
    terminal = stream.isatty()
    console = form == "console" or (form is None and terminal)
    tail = LogTail(stream)
    renderer: structlog.types.Processor = structlog.processors.JSONRenderer()
    if console:
        renderer = structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
            _hide_secrets,
            *([] if console else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=tail),  # type: ignore[arg-type]  # it only writes and flushes
        cache_logger_on_first_use=False,
    )
    return tail


def _hide_secrets(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in line:
        if any(secret in name.lower() for secret in _SECRETS):
            line[name] = "***"
    return line
