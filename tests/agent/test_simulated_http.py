"""The simulated Ollama against recorded conversations about HTTP itself: framing, odd heads, pipelining."""

from typing import Any

import pytest
import trio

from agent.simulated import SimulatedOllama, recorded_models
from tests.agent.conversations import Conversation, load, replay
from tests.fleet.rawhttp import ask, raw_request

PARSER = "its parser is stricter than Go's, or refuses in other words"
NOT_THE_SAME = {
    "http/bad-version": PARSER,
    "http/space-before-colon": PARSER,
    "http/te-gzip": PARSER,
    "http/te-identity": PARSER,
    "http/te-xchunked": PARSER,
    "http/cl-and-te": PARSER,
    "http/cl-twice-equal": PARSER,
    "http/lower-method": PARSER,
    "http/lf-only": PARSER,
    "http/obs-fold": PARSER,
    "http/chunk-bad-size": PARSER,
    "http/chunk-huge": PARSER,
    "http/chunk-lf": PARSER,
    "http/h2-preface": PARSER,
    "http/garbage": "no HTTP at all",
    "http/tls-hello": "no HTTP at all",
    "http/connect": "Go's own 404, which no route gives",
    "http/options-star": "Go's own answer, which no route gives",
    "http/expect-continue-error": "a client that never sends the body that it announced",
    "http/half-close": "half-closes the connection: in test_simulated_server",
}


def cases() -> list[Any]:
    return [pytest.param(conversation, id=conversation.case) for conversation in load("http") if conversation.case not in NOT_THE_SAME]


def node() -> SimulatedOllama:
    return SimulatedOllama(models=recorded_models(), version="0.33.0-rc2", speed=200, load_s=0.0)


@pytest.mark.parametrize("conversation", cases())
async def test_recorded_conversations_about_http_go_the_same_way(conversation: Conversation) -> None:
    async with node().serve() as sim:
        assert await replay(conversation, sim.port) == []


def test_every_exception_is_about_a_recording() -> None:
    assert set(NOT_THE_SAME) <= {conversation.case for conversation in load("http")}


async def test_a_request_without_a_host_or_with_two_is_refused() -> None:
    async with node().serve() as sim:
        none = await raw_request(sim.port, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        two = await raw_request(sim.port, b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert none.startswith(b"HTTP/1.1 400 Bad Request: missing required Host header\r\n")
    assert two.startswith(b"HTTP/1.1 400 Bad Request\r\n")


async def test_nothing_is_answered_before_the_start_and_no_lists_before_the_models_are_read() -> None:
    began = trio.current_time()
    async with SimulatedOllama(models=recorded_models(), startup_s=0.05, tags_s=0.1).serve() as sim:
        await ask(sim.port, "GET", "/api/version")
        await ask(sim.port, "GET", "/api/tags")
        version, tags = sim.log
    assert version.first_byte is not None
    assert tags.first_byte is not None
    assert version.first_byte - began >= 0.05
    assert tags.first_byte - began >= 0.15
