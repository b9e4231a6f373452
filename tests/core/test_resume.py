"""What may be resumed, what is kept of an answer, and what becomes of the rest."""

import json
from typing import Any

import pytest

from core.events import AttemptEnded, Count, Failure, Note, Route
from core.names import normalise
from core.resume import TEXT_MAX_BYTES, Asked, Rest, Transcript, begin_resume, may_resume, thinks, tokens_left
from core.units import RequestId
from tests.core.routing import World

USER = [{"role": "user", "content": "a"}]
CHAT = {"model": "m", "messages": USER, "stream": True}
RAW = {"model": "m", "prompt": "a", "raw": True}


def asked(route: Route, body: dict[str, Any]) -> Asked | None:
    return may_resume(route, body.items())


@pytest.mark.parametrize(
    ("route", "body", "expected"),
    [
        (Route.CHAT, CHAT, Asked(Route.CHAT, None, True)),
        (Route.CHAT, {**CHAT, "think": False, "tools": [], "format": "", "options": None}, Asked(Route.CHAT, None, False)),
        (Route.CHAT, {**CHAT, "options": {"num_predict": 5}}, Asked(Route.CHAT, 5, True)),
        (Route.CHAT, {**CHAT, "options": {"num_predict": -1}}, Asked(Route.CHAT, None, True)),
        (Route.GENERATE, RAW, Asked(Route.GENERATE, None, False)),
        (Route.V1_CHAT, {**CHAT, "max_tokens": 7, "response_format": {"type": "text"}, "n": 1}, Asked(Route.V1_CHAT, 7, True)),
    ],
)
def test_plain_text_may_be_resumed(route: Route, body: dict[str, Any], expected: Asked) -> None:
    assert asked(route, body) == expected


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (Route.EMBED, {"model": "m"}),
        (Route.V1_MESSAGES, CHAT),
        (Route.CHAT, {**CHAT, "tools": [{}]}),
        (Route.CHAT, {**CHAT, "format": "json"}),
        (Route.CHAT, {**CHAT, "logprobs": True}),
        (Route.CHAT, {**CHAT, "think": "low"}),
        (Route.CHAT, {**CHAT, "think": True}),
        (Route.CHAT, {**CHAT, "unknown": 1}),
        (Route.CHAT, {**CHAT, "options": 5}),
        (Route.CHAT, {**CHAT, "options": {"num_predict": "5"}}),
        (Route.CHAT, {**CHAT, "messages": []}),
        (Route.CHAT, {**CHAT, "messages": "a"}),
        (Route.CHAT, {**CHAT, "messages": ["a"]}),
        (Route.CHAT, {**CHAT, "messages": [*USER, {"role": "assistant", "content": "b"}]}),
        (Route.CHAT, {**CHAT, "messages": [{"role": "user", "content": "a", "tool_calls": []}]}),
        (Route.GENERATE, {"model": "m", "prompt": "a"}),
        (Route.GENERATE, {**RAW, "prompt": ""}),
        (Route.GENERATE, {**RAW, "suffix": "b"}),
        (Route.V1_CHAT, {**CHAT, "n": 2}),
        (Route.V1_CHAT, {**CHAT, "response_format": {"type": "json_object"}}),
        (Route.V1_CHAT, {**CHAT, "max_tokens": True}),
    ],
)
def test_everything_else_may_not(route: Route, body: dict[str, Any]) -> None:
    assert asked(route, body) is None


def test_a_member_that_is_there_twice_is_in_doubt() -> None:
    assert may_resume(Route.CHAT, [*CHAT.items(), ("stream", True)]) is None


def test_who_thinks() -> None:
    rows = ["x", {"name": 5}, {"name": "a"}, {"name": "m:latest", "capabilities": ["completion", "thinking"]}]
    assert thinks(rows, normalise("m"))
    assert not thinks(rows, normalise("a"))
    assert not thinks(rows, normalise("b"))


# ---------------------------------------------------------------- what was sent


def line(**said: Any) -> bytes:
    return json.dumps({"model": "m", "done": False, **said}).encode() + b"\n"


