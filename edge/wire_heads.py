"""HTTP/1.1 heads and chunked request bodies, without any I/O.

Decides which bytes are a request and which are not; must never know sockets, time or routes.

Request heads are read with two regular expressions instead of llhttp: the same speed (3.2 µs for seven headers either way), but the
grammar is strict by construction, nothing is read past the end of the head (pipelining), and there is no callback per header.
Invariants: whatever h11 refuses is refused here (tests hold the two together), and so are bare LF, folded headers, NUL, a list of
lengths, and a length together with a transfer coding. After a refusal the connection can only be closed.
"""

import re
from typing import Final, Literal
from urllib.parse import unquote_to_bytes

HEAD_MAX_BYTES: Final = 64 << 10
"""Largest request or response head, start line included (nginx and Go: 32 KiB and 1 MiB)."""

CHUNK_LINE_MAX_BYTES: Final = 4 << 10
TRAILERS_MAX_BYTES: Final = 16 << 10

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_START: Final = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/1\.([01])\r\n")
_ANY_START: Final = re.compile(_TOKEN + rb" [\x21-\x7e]+ HTTP/[0-9]\.[0-9]\r\n")
_FIELD: Final = re.compile(rb"(?<=\n)(" + _TOKEN + rb"):[ \t]*([\t\x20-\x7e\x80-\xff]*)\r\n")
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_HOST: Final = re.compile(rb"[!#$%&'()*+,\-.:;=\[\]_~0-9A-Za-z]*")
_BAD_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t\x20-\x7e\x80-\xff]*)?[ \t]*\r\n")
_AUTHORITY: Final = re.compile(rb"[A-Za-z][A-Za-z0-9+.\-]*://([^/?]*)")


class HttpError(Exception):
    """The client did something wrong: answer with `status` and `text`, then close."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class RequestHead:
    """One request's head. `headers` as sent, in order; `fields` by lower-case name, repeated ones joined with a comma.

    `path` is percent-decoded and has no query ("" for `CONNECT`); bytes that are not UTF-8 stand as surrogates.
    """

    __slots__ = (
        "chunked",
        "content_length",
        "expect_continue",
        "fields",
        "headers",
        "keep_alive",
        "method",
        "path",
        "query",
        "target",
        "version",
    )  # fmt: skip

    def __init__(self, method: str, target: bytes, version: str, headers: list[tuple[bytes, bytes]], fields: dict[bytes, bytes]) -> None:
        self.method = method
        self.target = target
        self.path = ""
        self.query = b""
        self.version = version
        self.headers = headers
        self.fields = fields
        self.keep_alive = version == "1.1"
        self.content_length: int | None = None
        self.chunked = False
        self.expect_continue = False

    @property
    def has_body(self) -> bool:
        """Whether body bytes follow."""
        return self.chunked or bool(self.content_length)


Framing = Literal["length", "chunked", "close", "none"]


class ResponseHead:
    """One answer's head. `framing` says how its body ends; "none": there is no body (HEAD, 204, 304)."""

    __slots__ = ("content_length", "fields", "framing", "headers", "reason", "status")

    def __init__(
        self,
        status: int,
        reason: bytes,
        headers: list[tuple[bytes, bytes]],
        fields: dict[bytes, bytes],
        framing: Framing,
        content_length: int | None = None,
    ) -> None:
        self.status = status
        self.reason = reason
        self.headers = headers
        self.fields = fields
        self.framing = framing
        self.content_length = content_length


