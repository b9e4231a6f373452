"""The official Python client of Ollama, unchanged: it gets through the router what it gets directly, and the node gets the same bytes."""

import inspect
from typing import Any

import ollama
import pytest

from tests.fleet.clients import CHAT, EMBED, PIXEL, THINKER, VISION, WEATHER, Sides, masked
from tests.fleet.edges import Edge
from tests.fleet.rawhttp import ask

pytestmark = pytest.mark.through_nginx(Edge.GATEWAYS, Edge.HANDED_OVER)

HELLO = [{"role": "user", "content": "Hello there, how are you?"}]
ASK_WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
SEE = [{"role": "user", "content": "What is this?", "images": [PIXEL]}]
RESULT = [
    *ASK_WEATHER,
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]},
    {"role": "tool", "content": "sunny", "tool_name": "get_weather"},
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
OPTIONS = {"num_predict": 9, "seed": 7, "temperature": 0.5, "num_ctx": 2048, "stop": ["zzz"]}

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("chat", {"model": CHAT, "messages": HELLO}),
    "chat with options": ("chat", {"model": CHAT, "messages": HELLO, "options": OPTIONS, "keep_alive": "7m"}),
    "chat with a format": (
        "chat",
        {"model": CHAT, "messages": HELLO, "format": SCHEMA},
    ),
    "chat with tools": ("chat", {"model": CHAT, "messages": ASK_WEATHER, "tools": [WEATHER]}),
    "chat with a tool's result": ("chat", {"model": CHAT, "messages": RESULT, "tools": [WEATHER]}),
    "chat with thinking": ("chat", {"model": THINKER, "messages": HELLO, "think": True}),
    "chat without thinking": ("chat", {"model": THINKER, "messages": HELLO, "think": False}),
    "chat with an image": ("chat", {"model": VISION, "messages": SEE}),
    "chat that only loads": ("chat", {"model": CHAT, "messages": []}),
    "generate": ("generate", {"model": CHAT, "prompt": "Once upon a time", "options": OPTIONS}),
    "generate raw": ("generate", {"model": CHAT, "prompt": "Once", "raw": True, "keep_alive": -1}),
    "generate with an image": ("generate", {"model": VISION, "prompt": "See", "images": [PIXEL]}),
}
WHOLE_CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "embed": ("embed", {"model": EMBED, "input": ["one", "two"], "truncate": True, "keep_alive": 60}),
    "embed one": ("embed", {"model": EMBED, "input": "one"}),
    "embeddings": ("embeddings", {"model": EMBED, "prompt": "one"}),
    "list": ("list", {}),
    "ps": ("ps", {}),
    "show": ("show", {"model": CHAT}),
}
EVERY = [
    *(pytest.param(method, {**given, "stream": stream}, id=f"{name}{', streamed' if stream else ''}")
      for name, (method, given) in CALLS.items() for stream in (False, True)),
    *(pytest.param(method, given, id=name) for name, (method, given) in WHOLE_CALLS.items()),
]  # fmt: skip


@pytest.mark.parametrize(("method", "given"), EVERY)
async def test_the_sync_client(sides: Sides, method: str, given: dict[str, Any]) -> None:
    def call(url: str) -> Any:
        answer = getattr(ollama.Client(url), method)(**given)
        return list(answer) if given.get("stream") else answer

    assert await sides.compare_in_thread(call)


@pytest.mark.parametrize(("method", "given"), EVERY)
async def test_the_async_client(sides: Sides, method: str, given: dict[str, Any]) -> None:
    async def call(url: str) -> Any:
        answer = await getattr(ollama.AsyncClient(url), method)(**given)
        return [part async for part in answer] if inspect.isasyncgen(answer) else answer

    assert await sides.compare(call)


async def test_a_tool_call_is_one(sides: Sides) -> None:
    def call(url: str) -> Any:
        return ollama.Client(url).chat(CHAT, ASK_WEATHER, tools=[WEATHER])

    answer = await sides.compare_in_thread(call)
    assert answer.message.tool_calls[0].function.name == "get_weather"


async def test_thinking_is_some(sides: Sides) -> None:
    def call(url: str) -> Any:
        return ollama.Client(url).chat(THINKER, HELLO, think=True)

    assert (await sides.compare_in_thread(call)).message.thinking


async def test_errors_are_ollamas_own(sides: Sides) -> None:
    def call(url: str) -> Any:
        with pytest.raises(ollama.ResponseError) as error:
            ollama.Client(url).chat("nosuch", HELLO)
        return [error.value.status_code, error.value.error]

    assert await sides.compare_in_thread(call) == [404, "model 'nosuch' not found"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"model": CHAT, "messages": HELLO, "unknown_field": {"a": [1]}, "options": {"unknown_option": 1, "num_predict": 5}}),
        ("/api/chat", {"model": CHAT, "messages": HELLO, "stream": False, "keep_alive": "1h30m"}),
        ("/api/chat", {"model": CHAT.upper(), "messages": ASK_WEATHER, "tools": [WEATHER]}),
        ("/api/generate", {"model": THINKER, "prompt": "a < b & c > d", "think": True}),
        ("/api/embed", {"model": EMBED, "input": ["x"] * 20}),
        ("/api/show", {"name": CHAT, "verbose": True}),
        ("/v1/chat/completions", {"model": CHAT, "messages": ASK_WEATHER, "tools": [WEATHER], "stream": True}),
        ("/v1/completions", {"model": CHAT, "prompt": "x", "max_tokens": 4}),
        ("/v1/embeddings", {"model": EMBED, "input": "x"}),
    ],
)  # fmt: skip
async def test_answers_are_the_same_bytes(sides: Sides, path: str, body: dict[str, Any]) -> None:
    await ask(sides.direct.port, "POST", path, body)  # what is loaded now stays so
    direct = await ask(sides.direct.port, "POST", path, body)
    routed = await sides.fleet.ask("POST", path, body)
    assert (routed.status, routed.whole) == (direct.status, True) == (200, True)
    assert routed.headers["content-type"] == direct.headers["content-type"]
    assert masked(routed.body) == masked(direct.body)
    assert sides.direct.bodies[-1] == sides.routed.bodies[-1]
