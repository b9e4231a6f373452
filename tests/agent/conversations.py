"""Recorded conversations with a real Ollama, held with a simulated one: what was sent is sent again, the answers are compared.

Compared are statuses, some headers, framing, fields and their order, and texts with digests and node paths made alike; numbers, times, ids
and what a model says may differ. Turns of one conversation are taken one after the other, in the order in which they began.
"""

import base64
import gzip
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tests.fleet.rawhttp import Answer, parse_answer

WIRE = Path(__file__).parents[1] / "data" / "wire"
FREE = (
    "created_at modified_at expires_at id item_id response content text delta thinking digest embedding token modelfile request_id",
    "arguments reasoning reasoning_content signature encrypted_content call_id partial_json",
)
FREE_TEXT = frozenset(key for line in FREE for key in line.split())
LISTS = ("models", "data")
HEADERS = ("content-type", "allow", "location", "cache-control", "access-control-allow-origin", "vary")
NODE_PATH = re.compile(r"/usr/share/[^ :]*?(/\.ollama/models|/small)(?=/)")
HEX = re.compile(r"\b[0-9a-f]{12}([0-9a-f]{52})?\b")
TEMPORARY = re.compile(r"sha256-\d+")
PATIENCE_S = 20.0


@dataclass(frozen=True)
class Turn:
    """One request on a connection, and what came before the next."""

    conn: str
    at_ms: float
    sent: bytes
    received: bytes
    half_closed: bool = False

    @property
    def method(self) -> str:
        return self.sent.split(b" ", 1)[0].decode()

    @property
    def target(self) -> str:
        return self.sent.split(b" ", 2)[1].decode("latin-1")

    @property
    def answer(self) -> Answer:
        return parse_answer(self.received, self.method)


@dataclass(frozen=True)
class Conversation:
    case: str
    about: str
    turns: tuple[Turn, ...]

    @property
    def date(self) -> str:
        """When it was recorded, as far as its first answer tells."""
        found = re.search(rb"Date: \w+, (\d+) Nov 2026 ([\d:]+) GMT", b"".join(turn.received for turn in self.turns))
        return "" if found is None else found[2].decode()


def _raw(event: dict[str, Any]) -> bytes:
    raw = event["raw"]
    return base64.b64decode(raw["b64"]) if isinstance(raw, dict) else str(raw).encode()


def _turns(events: list[dict[str, Any]]) -> tuple[Turn, ...]:
    turns = []
    for conn in dict.fromkeys(str(event["conn"]) for event in events if event["do"] == "send"):
        sent, received, at_ms = b"", b"", 0.0
        for event in (event for event in events if event.get("conn") == conn):
            if event["do"] == "send":
                if received and not received.startswith(b"HTTP/1.1 100"):
                    turns.append(Turn(conn, at_ms, sent, received))
                    sent, received = b"", b""
                at_ms = at_ms if sent else event["ms"]
                sent += _raw(event)
            elif event["do"] == "recv":
                received += _raw(event)
        turns.append(Turn(conn, at_ms, sent, received))
    return tuple(sorted(turns, key=lambda turn: turn.at_ms))


def load(group: str) -> list[Conversation]:
    """The conversations of a group, in the order in which they were recorded."""
    path = next(path for path in (WIRE / f"{group}.jsonl.gz", WIRE / "models" / f"{group}.jsonl.gz") if path.exists())
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        found = [Conversation(tape["case"], tape["about"], _turns(tape["events"])) for tape in map(json.loads, lines)]
    return sorted(found, key=lambda conversation: conversation.date)


def alike(text: str) -> str:
    """`text` without what differs from node to node."""
    text = TEMPORARY.sub("sha256-#", NODE_PATH.sub("<models>", text))
    return HEX.sub(lambda found: "#" * min(len(found[0]), 12), text)


def shape(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return [(name, shape(item, name)) for name, item in value.items()]
    if isinstance(value, list):
        return [shape(_row(item) if key in LISTS else item, key) for item in value[:1]]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str):
        return "text" if key in FREE_TEXT else alike(value)
    return "number"


