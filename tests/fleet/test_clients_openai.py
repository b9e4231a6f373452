"""OpenAI's official Python client, unchanged: it gets through the router what it gets directly, and the node gets the same bytes."""

from typing import Any

import openai
import pytest

from tests.fleet.clients import CHAT, EMBED, PIXEL, THINKER, VISION, WEATHER, Sides
from tests.fleet.edges import Edge

pytestmark = pytest.mark.through_nginx(Edge.GATEWAYS, Edge.HANDED_OVER)

HELLO = [{"role": "user", "content": "Hello there, how are you?"}]
ASK_WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
SEE = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, IMAGE]}]
CHATS: dict[str, dict[str, Any]] = {
    "chat": {"model": CHAT, "messages": HELLO},
    "chat with limits": {"model": CHAT, "messages": HELLO, "max_tokens": 5, "seed": 3, "temperature": 0.1, "stop": ["zzz"]},
    "chat with tools": {"model": CHAT, "messages": ASK_WEATHER, "tools": [WEATHER]},
    "chat with reasoning": {"model": THINKER, "messages": HELLO, "reasoning_effort": "high"},
    "chat with an image": {"model": VISION, "messages": SEE},
    "chat with unknown fields": {"model": CHAT, "messages": HELLO, "extra_body": {"unknown_field": 1}},
}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
EVERY = [
    *(pytest.param(given, id=name) for name, given in CHATS.items()),
    *(pytest.param(given | STREAMED, id=f"{name}, streamed") for name, given in CHATS.items()),
]


def blocking(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("given", EVERY)
async def test_chat_with_the_sync_client(sides: Sides, given: dict[str, Any]) -> None:
    def call(url: str) -> Any:
        with blocking(url) as client:
            answer = client.chat.completions.create(**given)
            return list(answer) if given.get("stream") else answer

    assert await sides.compare_in_thread(call)


@pytest.mark.parametrize("given", EVERY)
async def test_chat_with_the_async_client(sides: Sides, given: dict[str, Any]) -> None:
    async def call(url: str) -> Any:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = await client.chat.completions.create(**given)
            return [part async for part in answer] if given.get("stream") else answer

    assert await sides.compare(call)


@pytest.mark.parametrize("given", [{"input": "one"}, {"input": ["one", "two"]}], ids=["one", "two"])
@pytest.mark.parametrize("form", [{}, {"encoding_format": "float"}], ids=["base64", "float"])
async def test_embeddings(sides: Sides, given: dict[str, Any], form: dict[str, Any]) -> None:
    def call(url: str) -> Any:
        with blocking(url) as client:
            return client.embeddings.create(model=EMBED, **given, **form)

    assert (await sides.compare_in_thread(call)).data[0].embedding


@pytest.mark.parametrize("stream", [False, True])
async def test_completions(sides: Sides, stream: bool) -> None:
    def call(url: str) -> Any:
        with blocking(url) as client:
            answer = client.completions.create(model=CHAT, prompt="Once", max_tokens=6, stream=stream)
            return list(answer) if stream else answer

    assert await sides.compare_in_thread(call)


async def test_models(sides: Sides) -> None:
    def call(url: str) -> Any:
        with blocking(url) as client:
            return [model.id for model in client.models.list()]

    assert set(await sides.compare_in_thread(call)) == {CHAT, THINKER, VISION, EMBED}


async def test_errors_are_ollamas_own(sides: Sides) -> None:
    def call(url: str) -> Any:
        with blocking(url) as client, pytest.raises(openai.NotFoundError) as error:
            client.chat.completions.create(model="nosuch", messages=[{"role": "user", "content": "Hello"}])
        return [error.value.status_code, error.value.body]

    status, body = await sides.compare_in_thread(call)
    assert status == 404
    assert body["message"] == "model 'nosuch' not found"
