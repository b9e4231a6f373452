"""The OpenAI routes of a simulated node through the official client, and what only raw requests can ask."""

import json
import math
from typing import Any

import openai
import pytest
import trio

from agent.simulated import SimulatedOllama
from tests.fleet.rawhttp import ask

MODEL = "llama3.2:3b"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def node() -> SimulatedOllama:
    models = (MODEL, "qwen3:8b", "nomic-embed-text", "gemma3:4b")
    return SimulatedOllama(models=models, load_s=0.0, decode_tokens_s=2000.0, prefill_tokens_s=100_000.0)


async def with_client(use: Any) -> None:
    """Run `use(client)` in a thread, against a node of its own."""
    async with node().serve() as sim:
        client = openai.OpenAI(base_url=f"{sim.url}/v1", api_key="any", max_retries=0)
        await trio.to_thread.run_sync(use, client)
        client.close()


async def test_chat_whole_and_streamed() -> None:
    def use(client: openai.OpenAI) -> None:
        whole = client.chat.completions.create(model=MODEL, messages=HELLO, seed=3, stop="zzz")
        said = whole.choices[0].message.content
        assert said
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage is not None
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        parts = list(
            client.chat.completions.create(model=MODEL, messages=HELLO, seed=3, stream=True, stream_options={"include_usage": True})
        )
        assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == said
        assert parts[-1].choices == []
        assert parts[-1].usage == whole.usage
        assert parts[-2].choices[0].finish_reason == "stop"
        assert parts[0].choices[0].delta.role == "assistant"
        short = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3, stop=["zzz"])
        assert short.choices[0].finish_reason == "length"

    await with_client(use)


async def test_tools_reasoning_and_log_probabilities() -> None:
    def use(client: openai.OpenAI) -> None:
        asked: list[Any] = [{"role": "user", "content": "weather in Oslo"}]
        whole = client.chat.completions.create(model=MODEL, messages=asked, tools=[WEATHER]).choices[0]
        assert whole.finish_reason == "tool_calls"
        assert whole.message.tool_calls is not None
        call: Any = whole.message.tool_calls[0]
        assert json.loads(call.function.arguments) == {"city": "Oslo"}
        parts = list(client.chat.completions.create(model=MODEL, messages=asked, tools=[WEATHER], stream=True))
        assert [len(part.choices[0].delta.tool_calls or ()) for part in parts] == [1, 0]
        assert parts[-1].choices[0].finish_reason == "tool_calls"
        thought: Any = client.chat.completions.create(model="qwen3:8b", messages=HELLO).choices[0].message
        assert thought.reasoning
        silent: Any = client.chat.completions.create(model="qwen3:8b", messages=HELLO, extra_body={"reasoning_effort": "none"})
        assert not hasattr(silent.choices[0].message, "reasoning")
        streamed: Any = list(client.chat.completions.create(model="qwen3:8b", messages=HELLO, stream=True))
        assert streamed[0].choices[0].delta.reasoning
        probable = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2, logprobs=True, top_logprobs=2).choices[0]
        assert probable.logprobs is not None
        assert [len(entry.top_logprobs) for entry in probable.logprobs.content or ()] == [2, 2]

    await with_client(use)


async def test_parts_pictures_and_formats() -> None:
    def use(client: openai.OpenAI) -> None:
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
        seen: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "what"}, picture]}, {"role": "assistant", "content": None}]
        assert client.chat.completions.create(model="gemma3:4b", messages=seen).choices[0].message.content
        with pytest.raises(openai.BadRequestError, match="multimodal"):
            client.chat.completions.create(model=MODEL, messages=seen)
        schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": {"n": {"type": "number"}}}}}
        number = client.chat.completions.create(model=MODEL, messages=HELLO, response_format=schema).choices[0].message.content
        assert json.loads(number or "")["n"] > 0
        anything = client.chat.completions.create(model=MODEL, messages=HELLO, response_format={"type": "json_object"})
        assert json.loads(anything.choices[0].message.content or "")

    await with_client(use)


async def test_completions_embeddings_and_models() -> None:
    def use(client: openai.OpenAI) -> None:
        text = client.completions.create(model=MODEL, prompt="hello", max_tokens=4)
        assert len(text.choices[0].text.split()) == 4
        parts = list(client.completions.create(model=MODEL, prompt="hello", max_tokens=4, stream=True))
        assert "".join(part.choices[0].text for part in parts) == text.choices[0].text
        vectors = client.embeddings.create(model="nomic-embed-text", input=["a", "b"]).data
        assert [len(row.embedding) for row in vectors] == [768, 768]
        assert math.hypot(*vectors[0].embedding) == pytest.approx(1, abs=1e-3)
        plain = client.embeddings.create(model="nomic-embed-text", input="a", encoding_format="float").data[0].embedding
        assert plain == pytest.approx(vectors[0].embedding, abs=1e-6)
        assert MODEL in {model.id for model in client.models.list()}
        assert client.models.retrieve("qwen3:8b").id == "qwen3:8b"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nosuch")
        with pytest.raises(openai.NotFoundError, match="model 'nosuch' not found"):
            client.chat.completions.create(model="nosuch", messages=HELLO)

    await with_client(use)


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("chat/completions", {"model": MODEL, "messages": []}, "[] is too short - 'messages'"),
        ("chat/completions", {"model": MODEL, "messages": [{"content": 5}]}, "invalid message content type: int"),
        ("chat/completions", {"model": MODEL, "messages": [{"content": ["x"]}]}, "invalid message format"),
        (
            "chat/completions",
            {"model": MODEL, "messages": HELLO, "reasoning_effort": "maybe"},
            'invalid reasoning value: "maybe" (must be "minimal"',
        ),
        ("chat/completions", {"model": MODEL, "messages": HELLO, "reasoning": {"effort": "high"}}, f'"{MODEL}" does not support thinking'),
        ("embeddings", {"model": "nomic-embed-text"}, "invalid input"),
        ("embeddings", {"model": "nomic-embed-text", "input": [1]}, "invalid input type"),
    ],
)
async def test_what_is_refused(path: str, body: dict[str, Any], text: str) -> None:
    async with node().serve() as sim:
        answer = await ask(sim.port, "POST", f"/v1/{path}", body)
        assert answer.status == 400
        error = answer.json()["error"]
        assert error["message"].startswith(text)
        assert error["type"] == "invalid_request_error"


async def test_an_empty_answer_an_empty_prompt_and_an_empty_node() -> None:
    async with node().serve() as sim:
        empty = await ask(sim.port, "POST", "/v1/chat/completions", {"model": MODEL, "messages": HELLO, "max_tokens": 0, "stream": True})
        assert empty.body.count(b"data: ") == 3
        assert b'"delta":{"role":"assistant","content":""}' in empty.body
        loaded = await ask(sim.port, "POST", "/v1/completions", {"model": MODEL})
        assert loaded.json()["choices"][0]["text"] == ""
    async with SimulatedOllama(models=[]).serve() as sim:
        assert (await ask(sim.port, "GET", "/v1/models")).json() == {"object": "list", "data": None}
        assert (await ask(sim.port, "GET", "/api/tags")).json() == {"models": []}
