"""A stream's bytes as the one answer that they amount to, for history.

Decides what a list of NDJSON lines or server-sent events says when they are put together: the answer that the same request would have
had without streaming, as far as the stream went. Must never know a socket or a router; it runs when the answer is over, off the loop.

Invariants: any bytes join to something, broken or cut ones to what could be read, never to an exception; texts keep their order; what
the node said of the whole (counts, durations, why it stopped) is taken from its last word on it. Shapes: Ollama's API as recorded.
"""

from collections.abc import Iterator
from typing import Any, Final, assert_never

import msgspec

from core.events import Protocol

Json = dict[str, Any]

LINES_MAX: Final = 1_000_000
"""Lines that are looked at; no answer has more tokens."""

_decode: Final = msgspec.json.Decoder().decode


def joined(protocol: Protocol, stream: bytes) -> bytes:
    """The answer of a streaming request as one JSON object, or `b""` when nothing of it can be read."""
    match protocol:
        case Protocol.NATIVE:
            whole = _native(stream)
        case Protocol.OPENAI:
            whole = _openai(_events(stream))
        case Protocol.RESPONSES:
            whole = _responses(_events(stream))
        case Protocol.ANTHROPIC:
            whole = _anthropic(_events(stream))
        case _:
            assert_never(protocol)
    return msgspec.json.encode(whole) if whole else b""


def _events(stream: bytes) -> Iterator[Json]:
    """The objects in the `data:` lines; `[DONE]` is none."""
    for number, line in enumerate(stream.split(b"\n")):
        if number >= LINES_MAX:
            return
        if line.startswith(b"data:"):
            value = _object(line[5:])
            if value is not None:
                yield value


