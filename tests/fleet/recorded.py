"""Recorded conversations with a real Ollama: read, played as a node, and held against what a client got through the router.

Knows what Ollama does and what the router must add (contract 4), nothing of how the router does it.

A played answer carries `X-Tape: exact`, or `json` when only the request's JSON value was recognised: then its bytes were changed on the
way. Player and judge may be wrong together only where a recording is, for they share nothing but the recordings.
"""

import base64
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import trio

from tests.fleet.rawhttp import Answer, Caller, Hangup, Reset, dechunk, parse_answer

WIRE = Path(__file__).parents[1] / "data" / "wire"
ROUTES = re.compile(r"/(api/(generate|chat|embed|embeddings)|v1/(chat/completions|completions|embeddings|responses|messages))$")
NOT_PASSED_ON = (499, 503)
"""Statuses that a router acts upon instead."""
UNLISTED = ("missing:latest", "damaged-shape:latest", "damaged-tensors:latest", "odd:half")
"""Models whose files were damaged, so that the recorded lists lack them."""
SSE_ENDS = (
    b"data: [DONE]", b'data: {"error"', b"event: message_stop", b"event: response.completed", b"event: response.incomplete",
    b"event: response.failed", b"event: error",
)  # fmt: skip
BLANK = (b"0001-01-01T00:00:00Z", b'"created":-62135596800', b'"created_at":-62135596800', b'"model":"","content":null')
RANDOM_ID = re.compile(rb'"request_id":"req_[0-9a-f]{24}"')
"""In Anthropic's error envelope: whoever answers makes one up."""
UNLOADED = b'"done_reason":"unload"'
"""A fleet unloads everywhere and answers itself, with its own time."""
CREATED = re.compile(rb'"created_at":"[^"]+"')


@dataclass(frozen=True)
class Exchange:
    """One request and its answer on one connection; `end` is `kept`, `eof`, `reset`, or `left` (the client closed first)."""

    case: str
    request: bytes
    answer_bytes: bytes
    end: str

    @cached_property
    def method(self) -> str:
        return self.request.split(b" ", 1)[0].decode()

    @cached_property
    def target(self) -> str:
        return self.request.split(b" ", 2)[1].decode("latin-1")

    @cached_property
    def body(self) -> bytes:
        head, _, body = self.request.partition(b"\r\n\r\n")
        return dechunk(body) if b"transfer-encoding: chunked" in head.lower() else body

    @cached_property
    def answer(self) -> Answer:
        return parse_answer(self.answer_bytes, self.method)

    @property
    def key(self) -> tuple[str, str, bytes]:
        return self.method, self.target, self.body


def _raw(event: dict[str, Any]) -> bytes:
    raw = event["raw"]
    return base64.b64decode(raw["b64"]) if isinstance(raw, dict) else str(raw).encode()


def _exchanges(tape: dict[str, Any]) -> Iterator[Exchange]:
    """The tape's exchanges: one for each connection that asked once and was answered."""
    by_conn: dict[Any, list[dict[str, Any]]] = {}
    for event in tape["events"]:
        by_conn.setdefault(event.get("conn"), []).append(event)
    for conn, events in by_conn.items():
        kinds = [event["do"] for event in events]
        first = next((i for i, event in enumerate(events) if event["do"] == "recv" and not _raw(event).startswith(b"HTTP/1.1 100")), None)
        if first is None or "send" not in kinds[:first] or "send" in kinds[first:]:
            continue
        ends = [{"close": "left"}.get(kind, kind) for kind in kinds if kind in ("eof", "reset", "close")]
        request = b"".join(_raw(event) for event in events[:first] if event["do"] == "send")
        answer = b"".join(_raw(event) for event in events[first:] if event["do"] == "recv")
        yield Exchange(f"{tape['case']}#{conn}", request, answer, ends[0] if ends else "kept")


def load(*names: str) -> list[Exchange]:
    """The exchanges of the named recordings, of all of them when none is named."""
    found: list[Exchange] = []
    for path in sorted(WIRE.glob("*.jsonl.gz")):
        if names and path.name.removesuffix(".jsonl.gz") not in names:
            continue
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                found.extend(_exchanges(json.loads(line)))
    return found


