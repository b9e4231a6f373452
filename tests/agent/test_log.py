"""An agent's log: readable lines, none with a secret, the last ones kept."""

import io
import json

import structlog

from agent import log


def test_console_lines_are_kept_without_colours() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    tail = log.configure("info", None, out=out)
    structlog.get_logger().info("agent started", port=1, join_token="hush", gateway_credential="hush")
    structlog.get_logger().debug("not said")
    tail.flush()
    assert "\x1b[" in out.getvalue()
    assert "hush" not in out.getvalue()
    (kept,) = tail.last(10)
    assert "\x1b" not in kept
    assert "agent started" in kept


def test_without_a_terminal_lines_are_json() -> None:
    out = io.StringIO()
    log.configure("debug", None, out=out)
    try:
        raise ValueError("x")
    except ValueError:
        structlog.get_logger().error("failed", exc_info=True)
    line = json.loads(out.getvalue())
    assert (line["event"], line["level"]) == ("failed", "error")
    assert "ValueError" in line["exception"]


def test_the_tail_is_bounded() -> None:
    tail = log.LogTail(io.StringIO())
    tail.write("x" * 100_000 + "\n")
    assert len(tail.last(1)[0]) == log.LINE_MAX_CHARS
    for number in range(log.LINES_MAX + 5):
        tail.write(f"{number}\n")
    assert len(tail.last(10**6)) == log.LINES_MAX
    assert tail.last(1) == [str(log.LINES_MAX + 4)]
