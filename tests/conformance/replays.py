"""The call sequences of the `ollama` command and of Open WebUI, replayed with their headers, on one kept connection each.

Knows what these two send (their bodies and headers, in their order); judges nothing but that the answers can be read as they read them.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import trio

from tests.fleet.clients import CHAT, EMBED
from tests.fleet.rawhttp import PATIENCE_S, Answer, parse_answer

GO = {"User-Agent": "ollama/0.33.0 (amd64 linux) Go/go1.26.8"}
AIOHTTP = {"Accept": "*/*", "Accept-Encoding": "gzip, deflate", "User-Agent": "Python/3.12 aiohttp/3.12"}
USER = {"X-OpenWebUI-User-Name": "Jo%20Doe", "X-OpenWebUI-User-Id": "1", "X-OpenWebUI-User-Email": "jo@example.org"}
WEBUI = {**AIOHTTP, **USER, "X-OpenWebUI-User-Role": "admin", "Content-Type": "application/json", "Authorization": "Bearer none"}
HELLO = [{"role": "user", "content": "Hello there"}]
DOOMED, PUBLISHED = "doomed:1b", "fresh:1b"
DIGEST = "sha256:" + "ab" * 32


@dataclass
class Line:
    """One kept connection, and what was said on it."""

    stream: trio.SocketStream
    host: str
    said: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    async def ask(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Send a request and read its answer to the end; the connection is kept."""
        fields = {"Host": self.host} | dict(headers)
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        with trio.fail_after(PATIENCE_S):
            await self.stream.send_all(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
            data = b""
            while not _whole(data, method):
                some = await self.stream.receive_some()
                assert some, f"{method} {path}: the connection was closed after {data[-200:]!r}"
                data += some
        answer = parse_answer(data, method)
        self.said.append(f"`{method} {path}` {answer.status}")
        self.answers.append(answer)
        return answer

    async def go(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, streams: bool = False) -> Answer:
        """A request as the `ollama` command makes it."""
        sent = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        accept = {"Accept": "application/x-ndjson" if streams else "application/json"}
        length = {} if body is None else {"Content-Length": str(len(sent))}
        zipped = {} if method == "HEAD" else {"Accept-Encoding": "gzip"}
        return await self.ask(method, path, sent, {**GO, **length, **accept, "Content-Type": "application/json", **zipped})

    async def alive(self) -> None:
        """What every command but `--version` begins with."""
        assert (await self.go("HEAD", "/")).status == 200

    async def webui(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        """A request as Open WebUI makes it; what it cannot read as JSON is a failure."""
        sent = b"" if body is None else json.dumps(body).encode()
        length = {} if body is None else {"Content-Length": str(len(sent))}
        answer = await self.ask(method, path, sent, {**WEBUI, **length})
        kind = answer.headers.get("content-type", "")
        assert not answer.body or "json" in kind or kind.startswith("text/event-stream"), kind
        if answer.status >= 400:
            assert isinstance(answer.json()["error"], str | dict)
        return answer


def _whole(data: bytes, method: str) -> bool:
    head, found, rest = data.partition(b"\r\n\r\n")
    if not found:
        return False
    answer = parse_answer(data, method)
    if method == "HEAD" or answer.status in (204, 304):
        return True
    if "content-length" not in answer.headers and b"chunked" not in head.lower():
        raise AssertionError(f"an answer that only a closed connection ends: {head!r}")
    return answer.whole and (answer.headers.get("transfer-encoding", "").lower() != "chunked" or rest.endswith(b"0\r\n\r\n"))


Sequence = Callable[[Line], Awaitable[None]]


@dataclass(frozen=True)
class Replay:
    """One command of a program. `refused`: the router's rules forbid it by default."""

    program: str
    command: str
    run: Sequence
    refused: bool = False

    def __str__(self) -> str:
        return f"{self.program} {self.command}"


REPLAYS: list[Replay] = []


def replay(program: str, command: str, *, refused: bool = False) -> Callable[[Sequence], Sequence]:
    """Declare what `program` does on `command`."""

    def declare(run: Sequence) -> Sequence:
        REPLAYS.append(Replay(program, command, run, refused))
        return run

    return declare


def shown(name: str) -> dict[str, Any]:
    """The body of the show that comes before most commands."""
    return {"model": name, "system": "", "template": "", "verbose": False, "options": None, "name": ""}


def generated(name: str, prompt: str = "", **more: Any) -> dict[str, Any]:
    return {"model": name, "prompt": prompt, "suffix": "", "system": "", "template": "", **more}


def pulled(name: str, *, insecure: bool = False) -> dict[str, Any]:
    return {"model": "", "insecure": insecure, "username": "", "password": "", "name": name}


def last_line(answer: Answer) -> Any:
    return answer.lines()[-1]


# ---------------------------------------------------------------- the `ollama` command


@replay("ollama", "--version")
async def version(line: Line) -> None:
    assert (await line.go("GET", "/api/version")).json()["version"]


@replay("ollama", "list")
async def listed(line: Line) -> None:
    await line.alive()
    models = (await line.go("GET", "/api/tags")).json()["models"]
    assert all(len(model["digest"][:12]) == 12 for model in models)


@replay("ollama", "ps")
async def running(line: Line) -> None:
    await line.alive()
    models = (await line.go("GET", "/api/ps")).json()["models"]
    assert all(len(model["digest"][:12]) == 12 for model in models)


@replay("ollama", "show MODEL")
async def show(line: Line) -> None:
    await line.alive()
    assert (await line.go("POST", "/api/show", shown("") | {"name": CHAT})).json()["capabilities"]


@replay("ollama", "run MODEL PROMPT")
async def run(line: Line) -> None:
    await line.alive()
    await line.go("POST", "/api/show", shown(CHAT))
    answer = await line.go("POST", "/api/generate", generated(CHAT, "Hello", options={}), streams=True)
    assert last_line(answer)["done"] is True


@replay("ollama", "run MODEL, in a terminal")
async def run_in_terminal(line: Line) -> None:
    await line.alive()
    await line.go("POST", "/api/show", shown(CHAT))
    await line.go("POST", "/api/show", shown(CHAT))
    loaded = await line.go("POST", "/api/generate", generated(CHAT, options=None), streams=True)
    assert loaded.json()["done_reason"] == "load"
    for turn in (1, 2):
        answer = await line.go("POST", "/api/chat", {"model": CHAT, "messages": HELLO * turn, "options": {}}, streams=True)
        assert last_line(answer)["done"] is True


@replay("ollama", "run MODEL, which only a pull brings")
async def run_unknown(line: Line) -> None:
    await line.alive()
    assert (await line.go("POST", "/api/show", shown(PUBLISHED))).status == 404
    assert last_line(await line.go("POST", "/api/pull", pulled(PUBLISHED, insecure=True), streams=True)) == {"status": "success"}
    assert (await line.go("POST", "/api/show", shown(PUBLISHED))).status == 200
    answer = await line.go("POST", "/api/generate", generated(PUBLISHED, "Hello", options={}), streams=True)
    assert last_line(answer)["done"] is True


@replay("ollama", "run MODEL, which no registry has")
async def run_nowhere(line: Line) -> None:
    await line.alive()
    assert (await line.go("POST", "/api/show", shown("nosuch"))).status == 404
    assert "file does not exist" in last_line(await line.go("POST", "/api/pull", pulled("nosuch"), streams=True))["error"]
    assert (await line.go("POST", "/api/show", shown("nosuch:cloud"))).status == 403


@replay("ollama", "run EMBEDDING-MODEL TEXT")
async def run_embedding(line: Line) -> None:
    await line.alive()
    await line.go("POST", "/api/show", shown(EMBED))
    assert (await line.go("POST", "/api/embed", {"model": EMBED, "input": "Hello", "options": None})).json()["embeddings"]


@replay("ollama", "pull MODEL")
async def pull(line: Line) -> None:
    await line.alive()
    assert last_line(await line.go("POST", "/api/pull", pulled(PUBLISHED), streams=True)) == {"status": "success"}


@replay("ollama", "stop MODEL")
async def stop(line: Line) -> None:
    await line.alive()
    await line.go("POST", "/api/show", shown(CHAT))
    answer = await line.go("POST", "/api/generate", generated(CHAT, keep_alive="0s", options=None), streams=True)
    assert answer.json()["done_reason"] == "unload"


@replay("ollama", "stop MODEL, unknown")
async def stop_unknown(line: Line) -> None:
    await line.alive()
    assert "not found" in (await line.go("POST", "/api/show", shown("nosuch"))).json()["error"]


@replay("ollama", "cp SOURCE DESTINATION")
async def copy(line: Line) -> None:
    await line.alive()
    assert (await line.go("POST", "/api/copy", {"source": CHAT, "destination": "twin"})).body == b""


@replay("ollama", "rm MODEL")
async def remove(line: Line) -> None:
    await line.alive()
    await line.go("POST", "/api/show", shown(DOOMED))
    await line.go("POST", "/api/generate", generated(DOOMED, keep_alive="0s", options=None), streams=True)
    assert (await line.go("DELETE", "/api/delete", {"model": "", "name": DOOMED})).status == 200


@replay("ollama", "rm MODEL, unknown")
async def remove_unknown(line: Line) -> None:
    await line.alive()
    assert (await line.go("POST", "/api/show", shown("nosuch"))).status == 404
    assert (await line.go("DELETE", "/api/delete", {"model": "", "name": "nosuch"})).status == 404


@replay("ollama", "push MODEL", refused=True)
async def push(line: Line) -> None:
    await line.alive()
    await line.go("POST", "/api/push", pulled(CHAT), streams=True)


@replay("ollama", "create MODEL -f FILE", refused=True)
async def create(line: Line) -> None:
    await line.alive()
    chunks = {"Transfer-Encoding": "chunked", "Content-Type": "application/json", "Accept": "application/json"}
    await line.ask("POST", f"/api/blobs/{DIGEST}", b"4\r\nGGUF\r\n0\r\n\r\n", {**GO, **chunks})


@replay("ollama", "/save, in a terminal", refused=True)
async def save(line: Line) -> None:
    await line.go("POST", "/api/create", {"model": "mine", "from": CHAT, "parameters": {}, "messages": HELLO, "name": ""}, streams=True)


@replay("ollama", "signout", refused=True)
async def signout(line: Line) -> None:
    await line.alive()
    await line.go("POST", "/api/signout")


@replay("ollama", "its menu")
async def menu(line: Line) -> None:
    await line.go("GET", "/api/status")
    await line.go("GET", "/api/experimental/model-recommendations")
    await line.go("GET", "/api/tags")


# ---------------------------------------------------------------- Open WebUI


@replay("Open WebUI", "verify a connection")
async def verify(line: Line) -> None:
    found = (await line.webui("GET", "/api/version")).json()["version"]
    assert [int(part) for part in found.split("-")[0].split(".")]


@replay("Open WebUI", "list of models")
async def webui_models(line: Line) -> None:
    assert {model["model"] for model in (await line.webui("GET", "/api/tags")).json()["models"]} >= {CHAT, EMBED}
    for model in (await line.webui("GET", "/api/ps")).json()["models"]:
        datetime.fromisoformat(model["expires_at"])


@replay("Open WebUI", "chat")
async def webui_chat(line: Line) -> None:
    answer = await line.webui("POST", "/api/chat", {"model": CHAT, "messages": HELLO, "stream": True, "options": {"temperature": 0.7}})
    assert "content-encoding" not in answer.headers
    assert last_line(answer)["done"] is True


@replay("Open WebUI", "a chat's title")
async def webui_title(line: Line) -> None:
    assert (await line.webui("POST", "/api/chat", {"model": CHAT, "messages": HELLO, "stream": False})).json()["message"]["content"]


@replay("Open WebUI", "chat, OpenAI's way")
async def webui_v1(line: Line) -> None:
    answer = await line.webui("POST", "/v1/chat/completions", {"model": CHAT, "messages": HELLO, "stream": True})
    assert answer.body.endswith(b"data: [DONE]\n\n")


@replay("Open WebUI", "chat with an unknown model")
async def webui_unknown(line: Line) -> None:
    assert (await line.webui("POST", "/api/chat", {"model": "nosuch:latest", "messages": HELLO, "stream": True})).status == 404


@replay("Open WebUI", "embeddings")
async def webui_embed(line: Line) -> None:
    assert (await line.webui("POST", "/api/embed", {"model": EMBED, "input": ["one", "two"]})).json()["embeddings"]
    assert (await line.webui("POST", "/api/embeddings", {"model": EMBED, "prompt": "one"})).json()["embedding"]


@replay("Open WebUI", "show")
async def webui_show(line: Line) -> None:
    assert (await line.webui("POST", "/api/show", {"model": CHAT})).json()["model_info"]


@replay("Open WebUI", "unload")
async def webui_unload(line: Line) -> None:
    answer = await line.webui("POST", "/api/generate", {"model": CHAT, "keep_alive": 0, "prompt": ""})
    assert answer.json()["done_reason"] == "unload"


@replay("Open WebUI", "pull")
async def webui_pull(line: Line) -> None:
    assert last_line(await line.webui("POST", "/api/pull", {"model": PUBLISHED, "insecure": True}))["status"] == "success"


@replay("Open WebUI", "copy")
async def webui_copy(line: Line) -> None:
    assert (await line.webui("POST", "/api/copy", {"source": CHAT, "destination": "third"})).status == 200


@replay("Open WebUI", "delete")
async def webui_delete(line: Line) -> None:
    assert (await line.webui("DELETE", "/api/delete", {"name": DOOMED, "model": DOOMED})).status == 200


@replay("Open WebUI", "upload a model", refused=True)
async def webui_upload(line: Line) -> None:
    await line.webui("POST", f"/api/blobs/{DIGEST}", {})


@replay("Open WebUI", "create a model", refused=True)
async def webui_create(line: Line) -> None:
    await line.webui("POST", "/api/create", {"model": "mine", "files": {"mine.gguf": DIGEST}})
