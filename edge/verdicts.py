"""What an answer's bytes say about themselves: whole, cut, blank, unfinished, and what they cost.

Decides how an answer ended, never what to do about it; must never know connections or nodes. Used by `edge.relay` while bytes pass.

Ollama answers 200 to much that failed, so only its own words count. A stream is over when its last line or event says so; text may
contain anything, so this is looked for at line starts, and in NDJSON at the top level of the line. Invariants: feeding costs a fraction
of a microsecond per read and parses nothing, except lines above `LINE_KEEP_BYTES` (generate's `context`, tool arguments), which pass
through the exact scanner; what is held is bounded, and a few KB at ordinary speeds.
"""

import re
from collections import deque
from typing import Final

import msgspec

from core.events import Failure, Protocol, Route, Usage
from core.structs import Fact
from edge.answer_shapes import ANSWERS, NO_TIME, ErrorBody, LastLine, decode_counts, decode_whole
from edge.jsonscan import Scanner, go_string

LINE_KEEP_BYTES: Final = 64 << 10
"""A line that grows longer is judged by the scanner and kept only at both ends."""

TAIL_BYTES: Final = 2048
"""The counts stand within so many bytes of the end."""
TEXT_MAX_CHARS: Final = 4096

REPEATS: Final = 30
"""The repeat guard lets 31 equal tokens pass, 30 if they are white space."""
REPEAT_MAX_CHARS: Final = 64
RECENT_MAX_BYTES: Final = 8192
"""Kept of each of the last reads, at most."""

_DONE: Final = b"data: [DONE]"
_SSE_ENDS: Final = (
    _DONE,
    b"event: message_stop",
    b"event: response.completed",
    b"event: response.incomplete",
    b"event: response.failed",
    b"event: error",
    b'data: {"error"',
)
_SSE_ERRORS: Final = (b"event: response.failed", b"event: error", b'data: {"error"')
_STRING: Final = rb'("[^"\\]*+(?:\\.[^"\\]*+)*+")'
_TOKEN: Final = re.compile(rb'"(?:response|content|text|thinking|reasoning|delta)":' + _STRING)
_MESSAGE: Final = re.compile(rb'"message": ?' + _STRING)
_COUNTS: Final = {
    Protocol.NATIVE: re.compile(
        rb'"(prompt_eval_count|eval_count|total_duration|load_duration|prompt_eval_duration|eval_duration)":([0-9]{1,18})(?=[,}])'
    ),
    Protocol.OPENAI: re.compile(rb'"(prompt_tokens|completion_tokens)":([0-9]{1,18})(?=[,}])'),
    Protocol.RESPONSES: re.compile(rb'"(input_tokens|output_tokens)":([0-9]{1,18})(?=[,}])'),
    Protocol.ANTHROPIC: re.compile(rb'"(input_tokens|output_tokens)":([0-9]{1,18})(?=[,}])'),
}
_NATIVE: Final = Protocol.NATIVE  # members of enumerations cost a Python call each where they are looked up (up to CPython 3.11)
_USAGE_FIELDS: Final = {
    b"prompt_eval_count": "prompt_tokens",
    b"prompt_tokens": "prompt_tokens",
    b"input_tokens": "prompt_tokens",
    b"eval_count": "output_tokens",
    b"completion_tokens": "output_tokens",
    b"output_tokens": "output_tokens",
    b"total_duration": "total_ns",
    b"load_duration": "load_ns",
    b"prompt_eval_duration": "prompt_ns",
    b"eval_duration": "eval_ns",
}


def usage_of(tail: bytes, protocol: Protocol) -> Usage | None:
    """The counts in the last bytes of an answer; None when it tells none. Where a name comes twice the last one is meant."""
    if protocol is _NATIVE and tail[:1] == b"{" and tail.find(b"\n", 0, -1) < 0:
        try:  # one whole object: three times as fast as the search
            return decode_counts(tail).usage()
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            pass
    found = {_USAGE_FIELDS[name]: int(digits) for name, digits in _COUNTS[protocol].findall(tail)}
    return Usage(**found) if any(found.values()) else None


