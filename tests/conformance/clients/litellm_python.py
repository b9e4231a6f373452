"""LiteLLM, providers `ollama_chat` and `ollama`."""

from typing import Any

import litellm
from speak import COMMON, MODELS, WEATHER, case, noticed, parts_until, refused, serve

HELLO = [{"role": "user", "content": COMMON["hello"]}]
ASK = [{"role": "user", "content": COMMON["ask_weather"]}]
IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{COMMON['pixel']}"}}
SEE = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, IMAGE]}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
RESULT = [
    *ASK,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
]
CHAT, THINKER, VISION, EMBED = (MODELS[name] for name in ("chat", "thinker", "vision", "embed"))

litellm.telemetry = False


def chats(url: str, model: str = CHAT, messages: list[Any] = HELLO, **more: Any) -> Any:
    return litellm.completion(model=f"ollama_chat/{model}", messages=messages, api_base=url, num_retries=0, max_retries=0, **more)


def seen(answer: Any) -> Any:
    """An answer without ids, which LiteLLM makes up."""
    message = answer.choices[0].message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
    return [message.content, getattr(message, "reasoning_content", None), calls, answer.choices[0].finish_reason, answer.usage]


def parts(stream: Any) -> Any:
    deltas = [part.choices[0].delta for part in stream]
    return [(delta.content, getattr(delta, "reasoning_content", None)) for delta in deltas]


@case("/api/chat", "whole")
def chat(url: str) -> Any:
    return seen(chats(url, max_tokens=9, seed=7, temperature=0.5, stop=["zzz"]))


@case("/api/chat", "streamed")
def chat_streamed(url: str) -> Any:
    return parts(chats(url, stream=True))


@case("/api/chat", "tools")
def tools(url: str) -> Any:
    answer = chats(url, messages=ASK, tools=[WEATHER])
    assert answer.choices[0].message.tool_calls[0].function.name == "get_weather"
    return seen(answer)


@case("/api/chat", "a tool's result")
def tool_result(url: str) -> Any:
    return seen(chats(url, messages=RESULT, tools=[WEATHER]))


@case("/api/chat", "thinking")
def thinking(url: str) -> Any:
    answer = chats(url, THINKER, reasoning_effort="high")
    assert answer.choices[0].message.reasoning_content
    return seen(answer)


@case("/api/chat", "images")
def images(url: str) -> Any:
    return seen(chats(url, VISION, SEE))


@case("/api/chat", "structured output")
def structured(url: str) -> Any:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": COMMON["schema"]}}
    return seen(chats(url, response_format=schema))


@case("/api/chat", "unknown model")
def unknown(url: str) -> Any:
    return refused(lambda: chats(url, "nosuch"), Exception)


@case("/api/chat", "bad input")
def bad(url: str) -> Any:
    return refused(lambda: chats(url, num_ctx="many"), Exception)


@case("/api/chat", "client leaves")
def left(url: str) -> Any:
    stream = chats(url, MODELS["slow"], stream=True)
    got = parts_until(stream, 2)
    stream.completion_stream.response.close() if hasattr(stream.completion_stream, "response") else stream.close()
    return len(got)


@case("/api/chat", "client leaves before the first token")
def left_early(url: str) -> Any:
    return refused(lambda: chats(url, MODELS["late"], timeout=0.3), Exception)["error"]


@case("/api/chat", "connection cut")
def cut(url: str) -> Any:
    return noticed(lambda: chats(url, MODELS["cut"], stream=True))


@case("/api/chat", "connection cut, whole")
def cut_whole(url: str) -> Any:
    return noticed(lambda: chats(url, MODELS["cut"]))


@case("/api/chat", "end without a last line")
def mute(url: str) -> Any:
    return noticed(lambda: chats(url, MODELS["mute"], stream=True))


@case("/api/chat", "node's own error")
def broken(url: str) -> Any:
    return noticed(lambda: chats(url, MODELS["broken"], stream=True))


@case("/api/embed", "one")
def embed_one(url: str) -> Any:
    return litellm.embedding(model=f"ollama/{EMBED}", input=["one"], api_base=url).data


@case("/api/embed", "several")
def embed_several(url: str) -> Any:
    return litellm.embedding(model=f"ollama/{EMBED}", input=["one", "two"], api_base=url).data


serve()
