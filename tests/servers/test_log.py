"""The form of log lines."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from servers import log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def test_json_where_nobody_looks_one_object_per_line() -> None:
    out = io.StringIO()
    log.configure("info", None, stream=out)
    structlog.get_logger().info("node is offline", agent="gpu1\n{}", text="déjà")
    structlog.get_logger().debug("not asked for")
    (line,) = out.getvalue().splitlines()
    fields = json.loads(line)
    assert (fields["event"], fields["level"], fields["agent"]) == ("node is offline", "info", "gpu1\n{}")
    assert fields["timestamp"].endswith("Z")


def test_words_on_a_terminal_and_a_name_cannot_begin_a_line() -> None:
    out = Terminal()
    log.configure("debug", None, stream=out)
    structlog.get_logger().debug("node is offline", agent="gpu1\nerror everything is lost")
    assert "node is offline" in out.getvalue()
    assert len(out.getvalue().splitlines()) == 1


@pytest.mark.parametrize("name", ["token", "agent_token", "gateway_credential", "Authorization", "api_key", "fleet_secret"])
@pytest.mark.parametrize("form", ["json", "console"])
def test_secrets_are_not_printed(form: str, name: str) -> None:
    out = io.StringIO()
    log.configure("info", form, stream=out)
    structlog.get_logger().info("x", **{name: "s3cr3t"})
    assert "s3cr3t" not in out.getvalue()


def test_lines_of_libraries_take_our_form() -> None:
    out = io.StringIO()
    log.configure("info", "json", stream=out)
    logging.getLogger("hypercorn.error").error("it broke: %s", "badly")
    logging.getLogger("hypercorn.error").info("not asked for")
    (line,) = out.getvalue().splitlines()
    assert json.loads(line)["event"] == "it broke: badly"


def test_exceptions_are_told_in_the_log() -> None:
    out = io.StringIO()
    log.configure("info", "json", stream=out)
    structlog.get_logger().error("request failed", exc_info=ValueError("why"))
    assert "ValueError: why" in json.loads(out.getvalue())["exception"]
