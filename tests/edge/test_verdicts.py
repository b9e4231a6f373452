"""Streams cut into reads in every way, long lines, texts that pretend, and whole answers with one sign of failure each."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.events import Failure, Protocol, Route, Usage
from edge.verdicts import (
    LINE_KEEP_BYTES,
    REPEATS,
    TAIL_BYTES,
    StreamJudge,
    ends_in_repeats,
    error_text,
    judge_whole,
    usage_of,
    whole_fault,
)

PRETENDERS = [
    '"done":true',
    '\n{"error":"x"}\n',
    "data: [DONE]",
    '{"done":true}',
    '\\"done\\":true',
    "event: message_stop",
    '","done":true,"x":"',
]


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def judged(body: bytes, cuts: list[int], *, sse: bool = False) -> StreamJudge:
    judge = StreamJudge(sse=sse)
    places = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    for begin, end in itertools.pairwise(places):
        judge.feed(body[begin:end])
    return judge


def ndjson_oracle(body: bytes) -> tuple[bool, bool]:
    """(ends properly, with an error), by parsing the last line."""
    lines = [line for line in body.split(b"\n") if line.strip()]
    try:
        last = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return False, False
    return last.get("done") is True or "error" in last, "error" in last


texts = st.one_of(st.sampled_from(PRETENDERS), st.text(max_size=20))
lines = st.builds(
    lambda text, done, arguments, order: compact(
        {"message": {"content": text, "tool_calls": [{"arguments": arguments}]}, **({"done": done} if done is not None else {})}
        if order
        else {"response": text, **({"done": done} if done is not None else {}), "context": [1, 2, 3]}
    ),
    texts,
    st.sampled_from([True, False, None]),
    st.sampled_from([{}, {"done": True}, {"error": "x"}, {"done": [True]}]),
    st.booleans(),
)
errors = st.builds(lambda text: compact({"error": text}), texts)


@given(st.lists(st.one_of(lines, errors), min_size=1, max_size=5), st.lists(st.integers(0, 5000), max_size=12), st.integers(0, 60))
def test_an_ndjson_stream_is_judged_by_its_last_line_however_it_was_read(parts: list[bytes], cuts: list[int], lost: int) -> None:
    body = b"\n".join(parts) + b"\n"
    body = body[: max(1, len(body) - lost)]
    judge = judged(body, cuts)
    end = judge.end()
    assert (end.proper, end.error is not None) == ndjson_oracle(body)
    assert judge.mid_line is not body.endswith(b"\n")


@settings(max_examples=30)
@given(
    st.sampled_from([(True, []), (False, []), (True, [7] * 9), (False, [{"done": True}] * 9)]),
    st.sampled_from(["context", "arguments", "logprobs"]),
    st.lists(st.integers(0, 400_000), max_size=6),
    st.booleans(),
)
def test_long_lines_are_judged_at_their_top_level(case: tuple[bool, list[Any]], where: str, cuts: list[int], more: bool) -> None:
    done, fill = case
    filling = {"a": "x" * 150_000, "done": not done, "error": "no", "f": fill * 1000}
    value: dict[str, Any] = {"message": {"content": '"done":true'}, "done": done, "eval_count": 5}
    if where == "arguments":
        value["message"]["tool_calls"] = filling
    else:
        value[where] = filling
        value["eval_count"] = value.pop("eval_count")
    body = b'{"response":"a","done":false}\n' + compact(value) + b"\n" + (b'{"response":"b","done":true}\n' if more else b"")
    judge = judged(body, [*cuts, 70_000, 140_000])
    assert judge.end().proper is (done or more)
    assert judge.end().error is None
    assert not judge.mid_line
    if not more:
        assert judge.usage(Protocol.NATIVE) == Usage(output_tokens=5)
    assert len(judge._held) <= LINE_KEEP_BYTES + max(cuts, default=0) + 300_000


def test_a_long_line_is_not_held() -> None:
    judge = StreamJudge(sse=False)
    judge.feed(b'{"done":true,"context":[')
    for _ in range(100):
        judge.feed(b"12345," * 10_000)
        assert len(judge._held) < 3 * LINE_KEEP_BYTES
    judge.feed(b'1],"eval_count":7}')
    assert judge.mid_line
    judge.feed(b"\n")
    assert judge.end().proper
    assert judge.usage(Protocol.NATIVE) == Usage(output_tokens=7)


def test_a_long_event_is_known_by_its_head() -> None:
    judge = StreamJudge(sse=True)
    judge.feed(b'event: response.output_text.delta\ndata: {"delta":"x"}\n\nevent: response.completed\ndata: {"output":"')
    for _ in range(20):
        judge.feed(b"event: error " * 5000)
        assert not judge.end().proper
    judge.feed(b'","usage":{"input_tokens":3,"output_tokens":4}}\n')
    judge.feed(b"\n")
    assert judge.end().proper
    assert judge.end().error is None
    assert judge.usage(Protocol.RESPONSES) == Usage(prompt_tokens=3, output_tokens=4)


SSE_BODIES = [
    (b'data: {"a":1}\n\ndata: [DONE]\n\n', True, None),
    (b'data: {"a":"data: [DONE]"}\n\n', False, None),
    (b'data: {"a":1}\n\ndata: {"error":{"message":"no \\"way\\""}}\n\n', True, 'no "way"'),
    (b'event: error\ndata: {"type":"error","error":{"type":"x","message":"gone"}}\n\n', True, "gone"),
    (b'event: error\ndata: {"type":"error"}\n\n', True, "the node told an error"),
    (b'event: message_delta\ndata: {"usage":{"output_tokens":2}}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n', True, None),
    (b'event: message_delta\ndata: {"usage":{"output_tokens":2}}\n\n', False, None),
    (b'event: response.incomplete\ndata: {"type":"response.incomplete"}\n\n', True, None),
    (b'event: response.failed\ndata: {"response":{"error":{"code":"x","message":"bad"}}}\n\n', True, "bad"),
    (b'event: response.completed\ndata: {"type":', False, None),
    (b"data: [DONE]", True, None),
    (b": comment\n\n", False, None),
]


@given(st.sampled_from(SSE_BODIES), st.lists(st.integers(0, 300), max_size=8))
def test_an_event_stream_is_judged_by_its_last_events(case: tuple[bytes, bool, str | None], cuts: list[int]) -> None:
    body, proper, error = case
    judge = judged(body, cuts, sse=True)
    assert (judge.end().proper, judge.end().error) == (proper, error)
    assert judge.mid_line is not body.endswith(b"\n\n")


def test_a_stream_of_which_nothing_came_has_no_end() -> None:
    for sse in (False, True):
        judge = StreamJudge(sse=sse)
        assert not judge.end().proper
        assert not judge.mid_line
        assert judge.usage(Protocol.NATIVE) is None


def test_a_last_line_that_is_no_utf8_is_read_all_the_same() -> None:
    judge = judged(b'{"response":"\xff","done":true}\n', [])
    assert judge.end().proper
    judge = judged(b'{"error":"\\ud800"}\n', [])
    assert judge.end().error == "\ufffd"
    assert judged(b'{"error":{"message":"x"}}\n', []).end().error == '{"message":"x"}'


# ---------------------------------------------------------------- usage and texts


def test_usage_is_read_per_protocol() -> None:
    counts = b'"prompt_eval_count":7,"prompt_eval_duration":6,"eval_count":5,"eval_duration":4}'
    native = b'{"done":true,"total_duration":9,"load_duration":8,' + counts
    assert usage_of(native, Protocol.NATIVE) == Usage(total_ns=9, load_ns=8, prompt_tokens=7, prompt_ns=6, output_tokens=5, eval_ns=4)
    assert usage_of(native, Protocol.OPENAI) is None
    openai = b'{"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'
    assert usage_of(openai, Protocol.OPENAI) == Usage(prompt_tokens=3, output_tokens=2)
    assert usage_of(b'"usage":{"prompt_tokens":0,"completion_tokens":0}', Protocol.OPENAI) is None
    anthropic = b'{"usage":{"input_tokens":9,"output_tokens":0}}\n\n{"usage":{"input_tokens":3,"output_tokens":2}}'
    assert usage_of(anthropic, Protocol.ANTHROPIC) == Usage(prompt_tokens=3, output_tokens=2)
    assert usage_of(b'"eval_count":1e5,"eval_duration":99999999999999999999,"load_duration":1.5', Protocol.NATIVE) is None


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error":"x \\u003c y"}', "x < y"),
        (b'{"error":{"message":"x","type":"api_error","param":null}}', "x"),
        (b'{"type":"error","error":{"type":"api_error","message":"x"}}', "x"),
        (b'{"error":{"code":5}}', '{"error":{"code":5}}'),
        (b'{"error":5}', '{"error":5}'),
        (b"404 page \xff", "404 page \ufffd"),
        (b"", ""),
        (b"x" * 5000, "x" * 4096),
    ],
)
def test_error_texts(body: bytes, text: str) -> None:
    assert error_text(body) == text


@given(st.text(alphabet="abc é\n", min_size=1, max_size=12).filter(str.strip), st.text(max_size=10), st.integers(1, 40))
def test_the_repeat_guard_is_known_by_its_equal_tokens(token: str, before: str, times: int) -> None:
    text = before + token * times
    if times >= REPEATS:
        assert ends_in_repeats(text)
        assert ends_in_repeats(before + "".join(token.strip() + " \n"[i % 2] for i in range(times)))


@pytest.mark.parametrize("text", ["", "no " * 29, "a b " * 14 + "x", "x" * 29, " " * 29, "word " * 31 + "end", "\n" * 29 + "x"])
def test_other_texts_do_not_look_like_it(text: str) -> None:
    assert not ends_in_repeats(text)


def test_blank_tokens_repeat_too() -> None:
    assert ends_in_repeats("word" + "\n" * 30)


@pytest.mark.parametrize("sse", [False, True])
def test_equal_tokens_of_a_stream(sse: bool) -> None:
    def stream(tokens: list[str]) -> StreamJudge:
        judge = StreamJudge(sse=sse)
        for token in tokens:
            judge.feed(b"data: " + compact({"delta": {"content": token}}) + b"\n\n" if sse else compact({"response": token}) + b"\n")
        return judge

    assert stream(["a", "b", *["no", " no", "no "] * 10]).ends_in_repeats()
    assert stream(["a", *["\n", " "] * 15]).ends_in_repeats()
    assert not stream(["no"] * 29).ends_in_repeats()
    assert not stream([*["no"] * 30, "yes"]).ends_in_repeats()


# ---------------------------------------------------------------- whole answers

SPENT = {"input_tokens": 3, "output_tokens": 0}
NOTHING = {"input_tokens": 0, "output_tokens": 0}
GOOD = {
    Route.CHAT: {"model": "m", "created_at": "2026-11-22T12:28:43Z", "message": {"role": "assistant", "content": "hi"}, "done": True},
    Route.GENERATE: {"model": "m", "created_at": "2026-11-22T12:28:43Z", "response": "hi", "done": True},
    Route.V1_CHAT: {"created": 5, "model": "m", "choices": [{"message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]},
    Route.V1_COMPLETIONS: {"created": 5, "model": "m", "choices": [{"text": "hi", "finish_reason": "stop"}]},
    Route.V1_RESPONSES: {"created_at": 5, "status": "completed", "output": [{"content": [{"text": "hi"}]}], "usage": SPENT},
    Route.V1_MESSAGES: {"type": "message", "model": "m", "content": [{"type": "text", "text": "hi"}], "stop_reason": "end_turn"},
    Route.EMBED: {"model": "m", "embeddings": []},
}  # fmt: skip
REPEATED = " no" * 31
BROKEN: list[tuple[Route, dict[str, Any], Failure, bool]] = [
    (Route.CHAT, {"created_at": "0001-01-01T00:00:00Z", "done": False}, Failure.BLANK, False),
    (Route.CHAT, {"done": False}, Failure.INCOMPLETE, False),
    (Route.CHAT, {"done": False, "message": {"content": REPEATED}}, Failure.INCOMPLETE, True),
    (Route.CHAT, {"done": False, "message": {"content": "", "thinking": REPEATED}}, Failure.INCOMPLETE, True),
    (Route.GENERATE, {"done": False, "response": REPEATED}, Failure.INCOMPLETE, True),
    (Route.GENERATE, {"created_at": "0001-01-01T00:00:00Z"}, Failure.BLANK, False),
    (Route.V1_CHAT, {"created": -62135596800}, Failure.BLANK, False),
    (Route.V1_CHAT, {"choices": [{"message": {"content": REPEATED}, "finish_reason": None}]}, Failure.INCOMPLETE, True),
    (Route.V1_COMPLETIONS, {"choices": [{"text": "hi", "finish_reason": None}]}, Failure.INCOMPLETE, False),
    (Route.V1_RESPONSES, {"created_at": -62135596800}, Failure.BLANK, False),
    (Route.V1_RESPONSES, {"usage": NOTHING, "output": [{"content": [{"text": REPEATED}]}]}, Failure.INCOMPLETE, True),
    (Route.V1_RESPONSES, {"usage": NOTHING, "output": None}, Failure.INCOMPLETE, False),
    (Route.V1_MESSAGES, {"model": "", "content": None, "stop_reason": None}, Failure.BLANK, False),
    (Route.V1_MESSAGES, {"stop_reason": None}, Failure.INCOMPLETE, False),
    (Route.V1_MESSAGES, {"stop_reason": None, "content": None}, Failure.INCOMPLETE, False),
]  # fmt: skip


@pytest.mark.parametrize(("route", "changes", "failure", "guard"), BROKEN)
def test_a_broken_whole_answer_is_known_by_its_signs(route: Route, changes: dict[str, Any], failure: Failure, guard: bool) -> None:
    assert whole_fault(route, compact(GOOD[route])) is None
    fault = whole_fault(route, compact(GOOD[route] | changes))
    assert fault is not None
    assert (fault.failure, fault.repeat_guard) == (failure, guard)


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (
            Route.CHAT,
            {"message": {"content": "x", "tool_calls": [{"arguments": {"done": False, "created_at": "0001-01-01"}}]}, "done": True},
        ),
        (Route.CHAT, {"done": False, "_debug_info": {"rendered_template": "hi"}}),
        (Route.GENERATE, {"response": '"done":false', "done": True}),
        (Route.V1_CHAT, {"choices": [{"message": {"content": {"finish_reason": None}}, "finish_reason": "stop"}]}),
        (Route.V1_CHAT, {"choices": [], "x": {"finish_reason": None}}),
        (Route.V1_RESPONSES, {"status": "completed", "usage": {"input_tokens": 0, "output_tokens": 5}}),
        (Route.V1_MESSAGES, {"type": "other"}),
        (Route.SHOW, {"done": False}),
        (Route.EMBED, {"created_at": "0001-01-01T00:00:00Z"}),
    ],
)
def test_other_whole_answers_are_good(route: Route, body: dict[str, Any]) -> None:
    assert whole_fault(route, compact(body)) is None


def test_what_is_no_json_is_not_judged_and_nothing_is_empty() -> None:
    assert whole_fault(Route.CHAT, b'"done":false}') is None
    assert whole_fault(Route.CHAT, b'{"done":false,"response":"\xff"}') is None
    fault = whole_fault(Route.SHOW, b"")
    assert fault is not None
    assert fault.failure is Failure.EMPTY


COUNTS = {"prompt_eval_count": 3, "eval_count": 4, "total_duration": 5, "load_duration": 6, "prompt_eval_duration": 7, "eval_duration": 8}
ODD = {
    "eval_count": "many",
    "done": None,
    "created_at": 5,
    "total_duration": -1,
    "message": {"content": "x" * TAIL_BYTES},
    "load_duration": 0,
}


@given(
    st.sampled_from(list(GOOD)),
    st.sampled_from([{}, *(changes for _, changes, _, _ in BROKEN)]),
    st.sampled_from([{}, COUNTS, {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}]),
    st.dictionaries(st.sampled_from(list(ODD)), st.none(), max_size=2),
    st.sampled_from([b"", b"\n", b" ", b"\n\n", b"x"]),
    st.integers(0, 3),
)
def test_one_look_at_a_whole_answer_tells_what_two_do(
    route: Route, changes: dict[str, Any], counts: dict[str, Any], odd: dict[str, None], end: bytes, cut: int
) -> None:
    body = compact(GOOD[route] | changes | counts | {name: ODD[name] for name in odd})
    body = body[: len(body) - cut] + end
    assert judge_whole(route, body) == (whole_fault(route, body), usage_of(body[-TAIL_BYTES:], route.protocol))


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"done":false}', b'{"created_at":"\xff","eval_count":3}', b'{\n"eval_count":3}', b"[" * 3000]
)
def test_odd_whole_answers_are_judged_alike(body: bytes) -> None:
    assert judge_whole(Route.CHAT, body) == (whole_fault(Route.CHAT, body), usage_of(body[-TAIL_BYTES:], Protocol.NATIVE))
