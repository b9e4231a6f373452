"""Ollama's official Python library, sync and async."""

from typing import Any

import anyio
import httpx
from ollama import AsyncClient, Client, ResponseError
from speak import COMMON, MODELS, WEATHER, case, noticed, parts_until, refused, serve

HELLO = [{"role": "user", "content": COMMON["hello"]}]
ASK = [{"role": "user", "content": COMMON["ask_weather"]}]
SEE = [{"role": "user", "content": "What is this?", "images": [COMMON["pixel"]]}]
OPTIONS = {"num_predict": 9, "seed": 7, "temperature": 0.5, "num_ctx": 2048, "stop": ["zzz"]}
CALL = {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
RESULT = [
    *ASK,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_name": "get_weather"},
]
CHAT, THINKER, VISION, EMBED = (MODELS[name] for name in ("chat", "thinker", "vision", "embed"))


@case("/api/tags", "list")
def tags(url: str) -> Any:
    return sorted(model.model for model in Client(url).list().models)


@case("/api/ps", "list")
def running(url: str) -> Any:
    return [model.model for model in Client(url).ps().models if model.model == CHAT]


@case("/api/show", "show")
def show(url: str) -> Any:
    return Client(url).show(CHAT)


@case("/api/show", "unknown model")
def show_unknown(url: str) -> Any:
    return refused(lambda: Client(url).show("nosuch"), ResponseError)


@case("/api/chat", "whole")
def chat(url: str) -> Any:
    return Client(url).chat(CHAT, HELLO, options=OPTIONS, keep_alive="7m")


@case("/api/chat", "streamed")
def chat_streamed(url: str) -> Any:
    return list(Client(url).chat(CHAT, HELLO, stream=True))


@case("/api/chat", "async, streamed")
def chat_async(url: str) -> Any:
    async def run() -> Any:
        return [part async for part in await AsyncClient(url).chat(CHAT, HELLO, stream=True)]

    return anyio.run(run)


@case("/api/chat", "tools")
def tools(url: str) -> Any:
    answer = Client(url).chat(CHAT, ASK, tools=[WEATHER])
    assert answer.message.tool_calls[0].function.name == "get_weather"
    return answer


@case("/api/chat", "tools, streamed")
def tools_streamed(url: str) -> Any:
    parts = list(Client(url).chat(CHAT, ASK, tools=[WEATHER], stream=True))
    assert any(part.message.tool_calls for part in parts)
    return parts


@case("/api/chat", "a tool's result")
def tool_result(url: str) -> Any:
    return Client(url).chat(CHAT, RESULT, tools=[WEATHER])


@case("/api/chat", "thinking")
def thinking(url: str) -> Any:
    answer = Client(url).chat(THINKER, HELLO, think=True)
    assert answer.message.thinking
    return answer


@case("/api/chat", "thinking, streamed")
def thinking_streamed(url: str) -> Any:
    parts = list(Client(url).chat(THINKER, HELLO, think=True, stream=True))
    assert any(part.message.thinking for part in parts)
    return parts


@case("/api/chat", "images")
def images(url: str) -> Any:
    return Client(url).chat(VISION, SEE)


@case("/api/chat", "structured output")
def structured(url: str) -> Any:
    return Client(url).chat(CHAT, HELLO, format=COMMON["schema"])


@case("/api/chat", "unknown model")
def chat_unknown(url: str) -> Any:
    return refused(lambda: Client(url).chat("nosuch", HELLO), ResponseError)


@case("/api/chat", "bad input")
def chat_bad(url: str) -> Any:
    return refused(lambda: Client(url).chat(CHAT, HELLO, options={"num_ctx": "many"}), ResponseError)


@case("/api/chat", "client leaves")
def chat_left(url: str) -> Any:
    stream = Client(url).chat(MODELS["slow"], HELLO, stream=True)
    got = parts_until(stream, 2)
    stream.close()
    return len(got)


@case("/api/chat", "client leaves before the first token")
def chat_left_early(url: str) -> Any:
    return refused(lambda: Client(url, timeout=0.3).chat(MODELS["late"], HELLO), httpx.ReadTimeout)["error"]


@case("/api/chat", "cancelled task leaves")
def chat_cancelled(url: str) -> Any:
    async def run() -> int:
        seen = 0
        with anyio.CancelScope() as scope:
            async for _ in await AsyncClient(url).chat(MODELS["slow"], HELLO, stream=True):
                seen += 1
                if seen == 2:
                    scope.cancel()
        return seen

    return anyio.run(run)


@case("/api/chat", "connection cut")
def chat_cut(url: str) -> Any:
    return noticed(lambda: Client(url).chat(MODELS["cut"], HELLO, stream=True))


@case("/api/chat", "connection cut inside a line")
def chat_torn(url: str) -> Any:
    return noticed(lambda: Client(url).chat(MODELS["torn"], HELLO, stream=True))


@case("/api/chat", "connection cut, whole")
def chat_cut_whole(url: str) -> Any:
    return noticed(lambda: Client(url).chat(MODELS["cut"], HELLO))


@case("/api/chat", "end without a last line")
def chat_mute(url: str) -> Any:
    return noticed(lambda: Client(url).chat(MODELS["mute"], HELLO, stream=True))


@case("/api/chat", "node's own error")
def chat_broken(url: str) -> Any:
    return noticed(lambda: Client(url).chat(MODELS["broken"], HELLO, stream=True))


@case("/api/generate", "whole")
def generate(url: str) -> Any:
    return Client(url).generate(CHAT, "Once upon a time", options=OPTIONS)


@case("/api/generate", "streamed")
def generate_streamed(url: str) -> Any:
    return list(Client(url).generate(CHAT, "Once upon a time", stream=True, raw=True))


@case("/api/generate", "thinking")
def generate_thinking(url: str) -> Any:
    answer = Client(url).generate(THINKER, "Once", think=True)
    assert answer.thinking
    return answer


@case("/api/generate", "images")
def generate_images(url: str) -> Any:
    return Client(url).generate(VISION, "See", images=[COMMON["pixel"]])


@case("/api/generate", "structured output")
def generate_structured(url: str) -> Any:
    return Client(url).generate(CHAT, "Once", format="json")


@case("/api/generate", "load only")
def generate_load(url: str) -> Any:
    return Client(url).generate(CHAT)


@case("/api/generate", "unknown model")
def generate_unknown(url: str) -> Any:
    return refused(lambda: Client(url).generate("nosuch", "Once"), ResponseError)


@case("/api/generate", "client leaves")
def generate_left(url: str) -> Any:
    stream = Client(url).generate(MODELS["slow"], "Once", stream=True)
    got = parts_until(stream, 2)
    stream.close()
    return len(got)


@case("/api/generate", "connection cut")
def generate_cut(url: str) -> Any:
    return noticed(lambda: Client(url).generate(MODELS["cut"], "Once", stream=True))


@case("/api/generate", "end without a last line")
def generate_mute(url: str) -> Any:
    return noticed(lambda: Client(url).generate(MODELS["mute"], "Once", stream=True))


@case("/api/embed", "one")
def embed_one(url: str) -> Any:
    return Client(url).embed(EMBED, "one", keep_alive=60)


@case("/api/embed", "several")
def embed_several(url: str) -> Any:
    answer = Client(url).embed(EMBED, ["one", "two"], truncate=True)
    assert len(answer.embeddings) == 2
    return answer


@case("/api/embed", "unknown model")
def embed_unknown(url: str) -> Any:
    return refused(lambda: Client(url).embed("nosuch", "one"), ResponseError)


@case("/api/embeddings", "one")
def embeddings(url: str) -> Any:
    return Client(url).embeddings(EMBED, "one")


@case("/api/pull", "streamed")
def pull_streamed(url: str) -> Any:
    parts = list(Client(url).pull(COMMON["published"], stream=True))
    assert parts[-1].status == "success"
    assert any(part.total and part.completed for part in parts)
    return sorted({part.status for part in parts})


@case("/api/pull", "whole")
def pull(url: str) -> Any:
    return Client(url).pull(COMMON["published"])


@case("/api/pull", "unknown model")
def pull_unknown(url: str) -> Any:
    return refused(lambda: list(Client(url).pull("nosuch", stream=True)), ResponseError)


@case("/api/copy", "copy")
def copy(url: str) -> Any:
    return Client(url).copy(CHAT, "copied")


@case("/api/copy", "unknown model")
def copy_unknown(url: str) -> Any:
    return refused(lambda: Client(url).copy("nosuch", "copied"), ResponseError)


@case("/api/delete", "delete")
def delete(url: str) -> Any:
    return Client(url).delete(MODELS["doomed"])


@case("/api/delete", "unknown model")
def delete_unknown(url: str) -> Any:
    return refused(lambda: Client(url).delete("nosuch"), ResponseError)


@case("/api/create", "refused")
def create(url: str) -> Any:
    return refused(lambda: Client(url).create("mine", from_=CHAT), ResponseError)


@case("/api/push", "refused")
def push(url: str) -> Any:
    return refused(lambda: Client(url).push(CHAT), ResponseError)


@case("/api/blobs/{digest}", "refused")
def blobs(url: str) -> Any:
    return refused(lambda: Client(url).create_blob(__file__), ResponseError)


serve()
