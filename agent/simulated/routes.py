"""Every route of a simulated Ollama that answers at once, and the rules that come before any route.

Decides statuses and bodies. Inference is `inference.py`'s.
"""

import ipaddress
import math
import posixpath
from typing import Final
from urllib.parse import quote, urlsplit

import trio

from agent.simulated import native, openai
from agent.simulated.answers import go_json, go_time
from agent.simulated.engine import Engine
from agent.simulated.library import Library
from agent.simulated.managing import Managing
from agent.simulated.models import Knobs, SimulatedModel
from agent.simulated.names import CLOUD_OFF, parse_name
from agent.simulated.native import JSON_TYPE, Wall
from agent.simulated.reading import Refusal, read_request
from agent.simulated.wire import Header, Reply, Request

TEXT_TYPE: Final = "text/plain; charset=utf-8"
BARE_TEXT_TYPE: Final = "text/plain"
HTML_TYPE: Final = "text/html; charset=utf-8"
FOR_EVER_S: Final = 292 * 365.25 * 86_400
"""Go's longest duration: what never expires is shown to do so in 292 years."""

METHODS: Final[dict[str, tuple[str, ...]]] = {
    "/": ("HEAD", "GET"),
    "/api/version": ("HEAD", "GET"),
    "/api/status": ("GET",),
    "/api/tags": ("HEAD", "GET"),
    "/api/ps": ("GET",),
    "/api/show": ("POST",),
    "/api/generate": ("POST",),
    "/api/chat": ("POST",),
    "/api/embed": ("POST",),
    "/api/embeddings": ("POST",),
    "/api/delete": ("DELETE",),
    "/api/copy": ("POST",),
    "/api/pull": ("POST",),
    "/api/push": ("POST",),
    "/api/create": ("POST",),
    "/api/experimental/web_search": ("POST",),
    "/api/experimental/web_fetch": ("POST",),
    "/api/experimental/model-recommendations": ("GET",),
    "/v1/chat/completions": ("POST",),
    "/v1/completions": ("POST",),
    "/v1/embeddings": ("POST",),
    "/v1/responses": ("POST",),
    "/v1/messages": ("POST",),
    "/v1/audio/transcriptions": ("POST",),
    "/v1/models": ("GET",),
}
"""What is routed, and `Allow`."""
PARENTS: Final[dict[str, tuple[str, ...]]] = {"/v1/models": ("GET",), "/api/blobs": ("HEAD", "POST")}
"""The same, of paths with one name more."""
MANAGED: Final = ("/api/copy", "/api/delete", "/api/pull", "/api/push", "/api/create", "/api/blobs/")

