"""The file `request_history.json`, as programs around an earlier router know it: read once, and written as a mirror of the newest records.

Decides the form of its entries, both ways. Must never know why a record is kept. Invariants: it is read an entry at a time, whatever its
size, and what is no entry is told apart, never an exception; it is replaced whole, by one process at a time, and is its owner's alone.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, TextIO

import msgspec

from core.history import HistoryRecord
from core.units import UnixMs
from servers import clock
from servers.records import body_value

FILE: Final = "request_history.json"
CHUNK_CHARS: Final = 1 << 20
ENTRY_MAX_CHARS: Final = 64 << 20
"""What looks like a longer entry than this is a broken file."""
ID_MAX: Final = 100
NOBODY: Final = "00000000-0000-0000-0000-000000000000"
_PATHS: Final = {"chat": "/api/chat", "generate": "/api/generate", "embeddings": "/api/embed"}

_Moment = Annotated[datetime, msgspec.Meta(tz=True)]
_Ms = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class _Entry(msgspec.Struct):
    id: Annotated[str, msgspec.Meta(min_length=1, max_length=ID_MAX)]
    timestamp: _Moment
    request_type: str = "chat"
    model: str | None = None
    agent_id: str | None = None
    node_id: str | None = None
    agent_machine_name: str | None = None
    client_ip: str | None = None
    request_body: Any = None
    response_body: Any = None
    duration_ms: _Ms = 0.0
    status: str | dict[str, Any] = "unknown"
    completed_at: _Moment | None = None


# ---------------------------------------------------------------- read


def entries(file: TextIO) -> Iterator[Any]:
    """The values of the list in `file`, one at a time. Where it cannot be read any further the last value is None."""
    decode = json.JSONDecoder().raw_decode
    buffer, at, more = file.read(CHUNK_CHARS), 0, CHUNK_CHARS
    begin = len(buffer) - len(buffer.lstrip())
    if buffer[begin : begin + 1] != "[":
        yield None
        return
    at = begin + 1
    while True:
        while at < len(buffer) and (buffer[at].isspace() or buffer[at] == ","):
            at += 1
        if buffer[at : at + 1] == "]":
            return
        try:
            value, at = decode(buffer, at)
        except (ValueError, RecursionError):
            data = file.read(more)
            if not data or len(buffer) - at > ENTRY_MAX_CHARS:
                yield None
                return
            buffer, at, more = buffer[at:] + data, 0, more * 2  # so that a long entry is not tried too often
        else:
            more = CHUNK_CHARS
            yield value


def record_of(value: Any, *, now: UnixMs) -> HistoryRecord | None:
    """An entry as a record without a number, its bodies as JSON. None: it is no entry."""
    try:
        entry = msgspec.convert(value, _Entry)
        at_ms, completed_at_ms = _unix_ms(entry.timestamp), _unix_ms(entry.completed_at or entry.timestamp)
        request_body, response_body = (
            None if body is None else msgspec.json.encode(body) for body in (entry.request_body, entry.response_body)
        )
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
        return None
    agent_id = entry.agent_id or entry.node_id or NOBODY
    if not (0 <= at_ms <= now and (entry.id + entry.request_type + agent_id).isprintable()):
        return None
    status, message = _status(entry.status)
    answer = entry.response_body if isinstance(entry.response_body, dict) else {}
    return HistoryRecord(
        number=0, request_id=entry.id, at_ms=at_ms, completed_at_ms=completed_at_ms, request_type=entry.request_type[:32],
        path=_PATHS.get(entry.request_type, ""), model=entry.model, agent_id=None if agent_id == NOBODY else agent_id[:ID_MAX],
        agent_name=entry.agent_machine_name, client=entry.client_ip or "", key_id=None, status=status, message=message,
        http_status=200 if status == "success" else 0, duration_ms=entry.duration_ms, queue_ms=0.0, ttft_ms=None,
        predicted_start_ms=None, prompt_tokens=_count(answer, "prompt_eval_count", "prompt_tokens"),
        output_tokens=_count(answer, "eval_count", "completion_tokens"), load_ms=0.0, attempts=b"[]", edge="imported", chunks=0,
        body_bytes=len(response_body or b""), request_body=request_body, response_body=response_body,
    )  # fmt: skip


def _unix_ms(moment: datetime) -> UnixMs:
    return UnixMs(int(moment.timestamp() * 1000))


def _status(status: str | dict[str, Any]) -> tuple[str, str]:
    """`"success"`, `{"type": "error", "message": …}` or `{"error": {"message": …}}`, as a status and a message."""
    if isinstance(status, str):
        kind, message = status, None
    elif isinstance(status.get("type"), str):
        kind, message = status["type"], status.get("message")
    else:
        kind = next(iter(status), "")
        inner = status.get(kind)
        message = inner.get("message") if isinstance(inner, dict) else inner
    kind = kind.lower()
    return kind if kind in ("success", "error", "cancelled") else "unknown", message if isinstance(message, str) else ""


def _count(answer: dict[str, Any], own: str, openai: str) -> int:
    usage = answer.get("usage")
    value = answer.get(own, usage.get(openai) if isinstance(usage, dict) else 0)
    return value if isinstance(value, int) and value > 0 else 0


# ---------------------------------------------------------------- written


def entry_of(record: dict[str, Any]) -> bytes:
    """A record (as `servers.store.queries` gives it) as an entry."""
    kind = "success" if record["status"] == "success" else "error"
    status = {"type": kind} if kind == "success" else {"type": kind, "message": record["message"] or record["status"]}
    return msgspec.json.encode(
        {
            "id": record["id"], "timestamp": clock.rfc3339(record["at_ms"]), "request_type": record["request_type"],
            "model": record["model"] or "", "agent_id": record["agent_id"] or NOBODY, "agent_machine_name": record["agent_name"] or "",
            "agent_ip": "0.0.0.0", "client_ip": record["client"] or None, "request_body": body_value(record["request_body"]),
            "response_body": body_value(record["response_body"]), "duration_ms": round(record["duration_ms"]), "status": status,
            "completed_at": clock.rfc3339(record["completed_at_ms"]),
        }
    )  # fmt: skip


def replace(path: Path, written: Iterable[bytes]) -> None:
    """Make `path` a list of these entries, all of it or nothing.

    Raises:
        OSError: it cannot be written, or another process writes it now.
    """
    part = path.with_name(path.name + ".part")
    with _alone(path.with_name(path.name + ".lock")):
        try:
            part.unlink(missing_ok=True)
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                lead = b"["
                for entry in written:
                    file.write(lead + entry)
                    lead = b",\n"
                file.write(b"]\n" if lead != b"[" else b"[]\n")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            import fcntl
        except ImportError:  # a system without it; the rename is whole all the same
            pass
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
