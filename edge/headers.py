"""Headers on the way through: what passes, what does not, what is added; and the router's own answers.

Decides by name only; must never know routes, nodes or bodies. Invariants: hop-by-hop headers never pass, nor any that a client's
`Connection` names; nothing of a client's identity (credentials, cookies, origin) reaches a node; everything else passes byte for byte
and in order; no value that we add can break a line.
"""

import functools
from collections.abc import Iterable
from typing import Final
from urllib.parse import quote

import msgspec

from core.events import Protocol, Upstream
from edge.wire_heads import Framing, RequestHead, ResponseHead

Header = tuple[bytes, bytes]

_HOP_BY_HOP: Final = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    )
)
_OURS: Final = (b"x-router-", b"x-ollama-router-", b"x-explain")
_NOT_FOR_NODES: Final = _HOP_BY_HOP | {
    b"authorization",
    b"content-length",
    b"cookie",
    b"expect",
    b"host",
    b"origin",
    b"referer",
    b"x-api-key",
    b"x-forwarded-for",
    b"x-request-id",
}
_NOT_FOR_WEB: Final = _HOP_BY_HOP | {b"content-length", b"expect"}
_FOR_WEB_FROM_CLIENT: Final = frozenset((b"x-router-history",))
_NOT_FOR_CLIENTS: Final = _HOP_BY_HOP | {b"content-length"}

_REASONS: Final = {
    100: "Continue", 200: "OK", 201: "Created", 202: "Accepted", 204: "No Content", 301: "Moved Permanently",
    307: "Temporary Redirect", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    408: "Request Timeout", 409: "Conflict", 413: "Request Entity Too Large", 415: "Unsupported Media Type", 422: "Unprocessable Entity",
    429: "Too Many Requests", 431: "Request Header Fields Too Large", 499: "Client Closed Request", 500: "Internal Server Error",
    501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout", 505: "HTTP Version Not Supported",
    507: "Insufficient Storage",
}  # fmt: skip

_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 529: "overloaded_error",
}  # fmt: skip
_OPENAI_TYPES: Final = {400: "invalid_request_error", 404: "not_found_error"}


def safe_value(text: str) -> bytes:
    """`text` as a header value: what is not printable ASCII becomes `?`."""
    return bytes(code if 0x20 <= code <= 0x7E else 0x3F for code in map(ord, text)).strip()


@functools.lru_cache(maxsize=1024)
def host_of(upstream: Upstream) -> bytes:
    """The `Host` an upstream is called by."""
    if upstream.host.startswith("unix:"):
        return b"localhost"
    host = f"[{upstream.host}]" if ":" in upstream.host else upstream.host
    return f"{host}:{upstream.port}".encode("ascii", "replace")


def plain_target(head: RequestHead) -> bytes:
    """The request target in its one plain spelling: the decoded path, escaped only where it must be, and the query as sent."""
    target = head.target
    if target[:1] == b"/" and b"%" not in target:
        return target
    path = quote(head.path.encode("utf-8", "surrogateescape"), safe="/:@!$&'()*+,;=~-._").encode("ascii")
    return path + b"?" + head.query if head.query else path


def _add(parts: list[bytes], extra: Iterable[Header]) -> None:
    for name, value in extra:
        if b"\n" in value or b"\r" in value:
            raise ValueError(f"a value of {name!r} would break the line")
        parts.append(b"%b: %b\r\n" % (name, value))


def _named_by_connection(fields: dict[bytes, bytes]) -> frozenset[bytes]:
    """Headers that `Connection` makes hop-by-hop."""
    connection = fields.get(b"connection")
    if connection is None or connection in (b"keep-alive", b"close", b"Keep-Alive"):
        return frozenset()
    return frozenset(name.strip().lower() for name in connection.split(b","))


def request_head(
    head: RequestHead,
    upstream: Upstream,
    *,
    request_id: str,
    body_length: int,
    client_host: str,
    extra: Iterable[Header] = (),
) -> bytes:
    """The head of a client's request as a node gets it. Bodies are read whole before, so it always has a length.

    A bodyless GET gets none, as clients send it.
    """
    named = _named_by_connection(head.fields)
    target = plain_target(head)
    if upstream.base_path:
        target = upstream.base_path.rstrip("/").encode("ascii", "replace") + target
    parts = [b"%b %b HTTP/1.1\r\nHost: %b\r\n" % (head.method.encode("ascii"), target, host_of(upstream))]
    for name, value in head.headers:
        key = name.lower()
        if key not in _NOT_FOR_NODES and not key.startswith(_OURS) and key not in named:
            parts.append(b"%b: %b\r\n" % (name, value))
    forwarded = head.fields.get(b"x-forwarded-for")
    client = client_host.encode("ascii", "replace")
    if forwarded:
        client = forwarded + b", " + client if client else forwarded
    if client:
        parts.append(b"X-Forwarded-For: %b\r\n" % client)
    parts.append(b"X-Request-Id: %b\r\n" % request_id.encode("ascii"))
    _add(parts, extra)
    if body_length or head.method != "GET":
        parts.append(b"Content-Length: %d\r\n" % body_length)
    parts.append(b"\r\n")
    return b"".join(parts)


