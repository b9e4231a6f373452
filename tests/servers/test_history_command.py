"""`ollama-router history` against a coordinator's own words, and against a real one."""

import csv
import json
import stat
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result

from agent.simulated.server import SimulatedOllama
from servers.cli import main
from servers.history_command import ROOT
from tests.fleet.fleet import Fleet, ScriptedNode, answer_well, chat, last_line, line, open_fleet, serving
from tests.fleet.rawhttp import Caller
from tests.fleet.test_history import STREAMS

RECORD = {
    "id": "r[red]1", "timestamp": "2026-01-31T12:00:00Z", "completed_at": "2026-01-31T12:00:01Z", "request_type": "chat",
    "path": "/api/chat", "model": "m\x1b[31m", "agent_id": "a", "agent_name": "node", "client": "10.0.0.1", "key_id": None,
    "status": "error", "message": "[bold]cut", "http_status": 200, "duration_ms": 1500.0, "queue_ms": 0.0, "ttft_ms": 20.0,
    "predicted_start_ms": 12.0, "observed_start_ms": 15.5, "prompt_tokens": 3, "output_tokens": 4, "load_ms": 0.0,
    "attempts": [{"node": "node", "outcome": "success", "ms": 5.0}], "edge": "embedded", "chunks": 3, "body_bytes": 10, "bodies": "whole",
}  # fmt: skip
BODIES = {"request_body": {"model": "m", "prompt": "one\ttwo\u009b"}, "response_body": "no \x1b json\nof two lines"}


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["history", *arguments])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    paths: list[str] = []

    def call(_: object, method: str, path: str, body: Any = None) -> Any:
        paths.append(path)
        if path == "/api/agents":
            return [{"id": "7", "name": "node"}]
        if path.startswith(f"{ROOT}/"):
            return {**RECORD, **BODIES}
        return {"records": [RECORD], "total_count": 100_000, "total_is_floor": True, "page": 2, "per_page": 1}

    monkeypatch.setattr("servers.remote.Remote.call", call)
    return paths


def test_the_list_tells_what_was_recorded_and_obeys_nothing(asked: list[str]) -> None:
    result = invoke("list", "--limit", "1", "--page", "2")
    for text in ("r[red]1", "m?[31m", "1.5 s", "20 ms", "3 + 4", "[bold]cut"):
        assert text in result.stdout
    assert "2 to 2 of more than 100000" in result.stderr
    assert sorted(asked[0].partition("?")[2].split("&")) == ["page=2", "per_page=1", "sort=-timestamp"]


def test_filters_go_to_the_coordinator_under_its_names(asked: list[str]) -> None:
    options = {"model": "a b", "node": "node", "status": "error", "since": "2026-01-31T12:00:00Z", "client": "::1", "text": "x&y"}
    invoke("list", *[part for name, value in options.items() for part in (f"--{name}", value)])
    for part in ("model=a+b", "agent_id=7", "status=error", "start_time=2026-01-31T12%3A00%3A00Z", "client=%3A%3A1", "q=x%26y"):
        assert part in asked[-1]
    invoke("list", "--until", "2h")
    assert "end_time=20" in asked[-1]
    assert "there is no agent 'other'" in invoke("list", "--node", "other").stderr
    assert invoke("list", "--status", "fine").exit_code == 2


def test_one_record_is_shown_with_its_bodies_and_without_escapes(asked: list[str]) -> None:
    output = invoke("show", "r[red]1").output
    assert asked == [f"{ROOT}/r%5Bred%5D1"]
    for text in (
        "r[red]1",
        "predicted start ms  12.0",
        "observed start ms   15.5",
        "key id",
        "node: success, 5 ms",
        '"prompt": "one\\ttwo?"',
        "no ? json\nof two lines",
    ):
        assert text in output
    assert "\x1b" not in output


# ---------------------------------------------------------------- with a real coordinator


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    node = ScriptedNode(answer_well)
    async with serving(node), open_fleet([node.port]) as fleet:
        yield fleet


@dataclass
class Done:
    exit_code: int
    stdout: str
    stderr: str


async def run(fleet: Fleet, *arguments: str) -> Done:
    """As a process of its own, for the coordinator in this one logs to standard output."""
    command = [sys.executable, "-m", "servers.cli", "history", *arguments, "--url", fleet.url]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def written(fleet: Fleet) -> None:
    """Until every record is in the database."""
    await fleet.wait_settled()
    await fleet.coordinator.memory.store.flush()