def _object(line: bytes) -> Json | None:
    line = line.strip()
    if not line.startswith(b"{"):
        return None
    try:
        value = _decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    assert isinstance(value, dict)
    return value


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _dict(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


class _Texts:
    """Growing texts by name; joined once, so that a long answer costs no more than its length."""

    def __init__(self) -> None:
        self._parts: dict[str, list[str]] = {}

    def add(self, name: str, piece: object) -> None:
        if isinstance(piece, str) and piece:
            self._parts.setdefault(name, []).append(piece)

    def put(self, into: Json) -> None:
        for name, parts in self._parts.items():
            into[name] = "".join(parts)


# ---------------------------------------------------------------- Ollama's own


class _Said(msgspec.Struct):
    """What lines in the midst of a stream add. Read so, a line costs a third of what it costs as a dict."""

    content: str = ""
    thinking: str = ""
    tool_calls: list[Any] | None = None


class _Line(msgspec.Struct):
    message: _Said | None = None
    response: str = ""
    thinking: str = ""
    tool_calls: list[Any] | None = None
    logprobs: list[Any] | None = None


_lines: Final = msgspec.json.Decoder(_Line)


def _native(stream: bytes) -> Json:
    lines = [line for line in stream.split(b"\n", LINES_MAX)[:LINES_MAX] if line.startswith(b"{")]
    last: Json | None = None
    while lines and last is None:  # the last may be cut
        last = _object(lines.pop())
    if last is None:
        return {}
    first = (_object(lines[0]) or {}) if lines else {}
    message = {**_dict(first.get("message")), **_dict(last.get("message"))}
    return _put_together({**first, **last}, message, [*_read(lines), _as_line(last)])


def _read(lines: list[bytes]) -> list[_Line]:
    """What can be read of them; all at once where they are as a node sends them."""
    try:
        return _lines.decode_lines(b"\n".join(lines))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    found = []
    for line in lines:
        try:
            found.append(_lines.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
    return found


def _as_line(last: Json) -> _Line:
    """The last line, which may be an error or anything else, as far as it adds something."""
    said = _dict(last.get("message"))
    inner = _Said(_text(said.get("content")), _text(said.get("thinking")), _list(said.get("tool_calls")))
    lists = _list(last.get("tool_calls")), _list(last.get("logprobs"))
    return _Line(inner, _text(last.get("response")), _text(last.get("thinking")), *lists)


def _put_together(whole: Json, message: Json, lines: list[_Line]) -> Json:
    """What the first and the last line say, with what all of them add; `lines` are gone through once for each text, which is quickest."""
    said = [line.message for line in lines if line.message is not None]
    calls = [call for line in lines for one in (line.message, line) if one is not None and one.tool_calls for call in one.tool_calls]
    added: list[tuple[Json, str, Any]] = [
        (message, "content", "".join([one.content for one in said])),
        (message, "thinking", "".join([one.thinking for one in said])),
        (whole, "response", "".join([line.response for line in lines])),
        (whole, "thinking", "".join([line.thinking for line in lines])),
        (whole, "logprobs", [one for line in lines if line.logprobs for one in line.logprobs]),
    ]
    for name in ("message", "tool_calls"):
        whole.pop(name, None)
    message.pop("tool_calls", None)
    for into, name, value in added:
        into.pop(name, None)
        if value:
            into[name] = value
    if calls:
        (message or whole)["tool_calls"] = calls
    if message:
        whole["message"] = message
    return whole


# ---------------------------------------------------------------- OpenAI's


def _openai(events: Iterator[Json]) -> Json:
    whole: Json = {}
    choices: dict[int, _Choice] = {}
    for event in events:
        for choice in map(_dict, _list(event.pop("choices", None))):
            index = choice.get("index", 0)
            if isinstance(index, int):
                choices.setdefault(index, _Choice()).take(choice)
        whole.update({name: value for name, value in event.items() if value is not None and (value != "" or name not in whole)})
    if choices:
        whole["choices"] = [{"index": index, **choices[index].whole()} for index in sorted(choices)]
    kind = whole.get("object")
    if isinstance(kind, str):
        whole["object"] = kind.removesuffix(".chunk")
    return whole


class _Choice:
    """One choice of an OpenAI stream."""

    def __init__(self) -> None:
        self.message: Json = {}
        self.rest: Json = {}
        self.said, self.text = _Texts(), _Texts()
        self.calls: dict[object, Json] = {}
        self.arguments: dict[object, list[str]] = {}

    def take(self, choice: Json) -> None:
        delta = _dict(choice.pop("delta", None))
        self.text.add("text", choice.pop("text", None))
        for name in ("content", "reasoning", "reasoning_content", "refusal"):
            self.said.add(name, delta.pop(name, None))
        for call in map(_dict, _list(delta.pop("tool_calls", None))):
            self._call(call)
        self.message.update({name: value for name, value in delta.items() if value is not None})
        self.rest.update({name: value for name, value in choice.items() if value is not None and name != "index"})

    def _call(self, call: Json) -> None:
        index = call.pop("index", len(self.calls))
        if not isinstance(index, int):
            return
        function = _dict(call.pop("function", None))
        self.arguments.setdefault(index, []).append(_text(function.pop("arguments", None)))
        known = self.calls.setdefault(index, {"function": {}})
        known.update({name: value for name, value in call.items() if value is not None})
        known["function"].update({name: value for name, value in function.items() if value is not None})

    def whole(self) -> Json:
        found: Json = {}
        self.text.put(found)
        self.said.put(self.message)
        for index, call in self.calls.items():
            call["function"]["arguments"] = "".join(self.arguments[index])
        if self.calls:
            self.message["tool_calls"] = list(self.calls.values())
        if self.message:
            found["message"] = self.message
        return {**found, **self.rest}


def _responses(events: Iterator[Json]) -> Json:
    """The response that the last event holds; its text from the deltas where no such event came."""
    whole: Json = {}
    texts = _Texts()
    ended = False
    for event in events:
        kind = _text(event.get("type"))
        response = event.get("response")
        if isinstance(response, dict):
            whole.update(response)
            ended = kind in ("response.completed", "response.incomplete")
        elif kind == "response.output_text.delta":
            texts.add("output_text", event.get("delta"))
        elif "error" in event:
            whole["error"] = event["error"]
    if not ended:
        texts.put(whole)
    return whole


# ---------------------------------------------------------------- Anthropic's


def _anthropic(events: Iterator[Json]) -> Json:
    whole: Json = {}
    blocks: dict[object, tuple[Json, _Texts]] = {}
    for event in events:
        kind = event.get("type")
        if kind == "message_start":
            whole.update(_dict(event.get("message")))
        elif kind == "content_block_start":
            blocks[_index(event)] = (_dict(event.get("content_block")), _Texts())
        elif kind == "content_block_delta":
            _, texts = blocks.setdefault(_index(event), ({}, _Texts()))
            delta = _dict(event.get("delta"))
            for name in ("text", "thinking", "signature", "partial_json"):
                texts.add(name, delta.get(name))
        elif kind == "message_delta":
            whole.update(_dict(event.get("delta")))
            whole["usage"] = {**_dict(whole.get("usage")), **_dict(event.get("usage"))}
        elif kind == "error":
            whole["error"] = event.get("error")
    if blocks:
        whole["content"] = [_block(block, texts) for block, texts in blocks.values()]
    return whole


def _index(event: Json) -> int:
    index = event.get("index", 0)
    return index if isinstance(index, int) else 0


def _block(block: Json, texts: _Texts) -> Json:
    """A content block with its deltas in it; a tool's input is JSON in pieces."""
    texts.put(block)
    pieces = block.pop("partial_json", None)
    if pieces is not None:
        found = _object(pieces.encode("utf-8", "surrogatepass"))
        block["input"] = pieces if found is None else found
    return block
