"""`request_history.json`: read an entry at a time, whatever is in it, and written whole."""

import fcntl
import io
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from core.units import UnixMs
from servers import history_file as module
from servers.history_file import NOBODY, entries, entry_of, record_of, replace
from tests.servers.store.databases import NOW

ENTRY: dict[str, Any] = {
    "id": "550e8400-e29b-41d4-a716-446655440000", "timestamp": "2026-01-31T12:00:00.123456789Z", "request_type": "chat", "model": "m",
    "agent_id": "660f9511-f39c-42e5-8827-557766551111", "agent_machine_name": "tower", "agent_ip": "192.168.1.100",
    "client_ip": "10.0.0.10", "request_body": {"model": "m"}, "response_body": {"prompt_eval_count": 3, "eval_count": 4},
    "duration_ms": 1500, "status": {"type": "success"}, "completed_at": "2026-01-31T12:00:02Z",
}  # fmt: skip


def read(text: str) -> list[Any]:
    return list(entries(io.StringIO(text)))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_entries_come_one_at_a_time(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_CHARS", chunk)
    values = [{"a": "]" * 50}, {"é": [1, {"b": None}]}, {}]
    assert read(" \n" * (chunk > 2) + json.dumps(values, indent=1)) == values
    assert read("[]") == []


@pytest.mark.parametrize(
    ("text", "found"),
    [("", [None]), ("{}", [None]), ('[{"a":1}, {"b', [{"a": 1}, None]), ('[{"a":1}', [{"a": 1}, None]), ("[{}, nonsense, {}]", [{}, None])],
)
def test_where_a_file_breaks_is_told_after_what_could_be_read(text: str, found: list[Any]) -> None:
    assert read(text) == found


def test_what_looks_like_an_endless_entry_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_CHARS", 10)
    monkeypatch.setattr(module, "ENTRY_MAX_CHARS", 100)
    file = io.StringIO('["' + "x" * 10_000)
    assert list(entries(file)) == [None]
    assert file.tell() < 1000


def test_an_entry_as_a_record() -> None:
    record = record_of(ENTRY, now=NOW)
    assert record is not None
    assert (record.request_id, record.at_ms, record.completed_at_ms) == (ENTRY["id"], 1_769_860_800_123, 1_769_860_802_000)
    assert (record.agent_id, record.agent_name, record.client, record.edge) == (ENTRY["agent_id"], "tower", "10.0.0.10", "imported")
    assert (record.status, record.message, record.http_status, record.duration_ms) == ("success", "", 200, 1500.0)
    assert (record.prompt_tokens, record.output_tokens, record.path) == (3, 4, "/api/chat")
    assert (record.request_body, record.response_body) == (b'{"model":"m"}', b'{"prompt_eval_count":3,"eval_count":4}')


@pytest.mark.parametrize(
    ("status", "meant"),
    [
        ("success", ("success", "")), ("Error", ("error", "")), ({"type": "error", "message": "cut"}, ("error", "cut")),
        ({"Error": {"message": "cut"}}, ("error", "cut")), ({"error": "cut"}, ("error", "cut")), ({}, ("unknown", "")),
        ("other", ("unknown", "")), ({"type": "error", "message": 7}, ("error", "")),
    ],
)  # fmt: skip
def test_every_spelling_of_a_status(status: Any, meant: tuple[str, str]) -> None:
    record = record_of({**ENTRY, "status": status}, now=NOW)
    assert record is not None
    assert (record.status, record.message) == meant


def test_the_least_that_an_entry_needs() -> None:
    record = record_of({"id": "1", "timestamp": "2026-01-31T12:00:00+01:00", "node_id": NOBODY, "response_body": {"usage": 3}}, now=NOW)
    assert record is not None
    assert (record.agent_id, record.model, record.completed_at_ms, record.output_tokens) == (None, None, 1_769_857_200_000, 0)
    openai = record_of({**ENTRY, "response_body": {"usage": {"prompt_tokens": 5, "completion_tokens": 6}}}, now=NOW)
    assert openai is not None
    assert (openai.prompt_tokens, openai.output_tokens) == (5, 6)


@pytest.mark.parametrize(
    "broken",
    [
        None, 3, [], {}, {**ENTRY, "id": ""}, {**ENTRY, "id": "x" * 101}, {**ENTRY, "id": "a\0"}, {**ENTRY, "id": 7},
        {**ENTRY, "timestamp": "2026-01-31T12:00:00"}, {**ENTRY, "timestamp": "soon"}, {**ENTRY, "timestamp": "2096-01-31T12:00:00Z"},
        {**ENTRY, "timestamp": "1906-01-31T12:00:00Z"}, {**ENTRY, "duration_ms": -1}, {**ENTRY, "duration_ms": float("inf")},
        {**ENTRY, "agent_id": "\ud800"}, {**ENTRY, "request_body": "\ud800"},
    ],
)  # fmt: skip
def test_what_is_no_entry(broken: Any) -> None:
    assert record_of(broken, now=NOW) is None


def test_what_is_written_is_read_again() -> None:
    shown = {
        "id": "r", "at_ms": 1_769_860_800_123, "completed_at_ms": 1_769_860_802_000, "request_type": "chat", "model": None,
        "agent_id": None, "agent_name": None, "client": "", "duration_ms": 4.6, "status": "cancelled", "message": "",
        "request_body": b'{"model" : "m"}', "response_body": b"no json",
    }  # fmt: skip
    entry = json.loads(entry_of(shown))
    assert entry == {
        "id": "r", "timestamp": "2026-01-31T12:00:00.123Z", "request_type": "chat", "model": "", "agent_id": NOBODY,
        "agent_machine_name": "", "agent_ip": "0.0.0.0", "client_ip": None, "request_body": {"model": "m"}, "response_body": "no json",
        "duration_ms": 5, "status": {"type": "error", "message": "cancelled"}, "completed_at": "2026-01-31T12:00:02Z",
    }  # fmt: skip
    again = record_of(json.loads(entry_of({**shown, "status": "success"})), now=NOW)
    assert again is not None
    assert (again.request_id, again.at_ms, again.status) == ("r", UnixMs(1_769_860_800_123), "success")


def test_a_file_is_replaced_whole_and_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "request_history.json"
    path.write_text("old")
    replace(path, [b"1", b"2"])
    assert json.loads(path.read_bytes()) == [1, 2]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    replace(path, [])
    assert path.read_bytes() == b"[]\n"

    def broken() -> Any:
        yield b"1"
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        replace(path, broken())
    assert path.read_bytes() == b"[]\n"
    assert not path.with_name(path.name + ".part").exists()


def test_one_process_at_a_time_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "request_history.json"
    with path.with_name(path.name + ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            replace(path, [b"1"])
    assert not path.exists()