async def recorded(fleet: Fleet, **body: Any) -> str:
    """The id of a chat, once it is in the database."""
    answer = await fleet.ask("POST", "/api/chat", chat(**body))
    await written(fleet)
    return answer.headers["x-request-id"]


async def test_an_export_becomes_a_file_of_its_owner(fleet: Fleet, tmp_path: Path) -> None:
    ids = [await recorded(fleet) for _ in range(3)]
    for name in ("history.json", "history.csv"):
        result = await run(fleet, "export", str(tmp_path / name))
        assert result.exit_code == 0, result.stderr
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert [one["id"] for one in json.loads((tmp_path / "history.json").read_bytes())] == ids[::-1]
    with (tmp_path / "history.csv").open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ids[::-1]
    result = await run(fleet, "export", "-", "--status", "error")
    assert result.stdout == "[]\n"
    assert names(tmp_path) == ["history.csv", "history.json"]


async def test_an_export_that_fails_leaves_no_file(fleet: Fleet, tmp_path: Path) -> None:
    result = await run(fleet, "export", str(tmp_path / "history.json"), "--since", "yesterday")
    assert (result.exit_code, result.stderr) == (
        1, "Error: start_time must be a moment in RFC 3339 with its zone, such as 2026-01-31T12:00:00Z\n",
    )  # fmt: skip
    result = await run(fleet, "export", str(tmp_path / "none" / "history.json"))
    assert "cannot be written: No such file or directory" in result.stderr
    assert names(tmp_path) == []


async def test_a_request_is_sent_again_byte_for_byte(fleet: Fleet) -> None:
    request_id = await recorded(fleet, content="é  \u2028 spaces")
    result = await run(fleet, "replay", request_id)
    assert (result.exit_code, result.stdout) == (0, "one\n")
    whole = await run(fleet, "replay", await recorded(fleet, stream=False))
    assert whole.stdout == "one\n"
    await written(fleet)
    records = (await fleet.ask("GET", ROOT)).json()["records"]
    found = [(await fleet.ask("GET", f"{ROOT}/{one['id']}")).json()["request_body"] for one in records]
    assert found.count(chat(content="é  \u2028 spaces")) == 2


async def test_an_answer_that_ends_in_an_error_says_so() -> None:
    async def cut(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(line("half \x1b"))
        await caller.chunk(b'{"error":"out of \\u001b memory"}\n')
        await caller.end_chunks()

    node = ScriptedNode(cut)
    async with serving(node), open_fleet([node.port]) as fleet:
        result = await run(fleet, "replay", await recorded(fleet))
        assert result.exit_code == 1
        assert result.stdout == "half ?\n"
        assert "out of ? memory" in result.stderr


async def test_what_was_not_kept_whole_is_not_sent_again() -> None:
    async def answer(caller: Caller) -> None:
        await caller.answer(last_line(content="one").rstrip())

    node = ScriptedNode(answer)
    async with serving(node), open_fleet([node.port], HISTORY_BODY_MAX_BYTES="60") as fleet:
        cut = await recorded(fleet, content="x" * 500)
        assert "this request cannot be sent again: a body was longer" in (await run(fleet, "replay", cut)).stderr
        assert "no record has this id" in (await run(fleet, "replay", "unknown")).stderr
        assert len(node.seen) == 1
        off = (await fleet.ask("POST", "/api/chat", chat(), headers={"X-Router-History": "off"})).headers["x-request-id"]
        await written(fleet)
        assert "no bodies were kept" in (await run(fleet, "replay", off)).stderr


def test_a_router_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    result = invoke("export", str(tmp_path / "x"), "--url", "http://127.0.0.1:1")
    assert (result.exit_code, result.stderr.startswith("Error: no router answers at")) == (1, True)


@pytest.mark.parametrize("path", STREAMS)
async def test_the_text_of_every_protocols_stream_is_printed(path: str) -> None:
    node = SimulatedOllama(models=["m"])
    async with node.serve(), open_fleet([node.port]) as fleet:
        answer = await fleet.ask("POST", path, {"model": "m", "stream": True, **STREAMS[path][0]})
        await written(fleet)
        result = await run(fleet, "replay", answer.headers["x-request-id"])
        await written(fleet)
        said = json.loads((await fleet.ask("GET", ROOT)).body)["records"]
        again = (await fleet.ask("GET", f"{ROOT}/{said[0]['id']}")).json()
        text, _, _ = STREAMS[path][1](again["response_body"])
        assert (len(said), result.stdout.split()) == (2, text.split())
