"""Questions to an Ollama that answers well, badly, late, or not at all."""

import pytest
import trio

from agent.ollama import client as module
from agent.ollama.client import OllamaClient, OllamaSilent
from tests.agent.fakes import Handler, Heard, answer, free_port, serving


def saying(data: bytes) -> Handler:
    async def handler(stream: trio.SocketStream, _: Heard) -> None:
        await stream.send_all(data)

    return handler


async def test_version_and_lists() -> None:
    async def handler(stream: trio.SocketStream, heard: Heard) -> None:
        rows = {"models": [{"name": "m", "unknown": {"kept": 1}}]}
        await stream.send_all(answer(200, {"version": "0.33.0"} if heard.target == "/api/version" else rows))

    async with serving(handler) as ollama, OllamaClient(ollama.url) as client:
        assert await client.version() == "0.33.0"
        assert await client.installed() == [{"name": "m", "unknown": {"kept": 1}}]
        assert await client.loaded() == [{"name": "m", "unknown": {"kept": 1}}]
        assert [heard.target for heard in ollama.heard] == ["/api/version", "/api/tags", "/api/ps"]


@pytest.mark.parametrize("models", [None, "x", {}])
async def test_a_list_that_is_none_is_empty(models: object) -> None:
    async with serving(saying(answer(200, {"models": models}))) as ollama, OllamaClient(ollama.url) as client:
        assert await client.installed() == []


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (answer(500, {"error": "x"}), "answered with 500"),
        (answer(307, b"", Location="http://elsewhere"), "answered with 307"),
        (answer(200, b"<html>"), "not JSON"),
        (answer(200, b"[]"), "not JSON"),
        (answer(200, {"version": 3}), "that is no Ollama"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{", "no answer"),
        (b"nonsense\r\n\r\n", "no answer"),
    ],
)
async def test_what_is_no_answer(data: bytes, told: str) -> None:
    async def handler(stream: trio.SocketStream, _: Heard) -> None:
        await stream.send_all(data)
        await stream.aclose()

    async with serving(handler) as ollama, OllamaClient(ollama.url) as client:
        with pytest.raises(OllamaSilent, match=told) as silent:
            await client.version()
        assert not silent.value.refused


async def test_nobody_there() -> None:
    async with OllamaClient(f"http://127.0.0.1:{free_port()}") as client:
        with pytest.raises(OllamaSilent) as silent:
            await client.version()
        assert silent.value.refused


async def test_too_late() -> None:
    async def handler(stream: trio.SocketStream, _: Heard) -> None:
        await trio.sleep_forever()

    async with serving(handler) as ollama, OllamaClient(ollama.url, timeout_s=0.05) as client:
        with pytest.raises(OllamaSilent, match="in time"):
            await client.version()


async def test_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_MAX_BYTES", 10)
    async with serving(saying(answer(200, {"models": ["long enough"]}))) as ollama, OllamaClient(ollama.url) as client:
        with pytest.raises(OllamaSilent, match="larger than"):
            await client.installed()


async def test_no_proxy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    async with serving(saying(answer(200, {"version": "1.0.0"}))) as ollama, OllamaClient(ollama.url) as client:
        assert await client.version() == "1.0.0"