def web_request_head(head: RequestHead, *, peer: str, secret: bytes) -> bytes:
    """The head of a request as the web app gets it: as it came, `Host` and credentials included, plus who sent it.

    The body follows as it was framed: with its length, or in chunks.
    """
    named = _named_by_connection(head.fields)
    parts = [b"%b %b HTTP/1.1\r\n" % (head.method.encode("ascii"), plain_target(head))]
    if b"host" not in head.fields:
        parts.append(b"Host: localhost\r\n")
    for name, value in head.headers:
        key = name.lower()
        if key in _NOT_FOR_WEB or key in named or (key.startswith(_OURS[:2]) and key not in _FOR_WEB_FROM_CLIENT):
            continue
        parts.append(b"%b: %b\r\n" % (name, value))
    parts.append(b"X-Router-Peer: %b\r\nX-Router-Secret: %b\r\n" % (safe_value(peer), secret))
    if head.chunked:
        parts.append(b"Transfer-Encoding: chunked\r\n")
    elif head.content_length is not None:
        parts.append(b"Content-Length: %d\r\n" % head.content_length)
    parts.append(b"\r\n")
    return b"".join(parts)


def response_head(
    head: ResponseHead, *, framing: Framing, length: int | None = None, keep_alive: bool = True, extra: Iterable[Header] = ()
) -> bytes:
    """The head of a node's answer as the client gets it.

    `framing` is how the body will follow: "length" (of `length` bytes, or as the node said), "chunked", "close" (ends with the
    connection, which is then said), "none" (no body; a length that the node told, as for HEAD, passes). `extra` replaces the node's
    headers of the same names.
    """
    extra = tuple(extra)
    dropped = _named_by_connection(head.fields).union(name.lower() for name, _ in extra)
    if length is None:
        length = head.content_length
    if framing == "none":
        told = head.fields.get(b"content-length")
        frame = b"Content-Length: %b\r\n" % told if told is not None else b""
    elif framing == "length":
        frame = b"Content-Length: %d\r\n" % (length or 0)
    else:
        frame = b"Transfer-Encoding: chunked\r\n" if framing == "chunked" else b""
    parts = [b"HTTP/1.1 %d %b\r\n" % (head.status, head.reason)]
    for name, value in head.headers:
        key = name.lower()
        if key in _NOT_FOR_CLIENTS or key in dropped or key.startswith(_OURS[1]):
            if key in (b"content-length", b"transfer-encoding") and frame:
                parts.append(frame)
                frame = b""
            continue
        parts.append(b"%b: %b\r\n" % (name, value))
    parts.append(frame)
    _add(parts, extra)
    if not keep_alive or framing == "close":
        parts.append(b"Connection: close\r\n")
    parts.append(b"\r\n")
    return b"".join(parts)


def simple_response(
    status: int,
    body: bytes,
    *,
    content_type: str = "application/json; charset=utf-8",
    extra: Iterable[Header] = (),
    keep_alive: bool = True,
    head_only: bool = False,
) -> bytes:
    """A whole answer of our own, with its length. `head_only`: the body is left out, as HEAD wants it."""
    parts = [b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, "Status").encode("ascii"))]
    if content_type:
        parts.append(b"Content-Type: %b\r\n" % content_type.encode("ascii"))
    _add(parts, extra)
    parts.append(b"Content-Length: %d\r\n" % len(body))
    if not keep_alive:
        parts.append(b"Connection: close\r\n")
    parts.append(b"\r\n")
    if not head_only:
        parts.append(body)
    return b"".join(parts)


def error_body(protocol: Protocol, status: int, text: str, *, request_id: str = "") -> tuple[bytes, str]:
    """An error in the manners of `protocol`: (body, content type)."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    if protocol is Protocol.NATIVE:
        return go_json({"error": text}), "application/json; charset=utf-8"
    if protocol is Protocol.ANTHROPIC:
        error = {"type": _ANTHROPIC_TYPES.get(status, "api_error"), "message": text}
        envelope = {"type": "error", "error": error, "request_id": "req_" + request_id.replace("-", "")[:24].ljust(24, "0")}
    else:
        envelope = {"error": {"message": text, "type": _OPENAI_TYPES.get(status, "api_error"), "param": None, "code": None}}
    return go_json(envelope) + b"\n", "application/json"


def error_response(
    status: int,
    text: str,
    *,
    request_id: str,
    protocol: Protocol = Protocol.NATIVE,
    retry_after_s: int | None = None,
    keep_alive: bool = True,
    extra: Iterable[Header] = (),
) -> bytes:
    """`error_body` as a whole answer, with `X-Request-Id`."""
    body, content_type = error_body(protocol, status, text, request_id=request_id)
    headers = [*extra, (b"X-Request-Id", safe_value(request_id))]
    if retry_after_s is not None:
        headers.append((b"Retry-After", b"%d" % retry_after_s))
    return simple_response(status, body, content_type=content_type, extra=headers, keep_alive=keep_alive)


def go_json(value: object) -> bytes:
    """`value` as Go's encoder writes it: compact, `<`, `>` and `&` escaped."""
    data = msgspec.json.encode(value)
    return data.replace(b"<", b"\\u003c").replace(b">", b"\\u003e").replace(b"&", b"\\u0026")