def error_text(body: bytes) -> str:
    """The words of an error body in any of the envelopes; what is none is shown as it stands."""
    error: object = None
    try:
        error = msgspec.json.decode(body, type=ErrorBody).error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    if isinstance(error, dict):
        error = error.get("message")
    return (error if isinstance(error, str) else body.decode("utf-8", "replace"))[:TEXT_MAX_CHARS]


# ---------------------------------------------------------------- streams


class StreamEnd(Fact, frozen=True):
    """How a stream ended."""

    proper: bool
    """Its last line or event says that it is over, well or not."""
    error: str | None
    """What that line or event says went wrong."""


_IMPROPER: Final = StreamEnd(proper=False, error=None)


class StreamJudge:
    """Watches a stream pass. Feed it every body byte, in order; ask it at the end."""

    __slots__ = ("_before", "_end", "_fresh", "_held", "_recent", "_scanner", "_sse")

    def __init__(self, *, sse: bool) -> None:
        self._sse = sse
        self._end = b"\n\n" if sse else b"\n"
        self._held = b""  # from the beginning of the current line (event), or of an earlier one, to the end of what was fed
        self._before = b""  # what was held before that
        self._fresh = True  # what was fed ends with the end of a line (event)
        self._scanner: Scanner | None = None  # reads the current line when it is long
        self._recent: deque[bytes] = deque(maxlen=REPEATS + 2)  # enough to know the repeat guard by

    def feed(self, data: bytes) -> None:
        """More of the body."""
        if self._fresh:
            self._recent.append(data[-RECENT_MAX_BYTES:])
            self._before = self._held
            self._held = data
            self._fresh = data.endswith(self._end)
        else:
            self._go_on(data)

    def _go_on(self, data: bytes) -> None:
        """A read ended within a line: join the parts, unless the line is long."""
        end = self._end
        self._recent[-1] = (self._recent[-1] + data)[-RECENT_MAX_BYTES:]
        if self._scanner is not None:
            _scan(self._scanner, data[: data.find(b"\n") + 1] or data)
        joined = self._held + data
        begin = joined.rfind(end, 0, len(joined) - len(end)) + len(end)
        self._fresh = joined.endswith(end)
        if begin >= len(end):
            self._before = joined[max(0, begin - TAIL_BYTES) : begin]
            self._held = joined[begin:]
            self._scanner = None
        elif len(joined) <= LINE_KEEP_BYTES:
            self._held = joined
        else:
            if self._scanner is None and not self._sse:
                self._scanner = Scanner(_done_or_error)
                _scan(self._scanner, joined)
            # The head tells an event's kind, the tail the counts; "#" begins no line that means anything.
            self._held = joined[:TAIL_BYTES] + (b"\n#" if self._sse else b"#") + joined[-TAIL_BYTES:]

    @property
    def mid_line(self) -> bool:
        """Whether the stream stopped within a line, or within an event: a line end must come before anything else."""
        return not self._fresh

    def end(self) -> StreamEnd:
        """How the stream ended, if it ended here."""
        return self._sse_end() if self._sse else self._ndjson_end()

    def usage(self, protocol: Protocol) -> Usage | None:
        """The counts of the last line (event), or of the one before."""
        return usage_of((self._before + self._held)[-TAIL_BYTES:], protocol)

    def ends_in_repeats(self) -> bool:
        """Whether the last tokens are all the same, as when the repeat guard stopped the model: the node is well."""
        tokens = [token for token in _TOKEN.findall(b"".join(self._recent)) if token != b'""'][-REPEATS:]
        return len(tokens) == REPEATS and len({go_string(token).strip() for token in tokens}) == 1

    def _ndjson_end(self) -> StreamEnd:
        if self._scanner is not None:
            self._scanner.close()
            return _end_by_scanner(self._scanner)
        text = self._held.rstrip() or self._before.rstrip()
        line = text[text.rfind(b"\n") + 1 :]
        try:
            last = msgspec.json.decode(line, type=LastLine)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            scanner = Scanner(_done_or_error)
            scanner.feed(line)
            scanner.close()
            return _end_by_scanner(scanner)
        error = bytes(last.error)
        return StreamEnd(proper=last.done or bool(error), error=_error_value(error) if error else None)

    def _sse_end(self) -> StreamEnd:
        lines = [line for line in (self._before + self._held).split(b"\n") if line and not line.isspace()][-4:]
        if not any(line.startswith(_SSE_ENDS) for line in lines):
            return _IMPROPER
        if not self._fresh and lines[-1].rstrip() != _DONE:
            return _IMPROPER  # an event counts when it is whole
        if not any(line.startswith(_SSE_ERRORS) for line in lines):
            return StreamEnd(proper=True, error=None)
        message = _MESSAGE.search(b"\n".join(lines))
        return StreamEnd(proper=True, error=go_string(message[1])[:TEXT_MAX_CHARS] if message else "the node told an error")