ALLOWED_HEADERS: Final = (
    b"Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,X-Stainless-Arch,X-Stainless-Async,"
    b"X-Stainless-Custom-Poll-Interval,X-Stainless-Helper-Method,X-Stainless-Lang,X-Stainless-Os,X-Stainless-Package-Version,"
    b"X-Stainless-Poll-Helper,X-Stainless-Retry-Count,X-Stainless-Runtime,X-Stainless-Runtime-Version,X-Stainless-Timeout"
)
PREFLIGHT: Final[tuple[Header, ...]] = (
    (b"Access-Control-Allow-Headers", ALLOWED_HEADERS),
    (b"Access-Control-Allow-Methods", b"GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"),
    (b"Access-Control-Max-Age", b"43200"),
    (b"Vary", b"Access-Control-Request-Method"),
    (b"Vary", b"Access-Control-Request-Headers"),
)
LOCAL_ORIGINS: Final = ("localhost", "127.0.0.1", "0.0.0.0")
APP_ORIGINS: Final = ("app://", "file://", "tauri://", "vscode-webview://", "vscode-file://")
LANS: Final = tuple(ipaddress.ip_network(net) for net in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"))
"""What Go calls private."""
LOCAL_SUFFIXES: Final = (".localhost", ".local", ".internal")


def methods_of(path: str) -> tuple[str, ...]:
    """The methods that `path` takes; none for an unknown one."""
    before, _, last = path.rpartition("/")
    if last and before in PARENTS:
        return PARENTS[before]
    return METHODS.get(path, ())


def host_allowed(host: str) -> bool:
    """The guard against DNS rebinding of a server that listens on loopback."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if not name or name == "localhost" or name.endswith(LOCAL_SUFFIXES):
            return True
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified or any(address in lan for lan in LANS if lan.version == address.version)


def origin_allowed(origin: str) -> bool:
    """The origins that Ollama allows by default."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return origin.startswith(APP_ORIGINS) or (parts.scheme in ("http", "https") and parts.hostname in LOCAL_ORIGINS)


class Routes:
    """The routes that need no scheduling."""

    def __init__(self, library: Library, managing: Managing, engine: Engine, knobs: Knobs, wall: Wall) -> None:
        self._library = library
        self._managing = managing
        self._engine = engine
        self._version = knobs.version
        self._check_host = knobs.check_host
        self._wall = wall

    async def gate(self, request: Request, reply: Reply) -> bool:
        """Origin, Host, path and method. True when the request may go on; else it has been answered."""
        allow = methods_of(request.path)
        host = request.fields.get(b"host", b"").decode("latin-1")
        origin = request.fields.get(b"origin", b"").decode("latin-1")
        options: list[Header] = [(b"Allow", ", ".join(allow).encode())] if request.method == "OPTIONS" and allow else []
        if origin and origin not in (f"http://{host}", f"https://{host}"):
            if not origin_allowed(origin):
                await reply.whole(403, b"", "", options)
                return False
            allowed: list[Header] = [(b"Access-Control-Allow-Origin", origin.encode()), (b"Vary", b"Origin")]
            if request.method == "OPTIONS":
                await reply.whole(204, b"", "", [*options, *allowed, *PREFLIGHT])
                return False
            reply.extra = allowed
        if self._check_host and reply.connection.loopback and not host_allowed(host):
            await reply.whole(403, b"", "")
            return False
        if request.method in allow:
            return True
        await self._nowhere(request, reply, allow)
        return False

    async def _nowhere(self, request: Request, reply: Reply, allow: tuple[str, ...]) -> None:
        clean = posixpath.normpath("/" + request.path.lstrip("/"))
        if allow:
            await reply.whole(405, b"405 method not allowed", BARE_TEXT_TYPE, [(b"Allow", ", ".join(allow).encode())])
        elif clean != request.path and methods_of(clean):
            slash_only = request.path == clean + "/"
            status, words = (301, "Moved Permanently") if slash_only and request.method == "GET" else (307, "Temporary Redirect")
            clean = quote(clean)
            body = f'<a href="{clean}">{words}</a>.\n\n'.encode()
            await reply.whole(status, body, HTML_TYPE, [(b"Location", clean.encode())])
        else:
            await reply.whole(404, b"404 page not found", BARE_TEXT_TYPE)

    async def answer(self, request: Request, reply: Reply) -> None:
        """Answer a request that has passed the gate."""
        try:
            match request.path:
                case "/":
                    await reply.whole(200, b"Ollama is running", TEXT_TYPE)
                case "/api/version":
                    await reply.whole(200, go_json({"version": self._version}), JSON_TYPE)
                case "/api/status":
                    await reply.whole(200, b'{"cloud":{"disabled":true,"source":"env"}}', JSON_TYPE)
                case "/api/tags":
                    await reply.whole(200, native.tags(self._library.rows()), JSON_TYPE)
                case "/api/ps":
                    await reply.whole(200, self._ps(), JSON_TYPE)
                case "/api/show":
                    await reply.whole(200, self._show(bytes(request.body)), JSON_TYPE)
                case "/api/experimental/model-recommendations":
                    await reply.whole(200, b'{"recommendations":[]}', JSON_TYPE)
                case "/v1/models":
                    await reply.whole(200, openai.models(self._library.rows()), native.BARE_JSON_TYPE)
                case path if path.startswith(MANAGED):
                    await self._managing.answer(request, reply)
                case path if path.startswith("/v1/models/"):
                    await reply.whole(200, self._v1_model(path.removeprefix("/v1/models/")), native.BARE_JSON_TYPE)
                case _:
                    service = "web search" if request.path.endswith("search") else "web fetch"
                    raise Refusal(403, CLOUD_OFF.replace("remote model", service))
        except Refusal as refusal:
            kind, body = (openai.refused if request.path.startswith("/v1/") else _native_refusal)(refusal)
            await reply.whole(refusal.status, body, kind)

    def _ps(self) -> bytes:
        now = trio.current_time()
        wall_ns = self._wall()
        rows = []
        for row in self._engine.node.loaded(now=now):  # type: ignore[arg-type]
            left_s = FOR_EVER_S if math.isinf(row.expires_at) else row.expires_at - now
            rows.append(
                native.ps_row(
                    self._library.loaded_as(row.model),
                    size_bytes=row.size_bytes,
                    in_memory_bytes=row.in_memory_bytes,
                    context=row.context,
                    expires_at=go_time(wall_ns + round(left_s * 1e9)),
                )
            )
        return go_json({"models": rows})

    def _show(self, body: bytes) -> bytes:
        fields = read_request(body, "ShowRequest")
        spelling = fields.get("model") or fields.get("name") or ""
        if not spelling.strip():
            raise Refusal(400, "model is required")
        parse_name(spelling, service="remote model details are unavailable")
        return native.show(self._known(spelling), verbose=bool(fields.get("verbose")))

    def _known(self, spelling: str) -> SimulatedModel:
        model = self._library.find(spelling)
        if model is None or not self._library.whole(model):
            raise Refusal(404, f"model '{self._library.display(spelling)}' not found")
        return model

    def _v1_model(self, spelling: str) -> bytes:
        return go_json(openai.model_row(self._known(spelling), spelling)) + b"\n"


def _native_refusal(refusal: Refusal) -> tuple[str, bytes]:
    return native.refused(refusal, stream=False)
