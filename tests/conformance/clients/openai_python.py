"""OpenAI's official Python library, sync and async."""

from typing import Any

import anyio
import openai
from speak import COMMON, MODELS, WEATHER, case, noticed, parts_until, refused, serve

HELLO = [{"role": "user", "content": COMMON["hello"]}]
ASK = [{"role": "user", "content": COMMON["ask_weather"]}]
IMAGE = f"data:image/png;base64,{COMMON['pixel']}"
SEE = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": IMAGE}}]}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": COMMON["schema"]}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
RESULT = [
    *ASK,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
]
SOUND = b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\0\0\0\0"
TOOL = {"type": "function", **COMMON["weather"]}
CHAT, THINKER, VISION, EMBED = (MODELS[name] for name in ("chat", "thinker", "vision", "embed"))


def at(url: str, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, **more)


def chats(url: str, model: str, messages: list[Any] = HELLO, **more: Any) -> Any:
    return at(url).chat.completions.create(model=model, messages=messages, **more)


@case("/v1/models", "list")
def models(url: str) -> Any:
    return sorted(model.id for model in at(url).models.list())


@case("/v1/models/{id}", "show")
def model(url: str) -> Any:
    return at(url).models.retrieve(CHAT)


@case("/v1/models/{id}", "unknown model")
def model_unknown(url: str) -> Any:
    return refused(lambda: at(url).models.retrieve("nosuch"), openai.NotFoundError)


@case("/v1/chat/completions", "whole")
def chat(url: str) -> Any:
    return chats(url, CHAT, max_tokens=5, seed=3, temperature=0.1, stop=["zzz"])


@case("/v1/chat/completions", "streamed")
def chat_streamed(url: str) -> Any:
    return list(chats(url, CHAT, stream=True, stream_options={"include_usage": True}))


@case("/v1/chat/completions", "async, streamed")
def chat_async(url: str) -> Any:
    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return [part async for part in await client.chat.completions.create(model=CHAT, messages=HELLO, stream=True)]

    return anyio.run(run)


@case("/v1/chat/completions", "tools")
def tools(url: str) -> Any:
    answer = chats(url, CHAT, ASK, tools=[WEATHER])
    assert answer.choices[0].message.tool_calls[0].function.name == "get_weather"
    return answer


@case("/v1/chat/completions", "tools, streamed")
def tools_streamed(url: str) -> Any:
    parts = list(chats(url, CHAT, ASK, tools=[WEATHER], stream=True))
    assert any(part.choices[0].delta.tool_calls for part in parts if part.choices)
    return parts


@case("/v1/chat/completions", "a tool's result")
def tool_result(url: str) -> Any:
    return chats(url, CHAT, RESULT, tools=[WEATHER])


@case("/v1/chat/completions", "thinking")
def thinking(url: str) -> Any:
    answer = chats(url, THINKER, reasoning_effort="high")
    assert answer.choices[0].message.reasoning
    return answer


@case("/v1/chat/completions", "thinking, streamed")
def thinking_streamed(url: str) -> Any:
    parts = list(chats(url, THINKER, reasoning_effort="high", stream=True))
    assert any(getattr(part.choices[0].delta, "reasoning", None) for part in parts if part.choices)
    return parts


@case("/v1/chat/completions", "images")
def images(url: str) -> Any:
    return chats(url, VISION, SEE)


@case("/v1/chat/completions", "structured output")
def structured(url: str) -> Any:
    return chats(url, CHAT, response_format=SCHEMA)


@case("/v1/chat/completions", "unknown model")
def chat_unknown(url: str) -> Any:
    return refused(lambda: chats(url, "nosuch"), openai.NotFoundError)


@case("/v1/chat/completions", "bad input")
def chat_bad(url: str) -> Any:
    return refused(lambda: chats(url, CHAT, []), openai.BadRequestError)


@case("/v1/chat/completions", "client leaves")
def chat_left(url: str) -> Any:
    with chats(url, MODELS["slow"], stream=True) as stream:
        return len(parts_until(stream, 2))


@case("/v1/chat/completions", "client leaves before the first token")
def chat_left_early(url: str) -> Any:
    client = at(url, timeout=0.3)
    return refused(lambda: client.chat.completions.create(model=MODELS["late"], messages=HELLO), openai.APITimeoutError)


@case("/v1/chat/completions", "connection cut")
def chat_cut(url: str) -> Any:
    return noticed(lambda: chats(url, MODELS["cut"], stream=True))


@case("/v1/chat/completions", "connection cut inside a line")
def chat_torn(url: str) -> Any:
    return noticed(lambda: chats(url, MODELS["torn"], stream=True))


@case("/v1/chat/completions", "connection cut, whole")
def chat_cut_whole(url: str) -> Any:
    return noticed(lambda: chats(url, MODELS["cut"]))


@case("/v1/chat/completions", "end without a last line")
def chat_mute(url: str) -> Any:
    return noticed(lambda: chats(url, MODELS["mute"], stream=True))