def json_value(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


class Player:
    """A node that answers recorded requests with the recorded bytes; `handle` is for a `RawServer`.

    What a router asks for its own sake (lists, versions) is made up.
    """

    def __init__(self, tapes: list[Exchange]) -> None:
        self.asked = 0
        self._takes: dict[tuple[str, str, bytes | str], list[Exchange]] = {}
        models: dict[str, dict[str, Any]] = {}
        for tape in tapes:
            self._takes.setdefault(tape.key, []).append(tape)
            self._takes.setdefault((tape.method, tape.target, json.dumps(json_value(tape.body), sort_keys=True)), []).append(tape)
            if tape.target == "/api/tags" and tape.method == "GET" and tape.answer.status == 200 and tape.answer.whole:
                models.update((row["name"].lower(), row) for row in tape.answer.json()["models"] if "remote_host" not in row)
            value = json_value(tape.body)
            if tape.answer.status == 200 and isinstance(value, dict) and isinstance(name := value.get("model"), str):
                models.setdefault(_full_name(name), {"digest": "0" * 64, "size": 1_000_000, "details": {}})
        for takes in self._takes.values():
            told = [tape for tape in takes if tape.end != "left" and tape.answer.status not in NOT_PASSED_ON]
            takes[:] = told or takes
        for name in UNLISTED:
            models.setdefault(name, {"digest": "0" * 64, "size": 1_000_000, "details": {}})
        self._tags = {"models": [{**row, "name": name, "model": name} for name, row in models.items()]}

    async def handle(self, caller: Caller) -> None:
        made_up: dict[str, Any] = {"/api/tags": self._tags, "/api/ps": {"models": []}, "/api/version": {"version": "0.33.0"}}
        if caller.method == "GET" and caller.target in made_up:
            await caller.answer(json.dumps(made_up[caller.target]).encode())
            return
        self.asked += 1
        how, tape = self._find(caller)
        if tape is None:
            await caller.answer(json.dumps({"error": f"no tape for {caller.body[:200]!r}"}).encode(), status=404)
            return
        await caller.send(tape.answer_bytes.replace(b"\r\n", b"\r\nX-Tape: " + how + b"\r\n", 1))
        if tape.end == "left":
            await caller.wait_for_departure()
        if tape.end == "reset":
            await trio.sleep(0.05)  # or the reset would overtake the bytes
            raise Reset
        if tape.end != "kept":
            raise Hangup

    def _find(self, caller: Caller) -> tuple[bytes, Exchange | None]:
        for how, key in ((b"exact", caller.body), (b"json", json.dumps(json_value(caller.body), sort_keys=True))):
            takes = self._takes.get((caller.method, caller.target, key))
            if takes:
                takes.append(takes.pop(0))  # several recordings of one request take turns
                return how, takes[-1]
        return b"none", None


def _full_name(name: str) -> str:
    name = name.strip().lower()
    return name if ":" in name.rpartition("/")[2] else name + ":latest"


def questions(tapes: list[Exchange]) -> dict[tuple[str, str, bytes], list[Exchange]]:
    """What to ask: each recorded request of the inference routes, with all the answers it got."""
    found: dict[tuple[str, str, bytes], list[Exchange]] = {}
    for tape in tapes:
        asked = tape.method != "OPTIONS" and ROUTES.search(tape.target.partition("?")[0])
        if asked and tape.end not in ("reset", "left") and tape.answer.status not in NOT_PASSED_ON:
            found.setdefault(tape.key, []).append(tape)
    return found


def is_stream(answer: Answer) -> bool:
    return answer.headers.get("content-type", "").startswith(("application/x-ndjson", "text/event-stream"))


def is_blank(answer: Answer) -> bool:
    """An answer that Ollama made of nothing."""
    return answer.status == 200 and (not answer.body or any(mark in answer.body for mark in BLANK))


def ends_properly(answer: Answer) -> bool:
    """Whether a stream says itself that it is over, well or not. Judged at line starts: text may contain anything."""
    lines = [line for line in answer.body.split(b"\n") if line.strip()]
    if not answer.whole or not lines:
        return False
    if answer.headers["content-type"].startswith("text/event-stream"):
        return any(line.startswith(SSE_ENDS) for line in lines[-4:])
    last = json_value(lines[-1])
    return isinstance(last, dict) and (last.get("done") is True or "error" in last)


def difference(recorded: Answer, got: Answer) -> str:
    """What is wrong with `got` as the router's answer where a node gave `recorded`; "" when nothing is."""
    if is_blank(recorded):
        told = b"error" in got.body and (got.status >= 500 or (is_stream(got) and not got.whole))
        return "" if told else f"a blank answer was passed on: {got.body[:200]!r}"
    if b'"done":false}' in recorded.body[-20:] and not is_stream(recorded) and got.status >= 500:
        return ""
    if got.status != recorded.status:
        return f"status {got.status} instead of {recorded.status}: {got.body[:200]!r}"
    if got.headers.get("content-type") != recorded.headers.get("content-type"):
        return f"content type {got.headers.get('content-type')!r} instead of {recorded.headers.get('content-type')!r}"
    if got.headers.get("x-tape") == "json":
        return "the request's bytes were changed on the way"
    if is_stream(recorded) and not ends_properly(recorded):
        told = got.body.startswith(recorded.body) and b"error" in got.body[len(recorded.body) :] and not got.whole
        return "" if told else f"the missing end was not told: {got.body[-120:]!r}"
    own = CREATED if UNLOADED in recorded.body else RANDOM_ID
    if own.sub(b"", got.body) != own.sub(b"", recorded.body):
        return f"body {got.body[:200]!r} instead of {recorded.body[:200]!r}"
    return "" if got.whole or not recorded.whole else "the answer's framing was cut"
