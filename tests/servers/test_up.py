"""`ollama-router up`: real processes, started and ended."""

import json
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from servers.up import ollama_answers, ollama_url
from tests.servers.fake_node import FakeNode, running
from tests.servers.test_cli import environment

LIMIT_S = 60.0


class Up:
    """A running `up`; `line(pattern)` waits for one of its lines."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            self.lines.append(text.rstrip("\n"))

    def line(self, pattern: str) -> str:
        return until(lambda: next((text for text in self.lines if re.search(pattern, text)), None), str(self.lines))

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def until(look: Callable[[], Any], what: object = "") -> Any:
    """What `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited in vain: {what}")


@contextmanager
def up(tmp_path: Path, ollama: str) -> Iterator[Up]:
    env = environment(
        tmp_path / "router",
        OLLAMA_API_BASE=ollama,
        AGENT_DATA_DIR=str(tmp_path / "agent"),
        OLLAMA_GPU_AVAILABLE="false",
        PYTHONUNBUFFERED="1",
    )
    command = [sys.executable, "-m", "servers.cli", "up"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield Up(process)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(LIMIT_S)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_without_an_ollama_three_simulated_nodes_are_there_until_the_end(tmp_path: Path, how: signal.Signals) -> None:
    with up(tmp_path, "http://127.0.0.1:1") as started:
        assert "SIMULATED" in started.line("No Ollama answers at http://127.0.0.1:1")
        command = shlex.split(started.line(r"^  curl .*/api/chat"))
        assert command[0] == "curl"
        base = command[1].removesuffix("/api/chat")
        until(lambda: len(httpx.get(f"{base}/api/agents?status=online", trust_env=False).json()) == 3)
        answer = httpx.post(command[1], content=command[3], timeout=LIMIT_S, trust_env=False)
        assert json.loads(answer.text.splitlines()[-1]).get("done") is True, answer.text[-500:]
        children = started.children()
        assert len(children) == 3 + 1  # and the process that writes
        started.process.send_signal(how)
        assert started.process.wait(LIMIT_S) == 0
        gone, alive = psutil.wait_procs(children, timeout=LIMIT_S)
        assert (len(gone), alive) == (len(children), [])


@pytest.mark.slow
def test_the_ollama_that_answers_is_used_through_an_agent_and_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agent.simulated", "--model", "llama3.2:1b"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ollama:
        assert ollama.stdout is not None
        url = re.search(r"http://\S+", ollama.stdout.readline())
        assert url is not None
        with up(tmp_path, url[0]) as started:
            assert "behind an agent of its own" in started.line(re.escape(url[0]))
            base = shlex.split(started.line(r"^  curl .*/api/chat"))[1].removesuffix("/api/chat")
            (agent,) = httpx.get(f"{base}/api/agents", trust_env=False).json()
            assert (agent["state"], agent["agentless"], agent["agent_api_port"] is not None) == ("ready", False, True)
            children = started.children()
            started.process.send_signal(signal.SIGINT)
            assert started.process.wait(LIMIT_S) == 0
            assert psutil.wait_procs(children, timeout=LIMIT_S)[1] == []
        assert ollama.poll() is None
        ollama.terminate()


def test_where_this_machines_ollama_is() -> None:
    assert ollama_url({}) == "http://127.0.0.1:11434"
    assert ollama_url({"OLLAMA_PORT": "9"}) == "http://127.0.0.1:9"
    assert ollama_url({"OLLAMA_API_BASE": "gpu1:9/", "OLLAMA_PORT": "8"}) == "http://gpu1:9"


async def test_what_is_taken_for_an_ollama() -> None:
    async with running(FakeNode()) as node:
        url = f"http://127.0.0.1:{node.port}"
        assert await ollama_answers(url)
        node.answers["/api/version"] = 500
        assert not await ollama_answers(url)
        node.answers["/api/version"] = b"hello"
        assert not await ollama_answers(url)
        node.answers["/api/version"] = b"7"
        assert not await ollama_answers(url)
    assert not await ollama_answers(url)
    assert not await ollama_answers("http://[")