def _done_or_error(key: str) -> str | None:
    return key if key in ("done", "error") else None


def _scan(scanner: Scanner, data: bytes) -> None:
    for at in range(0, len(data), TAIL_BYTES):
        scanner.feed(data[at : at + TAIL_BYTES])


def _end_by_scanner(scanner: Scanner) -> StreamEnd:
    if scanner.problem is not None:
        return _IMPROPER
    values = {member.name: member.raw or b"" for member in scanner.members}
    error = _error_value(values["error"]) if "error" in values else None
    return StreamEnd(proper=values.get("done") == b"true" or error is not None, error=error)


def _error_value(raw: bytes) -> str:
    return (go_string(raw) if raw[:1] == b'"' else raw.decode("utf-8", "replace"))[:TEXT_MAX_CHARS]


# ---------------------------------------------------------------- whole answers


class WholeFault(Fact, frozen=True):
    """Why a whole answer with status 200 is none."""

    failure: Failure
    text: str
    repeat_guard: bool = False


def whole_fault(route: Route, body: bytes) -> WholeFault | None:
    """What is wrong with a whole answer of status 200; None: nothing that it says itself."""
    if not body:
        return WholeFault(Failure.EMPTY, "the node's answer has no body")
    shape = ANSWERS.get(route)
    if shape is None or not shape.suspect(body):
        return None
    try:
        answer = msgspec.json.decode(body, type=shape)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if answer.blank:
        return WholeFault(Failure.BLANK, "the node made its answer of nothing: its model ended without a token")
    if not answer.unfinished:
        return None
    said = [text for text in answer.texts if isinstance(text, str) and text]
    guard = bool(said) and ends_in_repeats(said[-1])
    return WholeFault(Failure.INCOMPLETE, "the node's answer says itself that it is not done", repeat_guard=guard)


def judge_whole(route: Route, body: bytes) -> tuple[WholeFault | None, Usage | None]:
    """`whole_fault` and `usage_of` of a whole answer of status 200, with one look at it where it is of the commonest kind."""
    if route.protocol is _NATIVE and len(body) <= TAIL_BYTES and body[:1] == b"{" and body.find(b"\n", 0, -1) < 0:
        try:
            found = decode_whole(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            pass
        else:
            if found.done is not False and found.created_at != NO_TIME:
                return None, found.usage()
    return whole_fault(route, body), usage_of(body[-TAIL_BYTES:], route.protocol)


def ends_in_repeats(text: str) -> bool:
    """Whether `text` ends as the repeat guard ends one: in thirty equal tokens (white space around them aside), or thirty blank ones."""
    if len(text) - len(text.rstrip()) >= REPEATS:
        return True
    packed = "".join(text[-4 * REPEATS * REPEAT_MAX_CHARS :].split())
    return any(packed.endswith(packed[-size:] * REPEATS) for size in range(1, min(REPEAT_MAX_CHARS, len(packed) // REPEATS) + 1))
