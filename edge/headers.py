"""Headers on the way through: what passes, what does not, what is added; and the router's own answers.

Decides by name only; must never know routes, nodes or bodies. Invariants: hop-by-hop headers never pass, nor any that a client's
`Connection` names; nothing of a client's identity (credentials, cookies, origin) reaches a node; everything else passes byte for byte
and in order; no value that we add can break a line.
"""

import functools
from collections.abc import Sequence
from typing import Final
from urllib.parse import quote

import msgspec

from core.events import Protocol, Upstream
from edge.wire_heads import Framing, Header, RequestHead, ResponseHead

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
_NOT_FOR_CLIENTS: Final = (b"x-ollama-router-", b"access-control-")
"""CORS ends here: what a node says of it would be said twice, or to the wrong page."""
_FRAMING: Final = (b"content-length", b"transfer-encoding")

_REASONS: Final = {
    100: "Continue", 200: "OK", 201: "Created", 202: "Accepted", 204: "No Content", 301: "Moved Permanently",
    307: "Temporary Redirect", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    408: "Request Timeout", 409: "Conflict", 413: "Request Entity Too Large", 415: "Unsupported Media Type", 417: "Expectation Failed",
    422: "Unprocessable Entity",
    429: "Too Many Requests", 431: "Request Header Fields Too Large", 499: "Client Closed Request", 500: "Internal Server Error",
    501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout", 505: "HTTP Version Not Supported",
    507: "Insufficient Storage",
}  # fmt: skip

_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 529: "overloaded_error",
}  # fmt: skip
_OPENAI_TYPES: Final = {400: "invalid_request_error", 404: "not_found_error"}


@functools.lru_cache(maxsize=1024)
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


def _one_line(value: bytes) -> bytes:
    if b"\n" in value or b"\r" in value:
        raise ValueError("a header's value has a line end")
    return value


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
    extra: Sequence[Header] = (),
) -> bytes:
    """The head of a client's request as a node gets it. Bodies are read whole before, so it always has a length.

    A bodyless GET gets none, as clients send it. Raises ValueError for an `extra` value with a line end.
    """
    begin = _kept_beginning(head, upstream) if head.shared else _beginning(head, upstream)
    added = f"{client_host}\r\nX-Request-Id: {request_id}".encode("ascii", "replace")
    if extra:
        added += b"".join([b"\r\n%b: %b" % (name, _one_line(value)) for name, value in extra])
    if not body_length and head.method == "GET":
        return b"%b%b\r\n\r\n" % (begin, added)
    return b"%b%b\r\nContent-Length: %d\r\n\r\n" % (begin, added, body_length)


def _beginning(head: RequestHead, upstream: Upstream) -> bytes:
    """What a node gets of a head whoever sent it, up to the client's place in `X-Forwarded-For`."""
    made = head.block.for_nodes
    if made is None:
        made = head.block.for_nodes = _for_nodes(head)
    passed, forwarded = made
    target, host = _node_target(head, upstream), host_of(upstream)
    return b"%b %b HTTP/1.1\r\nHost: %b%b\r\nX-Forwarded-For: %b" % (head.method.encode("ascii"), target, host, passed, forwarded)


_kept_beginning: Final = functools.lru_cache(maxsize=1024)(_beginning)


def own_request(upstream: Upstream, path: bytes, body: object = None, *, method: bytes = b"POST", extra: Sequence[Header] = ()) -> bytes:
    """A whole request of the router's own to a node, `body` as JSON; None: it has none."""
    data = b"" if body is None else msgspec.json.encode(body)
    target = upstream.base_path.rstrip("/").encode("ascii", "replace") + path
    parts = [method, b" ", target, b" HTTP/1.1\r\nHost: ", host_of(upstream)]
    for name, value in extra:
        parts += (b"\r\n", name, b": ", _one_line(value))
    if body is not None:
        parts.append(b"\r\nContent-Type: application/json\r\nContent-Length: %d" % len(data))
    parts += (b"\r\n\r\n", data)
    return b"".join(parts)


def _for_nodes(head: RequestHead) -> tuple[bytes, bytes]:
    """What of a header block passes to nodes, as lines that begin with a line end; and the beginning of `X-Forwarded-For`."""
    named = _named_by_connection(head.fields)
    lines = []
    for name, value in head.headers:
        key = name.lower()
        if key not in _NOT_FOR_NODES and not key.startswith(_OURS) and key not in named:
            lines.append(b"\r\n%b: %b" % (name, value))
    forwarded = head.fields.get(b"x-forwarded-for")
    return b"".join(lines), forwarded + b", " if forwarded else b""


def _node_target(head: RequestHead, upstream: Upstream) -> bytes:
    target = plain_target(head)
    if upstream.base_path:
        target = upstream.base_path.rstrip("/").encode("ascii", "replace") + target
    return target


