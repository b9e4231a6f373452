"""What comes before any route: a prefix of the path, an API key in it, and whether a web page of that origin may call (CORS).

Decides as Ollama does (`gin-contrib/cors` with its default list): no origin, or the router's own, is let alone; a strange one gets a bare
403, whatever it asks; another's preflight is answered here, and its answers carry the headers that let the page read them. Must never
know what a route does, or whether a key is good.

Invariants: what has no `Origin` and no prefix is not touched; a key in the path stands in the place of any other credential; a pattern
with one `*` matches what begins and ends like it, and nothing shorter.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import quote

from edge.headers import simple_response
from edge.wire import RequestHead
from edge.wire_heads import Header, HeaderBlock

KEY_PREFIX: Final = "/k/"
"""What a path begins with that carries an API key, for clients that can send no header: `/k/<key>/api/chat`."""

_HOSTS: Final = ("localhost", "127.0.0.1", "0.0.0.0")
DEFAULT_ORIGINS: Final = (
    *(f"{scheme}://{host}{port}" for host in _HOSTS for scheme in ("http", "https") for port in ("", ":*")),
    "app://*",
    "file://*",
    "tauri://*",
    "vscode-webview://*",
    "vscode-file://*",
)
"""Ollama's own list."""

_METHODS: Final = b"GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
_HEADERS: Final = (
    b"Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,X-Stainless-Arch,X-Stainless-Async,"
    b"X-Stainless-Custom-Poll-Interval,X-Stainless-Helper-Method,X-Stainless-Lang,X-Stainless-Os,X-Stainless-Package-Version,"
    b"X-Stainless-Poll-Helper,X-Stainless-Retry-Count,X-Stainless-Runtime,X-Stainless-Runtime-Version,X-Stainless-Timeout"
)
_PREFLIGHT: Final[tuple[Header, ...]] = (
    (b"Access-Control-Allow-Headers", _HEADERS),
    (b"Access-Control-Allow-Methods", _METHODS),
    (b"Access-Control-Max-Age", b"43200"),
)
_VARY: Final[tuple[Header, ...]] = ((b"Vary", b"Access-Control-Request-Method"), (b"Vary", b"Access-Control-Request-Headers"))
_KEY: Final = re.compile(r"[!-.0-~]+")  # any printable but a slash: it is to stand in a header
_CREDENTIALS: Final = (b"authorization", b"x-api-key")


class Origins:
    """Which web pages may call."""

    def __init__(self, more: Sequence[str] = ()) -> None:
        """`more`: patterns beside Ollama's own list; a lone `*` lets every page call."""
        listed = [origin.lower().encode("utf-8") for origin in (*more, *DEFAULT_ORIGINS)]
        self.any = b"*" in listed
        self._exact = frozenset(origin for origin in listed if b"*" not in origin)
        self._patterns = [origin.partition(b"*")[::2] for origin in listed if b"*" in origin]

    def allow(self, origin: bytes) -> bool:
        """Whether a page of this origin may."""
        folded = origin.lower()
        return (
            self.any
            or folded in self._exact
            or any(
                len(folded) >= len(begin) + len(end) and folded.startswith(begin) and folded.endswith(end) for begin, end in self._patterns
            )
        )


class Front:
    """The rules of one port's front. `methods`: what each of Ollama's paths takes, for `Allow`."""

    def __init__(self, *, origins: Sequence[str] = (), base_path: str = "", methods: Mapping[str, Sequence[str]] | None = None) -> None:
        self._origins = Origins(origins)
        self._base = base_path
        self._methods = methods or {}
        self.prefixes: Final = (KEY_PREFIX, base_path) if base_path else (KEY_PREFIX,)
        """A path that begins with none of these has nothing to strip."""

    def strip(self, head: RequestHead) -> bytes:
        """Take the prefix and the key off the path of `head`, and give the key as the request's credential. Returns what was taken off,
        as it stands in a URL.

        An unclean path is left as it is: it is redirected to the clean one first.
        """
        path = head.path
        if "//" in path or "/." in path:
            return b""
        base, taken = self._base, ""
        if base and (path == base or path.startswith(base + "/")):
            taken, path = base, path[len(base) :] or "/"
        if path.startswith(KEY_PREFIX):
            key, slash, rest = path[len(KEY_PREFIX) :].partition("/")
            if _KEY.fullmatch(key):
                taken, path = f"{taken}{KEY_PREFIX}{key}", slash + rest or "/"
                head.take_headers(_with_key(head.block, key.encode("ascii")))
        if taken:
            head.path = path
            head.target = _quoted(path) + (b"?" + head.query if head.query else b"")
        return _quoted(taken)

    def answer(self, head: RequestHead, request_id: str, *, keep_alive: bool) -> bytes | None:
        """The whole answer to a request whose `Origin` header decides it; None: the request is to be served."""
        if self._own(head):
            return None
        common: list[Header] = [(b"X-Request-Id", request_id.encode("ascii"))]
        allowed = self._methods.get(head.path)
        if head.method == "OPTIONS" and allowed is not None:
            common.append((b"Allow", ", ".join(allowed).encode("ascii")))
        if not self._origins.allow(head.fields[b"origin"]):
            return simple_response(403, b"", content_type="", extra=common, keep_alive=keep_alive)
        if head.method != "OPTIONS":
            return None
        return simple_response(204, b"", content_type="", extra=[*_PREFLIGHT, *self._vary(), *common], keep_alive=keep_alive)

    def stamp(self, head: RequestHead) -> bytes:
        """The header lines that every answer to `head` carries, each after a line end."""
        origin = head.fields[b"origin"]
        if self._own(head) or not self._origins.allow(origin):
            return b""
        if self._origins.any:
            return b"\r\nAccess-Control-Allow-Origin: *"
        return b"\r\nAccess-Control-Allow-Origin: " + origin + b"\r\nVary: Origin"

    def _vary(self) -> tuple[Header, ...]:
        return () if self._origins.any else _VARY

    def _own(self, head: RequestHead) -> bool:
        """Whether the page was loaded from here."""
        origin, host = head.fields[b"origin"], head.fields.get(b"host", b"")
        return not origin or origin in (b"http://" + host, b"https://" + host)


def _quoted(path: str) -> bytes:
    return quote(path.encode("utf-8", "surrogateescape"), safe="/:@!$&'()*+,;=~-._").encode("ascii")


def _with_key(block: HeaderBlock, key: bytes) -> HeaderBlock:
    """`block`, which other requests may share, with this key for the only credential."""
    headers = [header for header in block.headers if header[0].lower() not in _CREDENTIALS]
    fields = {name: value for name, value in block.fields.items() if name not in _CREDENTIALS}
    credential = b"Bearer " + key
    return HeaderBlock([*headers, (b"Authorization", credential)], {**fields, b"authorization": credential})