@case("/v1/chat/completions", "node's own error")
def chat_broken(url: str) -> Any:
    return noticed(lambda: chats(url, MODELS["broken"], stream=True))


@case("/v1/completions", "whole")
def completion(url: str) -> Any:
    return at(url).completions.create(model=CHAT, prompt="Once", max_tokens=6)


@case("/v1/completions", "streamed")
def completion_streamed(url: str) -> Any:
    return list(at(url).completions.create(model=CHAT, prompt="Once", stream=True))


@case("/v1/completions", "unknown model")
def completion_unknown(url: str) -> Any:
    return refused(lambda: at(url).completions.create(model="nosuch", prompt="Once"), openai.NotFoundError)


@case("/v1/completions", "client leaves")
def completion_left(url: str) -> Any:
    with at(url).completions.create(model=MODELS["slow"], prompt="Once", stream=True) as stream:
        return len(parts_until(stream, 2))


@case("/v1/completions", "connection cut")
def completion_cut(url: str) -> Any:
    return noticed(lambda: at(url).completions.create(model=MODELS["cut"], prompt="Once", stream=True))


@case("/v1/completions", "end without a last line")
def completion_mute(url: str) -> Any:
    return noticed(lambda: at(url).completions.create(model=MODELS["mute"], prompt="Once", stream=True))


@case("/v1/embeddings", "one")
def embedding(url: str) -> Any:
    return at(url).embeddings.create(model=EMBED, input="one", encoding_format="float")


@case("/v1/embeddings", "several")
def embeddings(url: str) -> Any:
    answer = at(url).embeddings.create(model=EMBED, input=["one", "two"])
    assert len(answer.data) == 2
    return answer


@case("/v1/embeddings", "unknown model")
def embeddings_unknown(url: str) -> Any:
    return refused(lambda: at(url).embeddings.create(model="nosuch", input="one"), openai.NotFoundError)


@case("/v1/audio/transcriptions", "whole")
def transcription(url: str) -> Any:
    return at(url).audio.transcriptions.create(model=MODELS["audio"], file=("a.wav", SOUND)).text


@case("/v1/audio/transcriptions", "unknown model")
def transcription_unknown(url: str) -> Any:
    return refused(lambda: at(url).audio.transcriptions.create(model="nosuch", file=("a.wav", SOUND)), openai.NotFoundError)


@case("/v1/responses", "whole")
def response(url: str) -> Any:
    answer = at(url).responses.create(model=CHAT, input=COMMON["hello"])
    return [answer.status, answer.output_text, answer.usage]


@case("/v1/responses", "streamed")
def response_streamed(url: str) -> Any:
    events = list(at(url).responses.create(model=CHAT, input=COMMON["hello"], stream=True))
    assert events[-1].type == "response.completed"
    return events


@case("/v1/responses", "tools")
def response_tools(url: str) -> Any:
    answer = at(url).responses.create(model=CHAT, input=COMMON["ask_weather"], tools=[TOOL])
    calls = [item for item in answer.output if item.type == "function_call"]
    assert calls[0].name == "get_weather"
    return [(call.name, call.arguments) for call in calls]


@case("/v1/responses", "thinking, streamed")
def response_thinking(url: str) -> Any:
    stream = at(url).responses.create(model=THINKER, input=COMMON["hello"], reasoning={"effort": "high"}, stream=True)
    kinds = [event.type for event in stream]
    assert "response.reasoning_summary_text.delta" in kinds
    return kinds


@case("/v1/responses", "structured output")
def response_structured(url: str) -> Any:
    form = {"format": {"type": "json_schema", "name": "a", "schema": COMMON["schema"]}}
    return at(url).responses.create(model=CHAT, input=COMMON["hello"], text=form).output_text


@case("/v1/responses", "unknown model")
def response_unknown(url: str) -> Any:
    return refused(lambda: at(url).responses.create(model="nosuch", input="Hello"), openai.NotFoundError)


@case("/v1/responses", "client leaves")
def response_left(url: str) -> Any:
    with at(url).responses.create(model=MODELS["slow"], input="Hello", stream=True) as stream:
        return len(parts_until(stream, 6))


@case("/v1/responses", "connection cut")
def response_cut(url: str) -> Any:
    return noticed(lambda: at(url).responses.create(model=MODELS["cut"], input="Hello", stream=True), bad=failed)


@case("/v1/responses", "end without a last line")
def response_mute(url: str) -> Any:
    return noticed(lambda: at(url).responses.create(model=MODELS["mute"], input="Hello", stream=True), bad=failed)


@case("/v1/responses", "connection cut, helper")
def response_cut_helper(url: str) -> Any:
    def stream() -> Any:
        with at(url).responses.stream(model=MODELS["cut"], input="Hello") as events:
            yield from events
            yield events.get_final_response()

    return noticed(stream, bad=failed)


def failed(event: Any) -> str:
    """The event with which a stream of responses says that it broke."""
    return event.type if event.type in ("response.failed", "error") else ""


serve()