def web_request_head(head: RequestHead, *, peer: str, secret: bytes, body: bool = True) -> bytes:
    """The head of a request as the web app gets it: as it came, `Host` and credentials included, plus who sent it.

    The body follows as it was framed, with its length or in chunks; without `body`, none does.
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
    if head.request_id:
        parts.append(b"X-Request-Id: %b\r\n" % head.request_id)
    parts.append(b"X-Router-Peer: %b\r\nX-Router-Secret: %b\r\n" % (safe_value(peer), secret))
    if head.chunked and body:
        parts.append(b"Transfer-Encoding: chunked\r\n")
    elif head.content_length is not None and body:
        parts.append(b"Content-Length: %d\r\n" % head.content_length)
    parts.append(b"\r\n")
    return b"".join(parts)


def response_head(
    head: ResponseHead, *, framing: Framing, length: int | None = None, keep_alive: bool = True, extra: Sequence[Header] = ()
) -> bytes:
    """The head of a node's answer as the client gets it.

    `framing` is how the body will follow: "length" (of `length` bytes, or as the node said), "chunked", "close" (ends with the
    connection, which is then said), "none" (no body; a length that the node told, as for HEAD, passes). `extra` is added; a header of
    the node's with such a name is left out. Raises ValueError for an `extra` value with a line end.
    """
    made = head.for_clients
    if made is None:
        made = head.for_clients = _for_clients(head, frozenset())
    fields = head.fields
    for name, _ in extra:
        if name.lower() in fields:
            made = _for_clients(head, frozenset(name.lower() for name, _ in extra))
            break
    parts = [made[0]]
    if framing == "chunked":
        parts.append(b"\r\nTransfer-Encoding: chunked")
    elif framing == "length":
        parts.append(b"\r\nContent-Length: %d" % ((head.content_length or 0) if length is None else length))
    elif framing == "none" and b"content-length" in fields:
        parts += (b"\r\nContent-Length: ", fields[b"content-length"])
    parts.append(made[1])
    for name, value in extra:
        parts += (b"\r\n", name, b": ", _one_line(value))
    parts.append(b"\r\n\r\n" if keep_alive and framing != "close" else b"\r\nConnection: close\r\n\r\n")
    return b"".join(parts)


def answer_head(head: ResponseHead, *, framing: Framing, length: int | None, keep_alive: bool, request_id: bytes, node: str) -> bytes:
    """`response_head` with the two headers that every node's answer gets: `X-Request-Id` and `X-Ollama-Node`."""
    made = head.for_clients
    if made is None:
        made = head.for_clients = _for_clients(head, frozenset())
    before, after, is_plain = made
    if framing == "none" or not is_plain:
        extra = ((b"X-Request-Id", request_id), (b"X-Ollama-Node", safe_value(node)))
        return response_head(head, framing=framing, length=length, keep_alive=keep_alive, extra=extra)
    framed = b""
    if framing == "length":
        framed = b"\r\nContent-Length: %d" % ((head.content_length or 0) if length is None else length)
    elif framing == "chunked":
        framed = b"\r\nTransfer-Encoding: chunked"
    end = b"\r\n\r\n" if keep_alive and framing != "close" else b"\r\nConnection: close\r\n\r\n"
    return b"%b%b%b\r\nX-Request-Id: %b\r\nX-Ollama-Node: %b%b" % (before, framed, after, request_id, safe_value(node), end)


def _for_clients(head: ResponseHead, replaced: frozenset[bytes]) -> tuple[bytes, bytes, bool]:
    """The status line and the headers before the node's own framing header, and those after it; each line begins with a line end.

    And whether none of them is named as what every node's answer gets.
    """
    dropped = _named_by_connection(head.fields)
    before = [b"HTTP/1.1 %d %b" % (head.status, head.reason)]
    after: list[bytes] = []
    lines = before
    for name, value in head.headers:
        key = name.lower()
        if key in _FRAMING:
            lines = after
        elif key not in _HOP_BY_HOP and key not in dropped and key not in replaced and not key.startswith(_NOT_FOR_CLIENTS):
            lines.append(b"\r\n%b: %b" % (name, value))
    return b"".join(before), b"".join(after), b"x-request-id" not in head.fields and b"x-ollama-node" not in head.fields


def simple_response(
    status: int,
    body: bytes,
    *,
    content_type: str = "application/json; charset=utf-8",
    extra: Sequence[Header] = (),
    keep_alive: bool = True,
    head_only: bool = False,
) -> bytes:
    """A whole answer of our own, with its length. `head_only`: the body is left out, as HEAD wants it."""
    parts = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}".encode("ascii")]
    if content_type:
        parts += (b"\r\nContent-Type: ", content_type.encode("ascii"))
    for name, value in extra:
        parts += (b"\r\n", name, b": ", _one_line(value))
    if status != 204:
        parts.append(b"\r\nContent-Length: %d" % len(body))
    parts.append(b"\r\n\r\n" if keep_alive else b"\r\nConnection: close\r\n\r\n")
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
    extra: Sequence[Header] = (),
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
