"""Anthropic's official Python library, sync and async."""

from typing import Any

import anthropic
import anyio
from speak import COMMON, MODELS, case, noticed, parts_until, refused, serve

HELLO = [{"role": "user", "content": COMMON["hello"]}]
ASK = [{"role": "user", "content": COMMON["ask_weather"]}]
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": COMMON["pixel"]}}
SEE = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What is this?"}]}]
TOOL = {"name": "get_weather", "description": "The weather of a city", "input_schema": COMMON["weather"]["parameters"]}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}}
RESULT = [
    *ASK,
    {"role": "assistant", "content": [CALL]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"}]},
]
CHAT, THINKER, VISION = (MODELS[name] for name in ("chat", "thinker", "vision"))


def at(url: str, **more: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, **more)


def asks(url: str, model: str, messages: list[Any] = HELLO, **more: Any) -> Any:
    return at(url).messages.create(model=model, messages=messages, max_tokens=more.pop("max_tokens", 200), **more)


@case("/v1/messages", "whole")
def whole(url: str) -> Any:
    return asks(url, CHAT, system="Be brief.", stop_sequences=["zzz"], max_tokens=9)


@case("/v1/messages", "streamed")
def streamed(url: str) -> Any:
    events = list(asks(url, CHAT, stream=True))
    assert events[-1].type == "message_stop"
    return events


@case("/v1/messages", "streamed, helper")
def helper(url: str) -> Any:
    with at(url).messages.stream(model=CHAT, messages=HELLO, max_tokens=200) as stream:
        text = "".join(stream.text_stream)
        return [text, stream.get_final_message()]


@case("/v1/messages", "async, streamed")
def streamed_async(url: str) -> Any:
    async def run() -> Any:
        async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
            stream = await client.messages.create(model=CHAT, messages=HELLO, max_tokens=200, stream=True)
            return [event async for event in stream]

    return anyio.run(run)


@case("/v1/messages", "beta")
def beta(url: str) -> Any:
    return at(url).beta.messages.create(model=CHAT, messages=HELLO, max_tokens=200)


@case("/v1/messages", "tools")
def tools(url: str) -> Any:
    answer = asks(url, CHAT, ASK, tools=[TOOL])
    assert [part.name for part in answer.content if part.type == "tool_use"] == ["get_weather"]
    return answer


@case("/v1/messages", "tools, streamed")
def tools_streamed(url: str) -> Any:
    events = list(asks(url, CHAT, ASK, tools=[TOOL], stream=True))
    assert any(event.type == "content_block_delta" and event.delta.type == "input_json_delta" for event in events)
    return events


@case("/v1/messages", "a tool's result")
def tool_result(url: str) -> Any:
    return asks(url, CHAT, RESULT, tools=[TOOL])


@case("/v1/messages", "thinking")
def thinking(url: str) -> Any:
    answer = asks(url, THINKER, thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2048)
    assert any(part.type == "thinking" for part in answer.content)
    return answer


@case("/v1/messages", "thinking, streamed")
def thinking_streamed(url: str) -> Any:
    events = list(asks(url, THINKER, thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2048, stream=True))
    assert any(event.type == "content_block_delta" and event.delta.type == "thinking_delta" for event in events)
    return events


@case("/v1/messages", "images")
def images(url: str) -> Any:
    return asks(url, VISION, SEE)


@case("/v1/messages", "unknown model")
def unknown(url: str) -> Any:
    return refused(lambda: asks(url, "nosuch"), anthropic.NotFoundError)


@case("/v1/messages", "bad input")
def bad(url: str) -> Any:
    return refused(lambda: asks(url, CHAT, []), anthropic.BadRequestError)


@case("/v1/messages", "client leaves")
def left(url: str) -> Any:
    with asks(url, MODELS["slow"], stream=True) as stream:
        return len(parts_until(stream, 4))


@case("/v1/messages", "client leaves before the first token")
def left_early(url: str) -> Any:
    client = at(url, timeout=0.3)
    return refused(lambda: client.messages.create(model=MODELS["late"], messages=HELLO, max_tokens=9), anthropic.APITimeoutError)


@case("/v1/messages", "connection cut")
def cut(url: str) -> Any:
    return noticed(lambda: asks(url, MODELS["cut"], stream=True))


@case("/v1/messages", "connection cut inside a line")
def torn(url: str) -> Any:
    return noticed(lambda: asks(url, MODELS["torn"], stream=True))


@case("/v1/messages", "connection cut, whole")
def cut_whole(url: str) -> Any:
    return noticed(lambda: asks(url, MODELS["cut"]))


@case("/v1/messages", "connection cut, helper")
def cut_helper(url: str) -> Any:
    def stream() -> Any:
        with at(url).messages.stream(model=MODELS["cut"], messages=HELLO, max_tokens=200) as events:
            yield from events

    return noticed(stream)


@case("/v1/messages", "end without a last line")
def mute(url: str) -> Any:
    return noticed(lambda: asks(url, MODELS["mute"], stream=True))


@case("/v1/messages", "node's own error")
def broken(url: str) -> Any:
    return noticed(lambda: asks(url, MODELS["broken"], stream=True))


serve()