def _row(item: Any) -> Any:
    """A row of a list of models, of which other tests say which they are."""
    if not isinstance(item, dict):
        return item
    anything = {name: "" for name in ("name", "model", "id", "owned_by") if name in item}
    details = {"parent_model": "", "parameter_size": "", "quantization_level": ""}
    return item | anything | ({"details": item["details"] | details} if "details" in item else {})


def body_shape(answer: Answer) -> list[Any]:
    """The shapes of the body's lines, runs of equal ones as one."""
    out: list[Any] = []
    for line in re.sub(rb"(?m)^data: ?", b"", answer.body).splitlines():
        if not line.strip():
            continue
        try:
            item = shape(json.loads(line))
        except (ValueError, RecursionError):
            item = alike(line.decode("utf-8", "replace"))
        if not out or out[-1] != item:
            out.append(item)
    return out


def fingerprint(answer: Answer) -> list[Any]:
    """What is compared of an answer."""
    framing = "chunked" if "transfer-encoding" in answer.headers else "sized" if "content-length" in answer.headers else "bare"
    return [answer.status, {name: answer.headers.get(name) for name in HEADERS if name in answer.headers}, framing, body_shape(answer)]


def difference(got: Answer | None, recorded: Answer) -> str:
    """What is different, or nothing."""
    if got is None:
        return "no answer"
    ours, theirs = fingerprint(got), fingerprint(recorded)
    if ours[2] != theirs[2] and {ours[2], theirs[2]} == {"chunked", "sized"} and ours[0] == 200:
        ours[2] = theirs[2]  # a longer name makes a longer body
    for our, their in zip(ours, theirs, strict=True):
        if our != their:
            return f"{str(our)[:400]}, recorded {str(their)[:400]}"
    return ""


def _is_whole(data: bytes, method: str) -> bool:
    head, found, body = data.partition(b"\r\n\r\n")
    if not found:
        return False
    if head.startswith(b"HTTP/1.1 100"):
        return _is_whole(body, method)
    if method == "HEAD" or head.startswith((b"HTTP/1.1 204", b"HTTP/1.1 304")):
        return True
    if b"transfer-encoding: chunked" in head.lower():
        return body.endswith(b"0\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return length is not None and len(body) >= int(length[1])


class Line:
    """A connection to the node."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    async def take(self, turn: Turn) -> Answer | None:
        """Send what was sent, and read one answer."""
        data = b""
        try:
            await self.stream.send_all(turn.sent)
            if turn.half_closed:
                await self.stream.send_eof()
            while not _is_whole(data, turn.method):
                got = await self.stream.receive_some(1 << 16)
                if not got:
                    break
                data += got
        except trio.BrokenResourceError:
            pass
        return parse_answer(data, turn.method) if b"\r\n\r\n" in data else None


@asynccontextmanager
async def lines_to(port: int) -> AsyncIterator[dict[str, Line]]:
    """Connections by name, opened when first asked for with `line_of`."""
    lines: dict[str, Line] = {}
    try:
        yield lines
    finally:
        for line in lines.values():
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(line.stream)


async def replay(conversation: Conversation, port: int, *, before_turn: Callable[[], None] | None = None) -> list[str]:
    """Hold the conversation with the node on `port`: one line for each turn that was answered differently."""
    wrong = []
    async with lines_to(port) as lines:
        for number, turn in enumerate(conversation.turns):
            if not turn.received:
                continue
            if before_turn is not None:
                before_turn()
            if turn.conn not in lines:
                lines[turn.conn] = Line(await trio.open_tcp_stream("127.0.0.1", port))
            got = None
            with trio.move_on_after(PATIENCE_S):
                got = await lines[turn.conn].take(turn)
            if found := difference(got, turn.answer):
                wrong.append(f"{conversation.case} turn {number} {turn.sent.split(b' HTTP')[0].decode()} {turn.sent[-120:]!r}: {found}")
    return wrong