def event(delta: dict[str, Any], **said: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": said.pop("finish_reason", None)}
    return b"data: " + json.dumps({"id": "c-1", "created": 5, "model": "m", "choices": [choice], **said}).encode() + b"\n\n"


def test_text_is_kept_and_counted() -> None:
    sent = Transcript()
    for content in ("a", "", "\u00e9\U0001f600"):
        assert sent.take(line(message={"role": "assistant", "content": content}))
    assert sent.take(line(response="b"))
    assert sent.take(b"\n")
    assert (sent.text, sent.tokens, sent.plain) == ("a\u00e9\U0001f600b", 3, True)
    stream = Transcript()
    assert stream.take(event({"role": "assistant", "content": "a"}))
    assert stream.take(event({"content": "b"}, id="other"))
    assert (stream.text, stream.id, stream.created, stream.plain) == ("ab", "c-1", 5, True)


@pytest.mark.parametrize(
    "odd",
    [
        line(message={"content": "", "thinking": "hm"}),
        line(response="", thinking="hm"),
        line(message={"content": "", "tool_calls": [{}]}),
        line(message={"content": "a"}, logprobs=[{}]),
        line(done=True),
        event({"content": "", "reasoning": "hm"}),
        event({}, finish_reason="stop"),
        b"no json\n",
        b'{"message":5}\n',
        b"data: [DONE]\n\n",
    ],
)
def test_anything_else_ends_it(odd: bytes) -> None:
    sent = Transcript()
    assert sent.take(odd)
    assert not sent.plain
    assert sent.take(b'{"error":"x"}\n')


@pytest.mark.parametrize("told", [b'{"error":"x"}\n', b'data: {"error":{"message":"x"}}\n\n', event({"content": ""}, model="")])
def test_what_tells_a_failure_is_held_back(told: bytes) -> None:
    sent = Transcript()
    assert not sent.take(told)
    assert sent.plain


def test_what_is_kept_is_bounded() -> None:
    sent = Transcript()
    sent.take(line(response="a" * TEXT_MAX_BYTES))
    assert sent.plain
    sent.take(line(response="a"))
    assert (sent.plain, sent.text) == (False, "")


def test_what_is_left_of_a_limit() -> None:
    sent = Transcript()
    sent.take(line(response="a"))
    assert tokens_left(Asked(Route.CHAT, None, False), sent) is None
    assert tokens_left(Asked(Route.CHAT, 3, False), sent) == 2
    assert tokens_left(Asked(Route.CHAT, 1, False), sent) == 0
    assert tokens_left(Asked(Route.CHAT, 0, False), sent) == 0


# ---------------------------------------------------------------- the rest


def test_the_rest_passes_as_it_is_and_its_counts_are_those_of_the_whole() -> None:
    sent = Transcript()
    sent.take(line(response="a"))
    sent.take(line(response="b"))
    rest = Rest(sent, before_ns=1000)
    for untouched in (line(response='"done":true'), b'{"x":"y","done":true', b'[{"done":true}]', b'{"a":{"done":true}}', b"\n"):
        assert rest.rewrite(untouched.replace(b'" : ', b'":')) == untouched
    last = b'{"done":true,"total_duration":5,"prompt_eval_count":12,"eval_count":3,"eval_duration":7}\n'
    whole = b'{"done":true,"total_duration":1005,"prompt_eval_count":10,"eval_count":5,"eval_duration":1007}\n'
    assert rest.rewrite(last) == whole
    assert (
        rest.rewrite(b'{"done":true,"prompt_eval_count":1,"eval_count":"x"}\n') == b'{"done":true,"prompt_eval_count":0,"eval_count":"x"}\n'
    )


def test_events_of_the_rest_belong_to_the_first() -> None:
    sent = Transcript()
    sent.take(event({"role": "assistant", "content": "a"}))
    rest = Rest(sent, before_ns=0)
    assert rest.rewrite(event({"role": "assistant", "content": "b"}, id="c-2", created=9)) == event({"content": "b"}).replace(
        b'": ', b'":'
    ).replace(b", ", b",")
    assert rest.rewrite(b"data: [DONE]\n\n") == b"data: [DONE]\n\n"
    for untouched in (b"data: {\n\n", b"data: []\n\n", b'data: {"error":{}}\n\n'):
        assert rest.rewrite(untouched) == untouched
    odd = b'data: {"id":"c-2","created":1,"choices":[5,{"delta":6}],"usage":{"prompt_tokens":4,"completion_tokens":2,"total_tokens":6}}\n\n'
    said = json.loads(rest.rewrite(odd)[6:])
    assert (said["id"], said["usage"]) == ("c-1", {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6})
    assert json.loads(rest.rewrite(b'data: {"id":"c-2","choices":null}\n\n')[6:])["created"] == 5


def test_what_is_told_of_it() -> None:
    world = World()
    for name in ("one", "two"):
        world.backend(name, "m", loaded=("m",))
    world.ask("r1")
    world.first("r1")
    note, count = begin_resume(world.router._requests[RequestId("r1")], AttemptEnded(request_id=RequestId("r1"), failure=Failure.DIED))
    assert isinstance(note, Note)
    assert isinstance(count, Count)
    assert (note.event, count.name) == ("the rest of an answer is asked of another node", "resumes_total")
    assert world.router._requests[RequestId("r1")].resumed
