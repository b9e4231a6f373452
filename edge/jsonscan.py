"""JSON read as Go's `encoding/json` reads it, a piece at a time: the few top-level members of an object that somebody wants.

Decides what is JSON and where a value ends; must never know what a member means. It builds no values, does not recurse, and keeps only
what was asked for, so that a body of any size and any depth passes through it in steps that the caller chooses.

Invariants: only the first value counts, whatever follows it is not looked at; strings may hold broken UTF-8 and lone surrogates (read as
U+FFFD), never bare control characters; 10,000 levels are fine, one more is an error, as in Go; the result does not depend on how the
bytes were cut into pieces.
"""

import codecs
import json
import re
from collections.abc import Callable, Generator
from typing import Final

import msgspec

DEPTH_MAX: Final = 10_000
"""Go's own limit: the 10,001st level is an error."""

CAPTURE_MAX_BYTES: Final = 64 << 10
"""Longest value whose bytes are kept, and longest number that is read at all."""

BLOB_MIN_BYTES: Final = 4096
"""A string this long, of ASCII without a space or an escape, is no text: an image, a file."""

_JOIN_BELOW_BYTES: Final = (
    8192  # a string that began this shortly before a piece's end is read again with the next; longer keys are nobody's
)

_WS: Final = re.compile(rb"[ \t\r\n]*+")
_STRING: Final = re.compile(rb'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+"')
_PLAIN: Final = re.compile(rb'[^"\\\x00-\x1f]*+')
_ESCAPE: Final = re.compile(rb'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_NUMBER: Final = re.compile(rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?")
_NUMBER_BYTES: Final = re.compile(rb"[-+.0-9eE]*+")
_NUMBERS: Final = re.compile(rb"(?:[ \t\r\n]*+-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?[ \t\r\n]*+,)++")
_LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_LITERALS: Final = {0x74: b"true", 0x66: b"false", 0x6E: b"null"}

# What may come next.
_VALUE: Final = 0
_VALUE_OR_END: Final = 1
_KEY: Final = 2
_KEY_OR_END: Final = 3
_COLON: Final = 4
_COMMA_OR_END: Final = 5

_QUOTE: Final = 0x22
_COMMA: Final = 0x2C
_ARRAY: Final = 0x5B
_OBJECT: Final = 0x7B
_BRACKETS: Final = (_OBJECT, _ARRAY)
_KEYS: Final = (_KEY, _KEY_OR_END)
_MAY_END: Final = (_VALUE_OR_END, _KEY_OR_END, _COMMA_OR_END)
_WHERE: Final = (
    "where a value should be",
    "where a value should be",
    "where a key should be",
    "where a key should be",
    "after a key",
    "after a value",
)


class Member(msgspec.Struct, frozen=True, gc=False):
    """One wanted member of the top-level object, in the order they came; a name may come more than once."""

    name: str
    raw: bytes | None
    """The value as it stands; None when it is longer than `CAPTURE_MAX_BYTES`."""
    first: int
    """The value's first byte, which tells its type."""
    size: int
    """Bytes of the value."""
    blobs: int
    """Strings in it that are no text (`BLOB_MIN_BYTES`), at any depth."""
    blob_bytes: int
    head: bytes = b""
    """How the value begins: its first `CAPTURE_MAX_BYTES`."""
    start: int = -1
    """Where the value begins, counted from the first byte that was fed; -1: not known."""


def go_string(raw: bytes) -> str:
    """A JSON string, quotes included and known to be valid, as Go decodes it: what is no character becomes U+FFFD, byte by byte."""
    if b"\\" not in raw:
        return raw[1:-1].decode("utf-8", "go")
    text: str = json.loads(raw.decode("utf-8", "go"))
    return _LONE_SURROGATE.sub("\ufffd", text)


def fold(name: str) -> str:
    """`name` as Go compares keys, for names of ASCII letters: U+017F is an `s`, the Kelvin sign (by `lower`) a `k`."""
    return name.replace("\u017f", "s").lower()


def _one_byte(error: UnicodeError) -> tuple[str, int]:
    """Go replaces each byte that begins no character by itself; Python would take several at once."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd", error.start + 1


codecs.register_error("go", _one_byte)


class NotJson(Exception):
    """The bytes are no JSON value; the text says why."""


class Scanner:
    """Reads one JSON value from pieces.

    Feed until `done`, or until there is nothing more, then `close`. After that `problem` says what was wrong (None: nothing), `top` is
    the value's first byte, and `members` holds what was wanted if it is an object. `wanted` turns a key into its name, or into None
    when nobody wants it.
    """

    __slots__ = ("_blob_bytes", "_blobs", "_capture", "_captured", "_counting", "_eof", "_first", "_from", "_offset", "_run",
                 "_start", "_wanted", "done", "members", "problem", "top")  # fmt: skip

    def __init__(self, wanted: Callable[[str], str | None]) -> None:
        self.members: list[Member] = []
        self.problem: str | None = None
        self.done = False
        self.top = 0
        self._wanted = wanted
        self._eof = False
        self._offset = 0  # of the current buffer's first byte in the whole
        self._counting = False  # within the value of a wanted member
        self._start = self._from = self._first = 0
        self._capture: list[bytes] = []
        self._captured = 0
        self._blobs = self._blob_bytes = 0
        self._run = self._scan()
        next(self._run)

    def feed(self, piece: bytes) -> None:
        """Read on. After `done` nothing is looked at any more."""
        if piece and not self.done:
            self._send(piece)

    def close(self) -> None:
        """There are no more bytes."""
        self.feed(b" ")  # ends a number
        if not self.done:
            self._eof = True
            self._send(b"")

    def _send(self, piece: bytes) -> None:
        try:
            self._run.send(piece)
        except StopIteration:
            self.done = True
        except NotJson as error:
            self.done = True
            self.problem = str(error)

    def _refill(self, buffer: bytes, at: int) -> Generator[None, bytes, bytes]:
        """The buffer from `at` on, with the next piece behind it."""
        if self._counting:
            self._keep(buffer, at)
            self._from = 0
        self._offset += at
        piece = yield
        if self._eof:
            raise NotJson("unexpected end of JSON input")
        return buffer[at:] + piece

    # ------------------------------------------------------------ the grammar

    def _scan(self) -> Generator[None, bytes, None]:
        """All of it, as one loop with a stack of brackets."""
        buffer, at, state = b"", 0, _VALUE
        stack = bytearray()
        name: str | None = None
        while True:
            at = _WS.match(buffer, at).end()  # type: ignore[union-attr]  # it always matches
            if at == len(buffer):
                buffer, at = (yield from self._refill(buffer, at)), 0
                continue
            byte = buffer[at]
            if state <= _VALUE_OR_END and not (byte == 0x5D and state == _VALUE_OR_END):
                if len(stack) < 2:
                    if not stack:
                        self.top = byte
                    elif name is not None:
                        self._begin(byte, at)
                if byte in _BRACKETS:
                    if len(stack) == DEPTH_MAX:
                        raise NotJson("JSON nested deeper than 10000 levels")
                    stack.append(byte)
                    at += 1
                    state = _KEY_OR_END if byte == _OBJECT else _VALUE_OR_END
                    continue
                if byte == _QUOTE:
                    buffer, at, _ = yield from self._string(buffer, at)
                elif stack and stack[-1] == _ARRAY and (match := _NUMBERS.match(buffer, at)) is not None:
                    at = match.end()
                    state = _VALUE
                    continue
                else:
                    buffer, at = yield from self._plain_scalar(buffer, at, byte)
                state = _COMMA_OR_END
            elif state == _COMMA_OR_END and byte == _COMMA:
                state = _KEY if stack[-1] == _OBJECT else _VALUE
                at += 1
                continue
            elif state == _COLON and byte == 0x3A:
                state = _VALUE
                at += 1
                continue
            elif byte == _QUOTE and state in _KEYS:
                buffer, at, key = yield from self._string(buffer, at)
                if len(stack) == 1:
                    name = self._wanted(go_string(key)) if key is not None and len(key) <= _JOIN_BELOW_BYTES else None
                state = _COLON
                continue
            elif state in _MAY_END and stack and byte == stack[-1] + 2:  # ] is [ + 2, } is { + 2
                del stack[-1]
                at += 1
                state = _COMMA_OR_END
            else:
                raise NotJson(f"unexpected {chr(byte)!r} {_WHERE[state]}")
            if not stack:
                return
            if name is not None and len(stack) == 1:
                self._end(name, buffer, at)
                name = None

    def _string(self, buffer: bytes, at: int) -> Generator[None, bytes, tuple[bytes, int, bytes | None]]:
        """Past the string that begins at `at`, and the string itself unless it is long."""
        match = _STRING.match(buffer, at)
        while match is None and len(buffer) - at < _JOIN_BELOW_BYTES:
            buffer, at = (yield from self._refill(buffer, at)), 0
            match = _STRING.match(buffer, at)
        if match is None:
            buffer, at = yield from self._long_string(buffer, at)
            return buffer, at, None
        string = match[0]
        if self._counting and is_blob(string):
            self._blobs += 1
            self._blob_bytes += len(string)
        return buffer, match.end(), string

    def _long_string(self, buffer: bytes, at: int) -> Generator[None, bytes, tuple[bytes, int]]:
        begin = self._offset + at
        at += 1
        blob = self._counting
        while True:
            end = _PLAIN.match(buffer, at).end()  # type: ignore[union-attr]  # it always matches
            blob = blob and _blobby(buffer[at:end])
            at = end
            if at == len(buffer):
                buffer, at = (yield from self._refill(buffer, at)), 0
            elif buffer[at] == _QUOTE:
                at += 1
                break
            elif (match := _ESCAPE.match(buffer, at)) is not None:
                at = match.end()
                blob = False
            elif buffer[at] == 0x5C and len(buffer) - at < 6:
                buffer, at = (yield from self._refill(buffer, at)), 0
            else:
                raise NotJson(f"unexpected {chr(buffer[at])!r} in a string")
        if blob:
            self._blobs += 1
            self._blob_bytes += self._offset + at - begin
        return buffer, at

    def _plain_scalar(self, buffer: bytes, at: int, byte: int) -> Generator[None, bytes, tuple[bytes, int]]:
        """Past the number or literal that begins at `at`."""
        literal = _LITERALS.get(byte)
        if literal is not None:
            while not buffer.startswith(literal, at):
                if not literal.startswith(buffer[at : at + 5]):
                    raise NotJson(f"unexpected {chr(byte)!r} where a value should be")
                buffer, at = (yield from self._refill(buffer, at)), 0
            return buffer, at + len(literal)
        while True:
            end = _NUMBER_BYTES.match(buffer, at).end()  # type: ignore[union-attr]  # it always matches
            if end < len(buffer):
                break
            if end - at > CAPTURE_MAX_BYTES:
                raise NotJson(f"a number of more than {CAPTURE_MAX_BYTES} bytes")
            buffer, at = (yield from self._refill(buffer, at)), 0
        number = _NUMBER.match(buffer, at, end)
        if number is None:
            raise NotJson(f"unexpected {chr(byte)!r} where a value should be")
        return buffer, number.end()  # what follows it of such bytes is no part of a value, and nobody's at the top

    # ------------------------------------------------------------ members

    def _begin(self, first: int, at: int) -> None:
        """The value of a wanted member begins."""
        self._counting = True
        self._first = first
        self._start = self._offset + at
        self._from = at
        self._capture.clear()
        self._captured = self._blobs = self._blob_bytes = 0

    def _keep(self, buffer: bytes, until: int) -> None:
        room = CAPTURE_MAX_BYTES - self._captured
        if room > 0:
            self._capture.append(buffer[self._from : min(until, self._from + room)])
        self._captured += until - self._from

    def _end(self, name: str, buffer: bytes, at: int) -> None:
        self._keep(buffer, at)
        self._counting = False
        size = self._offset + at - self._start
        head = b"".join(self._capture)
        raw = head if size <= CAPTURE_MAX_BYTES else None
        self.members.append(Member(name, raw, self._first, size, self._blobs, self._blob_bytes, head, self._start))


def is_blob(string: bytes) -> bool:
    """Whether a JSON string is no text: an image, a file."""
    return len(string) >= BLOB_MIN_BYTES and b"\\" not in string and _blobby(string)


def _blobby(piece: bytes) -> bool:
    return b" " not in piece and piece.isascii()


def is_empty(raw: bytes) -> bool:
    """Whether a value is `""`, `[]` or `{}`."""
    return raw == b'""' if raw[0] == _QUOTE else raw[0] in b"[{" and not raw[1:-1].strip(b" \t\r\n")
