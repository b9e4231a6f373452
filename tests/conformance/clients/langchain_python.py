"""LangChain's `langchain-ollama`."""

from typing import Any

import anyio
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from speak import COMMON, MODELS, WEATHER, case, noticed, parts_until, refused, serve

IMAGE = {"type": "image_url", "image_url": f"data:image/png;base64,{COMMON['pixel']}"}
SEE = [HumanMessage([{"type": "text", "text": "What is this?"}, IMAGE])]
CALL = {"name": "get_weather", "args": {"city": "Paris"}, "id": "call_1", "type": "tool_call"}
RESULT = [HumanMessage(COMMON["ask_weather"]), AIMessage("", tool_calls=[CALL]), ToolMessage("sunny", tool_call_id="call_1")]
HELLO = COMMON["hello"]
CHAT, THINKER, VISION, EMBED = (MODELS[name] for name in ("chat", "thinker", "vision", "embed"))


def chats(url: str, model: str = CHAT, **more: Any) -> ChatOllama:
    return ChatOllama(model=model, base_url=url, **more)


def seen(message: Any) -> Any:
    """A message without its ids."""
    calls = [(call["name"], call["args"]) for call in getattr(message, "tool_calls", [])]
    return [message.content, calls, message.usage_metadata, message.additional_kwargs, message.response_metadata.get("done_reason")]


@case("/api/tags", "validate_model_on_init")
def validate(url: str) -> Any:
    return [chats(url, validate_model_on_init=True).model, refused(lambda: chats(url, "nosuch", validate_model_on_init=True), ValueError)]


@case("/api/chat", "whole")
def chat(url: str) -> Any:
    return seen(chats(url, num_predict=9, seed=7, temperature=0.5, stop=["zzz"], keep_alive="7m").invoke(HELLO))


@case("/api/chat", "streamed")
def chat_streamed(url: str) -> Any:
    return [seen(part) for part in chats(url).stream(HELLO)]


@case("/api/chat", "async, streamed")
def chat_async(url: str) -> Any:
    async def run() -> Any:
        return [seen(part) async for part in chats(url).astream(HELLO)]

    return anyio.run(run)


@case("/api/chat", "tools")
def tools(url: str) -> Any:
    answer = chats(url).bind_tools([WEATHER]).invoke(COMMON["ask_weather"])
    assert answer.tool_calls[0]["name"] == "get_weather"
    return seen(answer)


@case("/api/chat", "a tool's result")
def tool_result(url: str) -> Any:
    return seen(chats(url).bind_tools([WEATHER]).invoke(RESULT))


@case("/api/chat", "thinking")
def thinking(url: str) -> Any:
    answer = chats(url, THINKER, reasoning=True).invoke(HELLO)
    assert answer.additional_kwargs["reasoning_content"]
    return seen(answer)


@case("/api/chat", "images")
def images(url: str) -> Any:
    return seen(chats(url, VISION).invoke(SEE))


@case("/api/chat", "structured output")
def structured(url: str) -> Any:
    return seen(chats(url, format=COMMON["schema"]).invoke(HELLO))


@case("/api/chat", "unknown model")
def unknown(url: str) -> Any:
    return refused(lambda: chats(url, "nosuch").invoke(HELLO), Exception)


@case("/api/chat", "bad input")
def bad(url: str) -> Any:
    return refused(lambda: chats(url, EMBED).invoke(HELLO), Exception)


@case("/api/chat", "client leaves")
def left(url: str) -> Any:
    stream = chats(url, MODELS["slow"]).stream(HELLO)
    got = parts_until(stream, 2)
    stream.close()
    return len(got)


@case("/api/chat", "client leaves before the first token")
def left_early(url: str) -> Any:
    return refused(lambda: chats(url, MODELS["late"], client_kwargs={"timeout": 0.3}).invoke(HELLO), Exception)


@case("/api/chat", "connection cut")
def cut(url: str) -> Any:
    return noticed(lambda: chats(url, MODELS["cut"]).stream(HELLO))


@case("/api/chat", "connection cut, whole")
def cut_whole(url: str) -> Any:
    return noticed(lambda: [chats(url, MODELS["cut"]).invoke(HELLO)])


@case("/api/chat", "end without a last line")
def mute(url: str) -> Any:
    return noticed(lambda: chats(url, MODELS["mute"]).stream(HELLO))


@case("/api/chat", "node's own error")
def broken(url: str) -> Any:
    return noticed(lambda: chats(url, MODELS["broken"]).stream(HELLO))


@case("/api/generate", "whole")
def generate(url: str) -> Any:
    return OllamaLLM(model=CHAT, base_url=url).invoke("Once")


@case("/api/generate", "streamed")
def generate_streamed(url: str) -> Any:
    return list(OllamaLLM(model=CHAT, base_url=url).stream("Once"))


@case("/api/generate", "connection cut")
def generate_cut(url: str) -> Any:
    return noticed(lambda: OllamaLLM(model=MODELS["cut"], base_url=url).stream("Once"))


@case("/api/generate", "end without a last line")
def generate_mute(url: str) -> Any:
    return noticed(lambda: OllamaLLM(model=MODELS["mute"], base_url=url).stream("Once"))


@case("/api/embed", "one")
def embed_one(url: str) -> Any:
    return OllamaEmbeddings(model=EMBED, base_url=url).embed_query("one")


@case("/api/embed", "several")
def embed_several(url: str) -> Any:
    return OllamaEmbeddings(model=EMBED, base_url=url).embed_documents(["one", "two"])


serve()
