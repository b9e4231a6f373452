"""Streams put together: each protocol's shape, cut and broken ones, and that nothing raises."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import joining
from core.events import Protocol
from core.joining import joined


def ndjson(*lines: Any) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def sse(*events: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


def read(protocol: Protocol, stream: bytes) -> Any:
    found = joined(protocol, stream)
    return json.loads(found) if found else None


def test_a_chat_of_ollama() -> None:
    stream = ndjson(
        {"model": "m", "created_at": "1", "message": {"role": "assistant", "content": "", "thinking": "hm"}, "done": False},
        {"model": "m", "created_at": "2", "message": {"role": "assistant", "content": "Hel"}, "done": False, "logprobs": [1]},
        {"model": "m", "created_at": "3", "message": {"role": "assistant", "content": "lo", "tool_calls": [{"id": 1}]}, "done": False},
        {"model": "m", "created_at": "4", "message": {"role": "assistant", "content": ""}, "done": True, "eval_count": 2},
    )
    message = {"role": "assistant", "content": "Hello", "thinking": "hm", "tool_calls": [{"id": 1}]}
    assert read(Protocol.NATIVE, stream) == {
        "model": "m", "created_at": "4", "done": True, "eval_count": 2, "message": message, "logprobs": [1],
    }  # fmt: skip


def test_a_generation_that_was_cut_within_a_line() -> None:
    stream = ndjson({"model": "m", "response": "a", "done": False}, {"model": "m", "response": "b", "done": False}) + b'{"model":"m","resp'
    assert read(Protocol.NATIVE, stream) == {"model": "m", "response": "ab", "done": False}
    with_error = stream + b"\n" + ndjson({"error": "the node died"})
    assert read(Protocol.NATIVE, with_error) == {"model": "m", "response": "ab", "done": False, "error": "the node died"}


def test_tool_calls_and_thinking_of_a_generation() -> None:
    stream = ndjson({"response": "", "thinking": "a", "tool_calls": [{"x": 1}], "done": True})
    assert read(Protocol.NATIVE, stream) == {"done": True, "thinking": "a", "tool_calls": [{"x": 1}]}


def test_a_chat_of_openai() -> None:
    def chunk(delta: Any, finish: str | None = None) -> Any:
        return {
            "id": "c1", "object": "chat.completion.chunk", "created": 5, "model": "m",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        }  # fmt: skip

    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":'}}
    more = {"index": 0, "id": None, "function": {"arguments": "1}"}}
    stream = (
        sse(
            chunk({"role": "assistant", "content": "Hel"}),
            chunk({"content": "lo", "reasoning": "so"}),
            chunk({"tool_calls": [call]}),
            chunk({"tool_calls": [more, {"index": "x"}]}),
            chunk({}, "tool_calls"),
            {"id": "", "object": "chat.completion.chunk", "choices": [], "usage": {"total_tokens": 3}},
        )
        + b"data: [DONE]\n\n"
    )
    function = {"name": "f", "arguments": '{"a":1}'}
    made = {"function": function, "id": "call_1", "type": "function"}
    message = {"role": "assistant", "content": "Hello", "reasoning": "so", "tool_calls": [made]}
    assert read(Protocol.OPENAI, stream) == {
        "id": "c1", "object": "chat.completion", "created": 5, "model": "m", "usage": {"total_tokens": 3},
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
    }  # fmt: skip


def test_completions_of_openai_and_an_index_that_is_none() -> None:
    stream = sse(
        {"object": "text_completion", "choices": [{"index": 1, "text": "b"}, {"index": 0, "text": "a"}, {"index": "z", "text": "?"}]},
        {"object": "text_completion", "choices": [{"index": 0, "text": "c", "finish_reason": "stop"}]},
    )
    assert read(Protocol.OPENAI, stream) == {
        "object": "text_completion",
        "choices": [{"index": 0, "text": "ac", "finish_reason": "stop"}, {"index": 1, "text": "b"}],
    }


def test_responses_of_openai_whole_and_cut() -> None:
    created = {"type": "response.created", "response": {"id": "r", "status": "in_progress"}}
    deltas = [{"type": "response.output_text.delta", "delta": piece} for piece in ("Hel", "lo")]
    done = {"type": "response.completed", "response": {"id": "r", "status": "completed", "output": [1]}}
    assert read(Protocol.RESPONSES, sse(created, *deltas, done)) == {"id": "r", "status": "completed", "output": [1]}
    assert read(Protocol.RESPONSES, sse(created, *deltas)) == {"id": "r", "status": "in_progress", "output_text": "Hello"}
    assert read(Protocol.RESPONSES, sse(created, {"type": "x"}, {"error": {"message": "no"}})) == {
        "id": "r", "status": "in_progress", "error": {"message": "no"},
    }  # fmt: skip


def test_messages_of_anthropic() -> None:
    stream = sse(
        {"type": "message_start", "message": {"id": "m1", "role": "assistant", "content": [], "usage": {"input_tokens": 4}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "name": "f", "input": {}}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"a":'}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": "1}"}},
        {"type": "content_block_delta", "index": "?", "delta": {"thinking": "hm"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
        {"type": "message_stop"},
    )
    assert read(Protocol.ANTHROPIC, stream) == {
        "id": "m1", "role": "assistant", "usage": {"input_tokens": 4, "output_tokens": 2}, "stop_reason": "end_turn",
        "content": [{"type": "text", "text": "Hello", "thinking": "hm"}, {"type": "tool_use", "name": "f", "input": {"a": 1}}],
    }  # fmt: skip


def test_messages_of_anthropic_that_were_cut() -> None:
    stream = sse(
        {"type": "content_block_delta", "index": 0, "delta": {"partial_json": '{"a"'}}, {"type": "error", "error": {"message": "no"}}
    )
    assert read(Protocol.ANTHROPIC, stream) == {"error": {"message": "no"}, "content": [{"input": '{"a"'}]}


@pytest.mark.parametrize("protocol", list(Protocol))
@pytest.mark.parametrize("stream", [b"", b"\n\n", b"nonsense", b"data: [1]\n", b"[1]\n", b'{"\xff":1}', b"{" * 5000, b"data: {\n"])
def test_what_cannot_be_read_joins_to_nothing(protocol: Protocol, stream: bytes) -> None:
    assert joined(protocol, stream) == b""


def test_there_is_an_end_to_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "LINES_MAX", 2)
    assert read(Protocol.NATIVE, ndjson(*({"response": letter} for letter in "abc"))) == {"response": "ab"}
    events = [{"choices": [{"text": letter}]} for letter in "abc"]
    assert read(Protocol.OPENAI, sse(*events)) == {"choices": [{"index": 0, "text": "a"}]}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["message", "response", "choices", "delta", "tool_calls", "function", "index", "type", "content", "usage", "text"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.sampled_from(list(Protocol)), st.lists(json_values, max_size=4), st.integers(0, 200))
def test_no_stream_raises(protocol: Protocol, values: list[Any], cut: int) -> None:
    stream = ndjson(*values) if protocol is Protocol.NATIVE else sse(*values)
    for data in (stream, stream[:-cut]):
        found = joined(protocol, data)
        assert found == b"" or isinstance(json.loads(found), dict)