def fold_fields(headers: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """`headers` by lower-case name; repeated ones are joined with a comma, as RFC 9110 lets one."""
    fields: dict[bytes, bytes] = {}
    for name, value in headers:
        key = name.lower()
        fields[key] = fields[key] + b", " + value if key in fields else value
    return fields


def parse_request_head(data: bytes) -> RequestHead:
    """`data` is a head whole, the blank line included. Raises HttpError 400, 501 or 505."""
    start = _START.match(data)
    if start is None:
        raise _bad_start(data)
    headers: list[tuple[bytes, bytes]] = _FIELD.findall(data)
    # Each match is one whole line, so equal counts mean that every line is a good field.
    if len(headers) != data.count(b"\n") - 2:
        raise HttpError(400, "a header line of the request is malformed")
    if b" \r\n" in data or b"\t\r\n" in data:
        headers = [(name, value.rstrip(b" \t")) for name, value in headers]
    fields = {name.lower(): value for name, value in headers}
    method, target, minor = start.groups()
    if len(fields) != len(headers):
        fields = _fold_repeated(headers)
    head = RequestHead(method.decode("ascii"), target, "1.1" if minor == b"1" else "1.0", headers, fields)
    _read_target(head)
    _read_framing(head)
    return head


def _bad_start(data: bytes) -> HttpError:
    if _ANY_START.match(data):
        return HttpError(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    return HttpError(400, "this is not an HTTP request")


def refuse_early(data: bytes) -> None:
    """`data` is the beginning of a head. Raises HttpError as soon as it cannot become one, so that nobody waits for the rest."""
    if data[0] < 0x21 or data[0] > 0x7E:
        raise HttpError(400, "this is not an HTTP request")
    if b"\n" in data:
        if _START.match(data) is None:
            raise _bad_start(data)
        if b"\n\n" in data or b"\n\r\n" in data:
            raise HttpError(400, "lines of a request end in CR LF")
    if len(data) > HEAD_MAX_BYTES:
        raise too_large()


def too_large() -> HttpError:
    return HttpError(431, f"the request's headers are larger than {HEAD_MAX_BYTES} bytes")


def _fold_repeated(headers: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    lengths = {value for name, value in headers if name.lower() == b"content-length"}
    if len(lengths) > 1:
        raise HttpError(400, "the request has two different Content-Length headers")
    if sum(name.lower() == b"host" for name, _ in headers) > 1:
        raise HttpError(400, "the request has more than one Host header")
    fields = fold_fields(headers)
    for length in lengths:
        fields[b"content-length"] = length
    return fields


def _read_target(head: RequestHead) -> None:
    target = head.target
    if target[0] != 0x2F:  # "/"
        if target == b"*" and head.method == "OPTIONS":
            head.path = "*"
            return
        if head.method == "CONNECT":
            return
        authority = _AUTHORITY.match(target)
        if authority is None:
            raise HttpError(400, "the request's target must begin with a slash")
        target = target[authority.end() :]
        if target[:1] != b"/":
            target = b"/" + target
    raw, _, head.query = target.partition(b"?")
    if b"%" in raw:
        if _BAD_ESCAPE.search(raw):
            raise HttpError(400, "the request's path has a malformed percent escape")
        head.path = unquote_to_bytes(raw).decode("utf-8", "surrogateescape")
    else:
        head.path = raw.decode("ascii")


def _read_framing(head: RequestHead) -> None:
    fields = head.fields
    host = fields.get(b"host")
    if host is None:
        if head.version == "1.1":
            raise HttpError(400, "missing required Host header")
    elif _HOST.fullmatch(host) is None:
        raise HttpError(400, "malformed Host header")
    length = fields.get(b"content-length")
    coding = fields.get(b"transfer-encoding")
    if coding is not None:
        if length is not None:
            raise HttpError(400, "the request has both Content-Length and Transfer-Encoding")
        if coding.lower() != b"chunked":
            raise HttpError(501, "Unsupported transfer encoding")
        if head.version == "1.0":
            raise HttpError(400, "HTTP/1.0 has no Transfer-Encoding")
        head.chunked = True
    elif length is not None:
        if _LENGTH.fullmatch(length) is None:
            raise HttpError(400, "the request's Content-Length is not a number")
        head.content_length = int(length)
    connection = fields.get(b"connection")
    if connection is not None and b"close" in connection.lower():
        head.keep_alive = False
    expect = fields.get(b"expect")
    if expect is not None and head.version == "1.1" and expect.lower() == b"100-continue":
        head.expect_continue = head.has_body


class ChunkDecoder:
    """A chunked request body, fed in any pieces. Strict: CR LF everywhere; trailers are checked and dropped.

    After `done`, `rest` holds the bytes that followed the body.
    """

    __slots__ = ("_held", "_in_trailers", "_left", "_trailer_bytes", "done", "rest")

    def __init__(self) -> None:
        self.done = False
        self.rest = b""
        self._held = b""  # an unfinished chunk line or trailer line
        self._left = 0  # bytes of the current chunk still to come, its CR LF included
        self._in_trailers = False
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> bytes:
        """The body bytes in `data`, joined. Raises HttpError 400."""
        if self._held:
            data = self._held + data
            self._held = b""
        out: list[bytes] = []
        at, size = 0, len(data)
        while at < size and not self.done:
            if self._left:
                at = self._take_chunk(data, at, out)
                continue
            end = data.find(b"\n", at) + 1
            if end == 0:
                if size - at > CHUNK_LINE_MAX_BYTES:
                    raise HttpError(400, "a chunk line is too long")
                self._held = data[at:]
                break
            self._take_line(data[at:end])
            at = end
        if self.done:
            self.rest = data[at:]
        return b"".join(out)

    def _take_chunk(self, data: bytes, at: int, out: list[bytes]) -> int:
        body_left = self._left - 2
        end = min(at + self._left, len(data))
        if body_left > 0:
            body = data[at : at + body_left]
            out.append(body)
            at += len(body)
            self._left -= len(body)
        crlf = data[at:end]
        if crlf != b"\r\n"[2 - self._left : 2 - self._left + len(crlf)]:
            raise HttpError(400, "malformed chunked encoding")
        self._left -= len(crlf)
        return at + len(crlf)

    def _take_line(self, line: bytes) -> None:
        if not line.endswith(b"\r\n"):
            raise HttpError(400, "chunked line ends with bare LF")
        if not self._in_trailers:
            match = _CHUNK_LINE.fullmatch(line)
            if match is None or len(line) > CHUNK_LINE_MAX_BYTES:
                too_many = len(line) > 18 and line[:17].isalnum()
                raise HttpError(400, "http chunk length too large" if too_many else "invalid byte in chunk length")
            length = int(match[1], 16)
            if length:
                self._left = length + 2
            else:
                self._in_trailers = True
        elif line == b"\r\n":
            self.done = True
        else:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > TRAILERS_MAX_BYTES or _FIELD.fullmatch(b"\n" + line, 1) is None:
                raise HttpError(400, "malformed trailer")
