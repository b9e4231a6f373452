"""The web app's frame: who calls, what every answer carries, what every error looks like.

Decides the form of errors (contract 1) and which paths have Ollama's manners. Knows no agent and no model.
Invariants: only requests that the listener passed on are served; every answer carries `X-Request-Id`; no traceback and no empty 500
reaches a client; an unexpected exception is logged once, under the request's id.
"""

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar

import msgspec
import structlog
from quart import Response, g, request
from quart.routing import QuartRule
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from core.errors import RemoteError
from core.events import Declined, Effect, Protocol
from core.messages import EndingReport, decode
from core.units import MIB, AgentId
from edge.headers import error_body, go_json
from servers import clock
from servers.access import Access, Area, Caller, folded
from servers.driver import Driver
from servers.keeping import Keeping
from servers.memory import Memory
from servers.metrics import Metrics
from servers.moves import Moves
from servers.poller import Poller
from servers.settings import Settings
from servers.tokens import Tokens

BODY_MAX_BYTES: Final = 16 * MIB
"""Of management requests; the largest is a heartbeat with a long list of models."""

BODY_TIMEOUT_S: Final = 30.0

OLLAMA_METHODS: Final = {
    "/": ("HEAD", "GET"),
    "/api/version": ("HEAD", "GET"),
    "/api/tags": ("HEAD", "GET"),
    "/api/ps": ("GET",),
    "/api/status": ("GET",),
    "/v1/models": ("GET",),
    **dict.fromkeys(
        (
            "/api/show", "/api/generate", "/api/chat", "/api/embed", "/api/embeddings", "/v1/chat/completions", "/v1/completions",
            "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/audio/transcriptions", "/api/pull", "/api/push", "/api/create",
            "/api/copy", "/api/me", "/api/signout", "/api/experimental/web_search", "/api/experimental/web_fetch",
        ),
        ("POST",),
    ),
    "/api/delete": ("DELETE",),
    "/api/experimental/model-recommendations": ("GET",),
}  # fmt: skip
"""Ollama's own paths and what each takes, in the order of its `Allow`."""

OLLAMA_PREFIXES: Final = {"/api/blobs/": ("HEAD", "POST"), "/api/user/keys/": ("DELETE",), "/v1/models/": ("GET",)}
"""Its paths that end in a name without a slash."""

OUR_PREFIXES: Final = (
    "/api/agents", "/api/admin/", "/api/requests/", "/api/metrics/", "/api/queue", "/api/health", "/api/placement", "/api/keys",
    "/api/dashboard/",
)  # fmt: skip

Endings = Callable[[AgentId, list[EndingReport]], None]
"""Takes what an agent says about endings at its gateway; what is about no request of that agent's is dropped there."""

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(slots=True)
class Web:
    """What the routes need of the coordinator."""

    settings: Settings
    driver: Driver
    access: Access
    tokens: Tokens
    metrics: Metrics
    poller: Poller
    moves: Moves
    keeping: Keeping
    memory: Memory
    secret: bytes
    """What the listener shows with every request it passes on."""
    listening: Callable[[], bool] = field(default=lambda: True)
    endings: Endings | None = None
    """None: there is no nginx edge, so nothing can be known of what is reported."""


class _Path(QuartRule):
    """A path. What makes URLs of it is compiled when it is asked for, which is never: that is most of what an app costs."""

    def _compile_builder(self, append_unknown: bool = True) -> Callable[..., tuple[str, str]]:
        compiled = super()._compile_builder

        def build(path: "_Path", /, **values: Any) -> tuple[str, str]:
            made: tuple[str, str] = compiled(append_unknown).__get__(path)(**values)
            return made

        return build


def make_app(web: Web) -> QuartTrio:
    """The app without routes; modules of this package add theirs."""
    app = QuartTrio("servers.web", static_folder=None)
    app.url_rule_class = _Path
    app.config["RESPONSE_TIMEOUT"] = None
    app.config["BODY_TIMEOUT"] = BODY_TIMEOUT_S
    app.config["MAX_CONTENT_LENGTH"] = BODY_MAX_BYTES
    app.url_map.merge_slashes = False

    @app.before_request
    async def begin() -> Response | None:
        g.request_id = clock.new_request_id()
        fields = folded(list(request.headers.items()))
        if not hmac.compare_digest(fields.get(b"x-router-secret", b""), web.secret):
            return error(403, "the web app answers the router's own port only")
        host, _, port = fields.get(b"x-router-peer", b"").decode("ascii", "replace").rpartition(":")
        g.caller = web.access.caller(host, int(port) if port.isdigit() else 0, fields)
        return ollama_refusal(request.method, request.path)

    @app.after_request
    async def finish(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        return response

    @app.errorhandler(RemoteError)
    async def refuse(problem: RemoteError) -> Response:
        return error(problem.status, str(problem))

    @app.errorhandler(HTTPException)
    async def http_problem(problem: HTTPException) -> Response:
        return _http_problem(problem)

    @app.errorhandler(Exception)
    async def unexpected(problem: Exception) -> Response:
        structlog.get_logger().error("request failed", request_id=g.request_id, path=request.path[:200], exc_info=problem)
        return error(500, f"the router failed on this request; its log says more under the id {g.request_id}")

    return app


# ---------------------------------------------------------------- who, what


def caller() -> Caller:
    """Who sent the request in work."""
    found: Caller = g.caller
    return found


def guarded(web: Web, area: Area) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Awaitable[T]]]:
    """Decorator of a route: only for callers that may enter `area`."""

    def decorate(handler: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        @wraps(handler)
        async def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            await web.access.check(area, caller())
            return await handler(*args, **kwargs)

        return checked

    return decorate


async def read(kind: type[T]) -> T:
    """The request's body as a `kind`. Raises RemoteError."""
    data = await request.get_data(cache=False)
    assert isinstance(data, bytes)
    return decode(data, kind)


def one(effects: list[Effect]) -> Any:
    """The router's answer to an event about an agent.

    Raises:
        RemoteError: it declined.
    """
    answer = effects[0]
    if isinstance(answer, Declined):
        raise RemoteError(answer.text, status=answer.status)
    return answer


# ---------------------------------------------------------------- answers


def reply(value: Any, status: int = 200) -> Response:
    """`value` (built-ins, structs) as JSON."""
    return Response(msgspec.json.encode(value), status=status, content_type="application/json")


def empty(status: int = 204) -> Response:
    """No body."""
    response = Response(b"", status=status)
    response.headers.pop("Content-Type", None)
    return response


def error(status: int, text: str) -> Response:
    """An error in the manners of the path asked."""
    protocol = Protocol.NATIVE
    if request.path.startswith("/v1/"):
        protocol = Protocol.ANTHROPIC if request.path == "/v1/messages" else Protocol.OPENAI
    body, content_type = error_body(protocol, status, text, request_id=g.request_id)
    response = Response(body, status=status, content_type=content_type)
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    elif status in (429, 503):
        response.headers["Retry-After"] = "1"
    return response


def plain(status: int, text: str, *, allow: tuple[str, ...] = ()) -> Response:
    """Ollama's own plain text."""
    response = Response(text.encode(), status=status, content_type="text/plain")
    if allow:
        response.headers["Allow"] = ", ".join(allow)
    return response


def methods_of(path: str) -> tuple[str, ...] | None:
    """What a path of Ollama's takes; None when it is none."""
    for prefix, methods in OLLAMA_PREFIXES.items():
        if path.startswith(prefix) and path != prefix and "/" not in path[len(prefix) :]:
            return methods
    return OLLAMA_METHODS.get(path)


def ollama_refusal(method: str, path: str) -> Response | None:
    """What Ollama says to a wrong method or a slash too many on a path of its own; None: the path is in order, or not Ollama's."""
    allowed = methods_of(path)
    if allowed is not None:
        if method not in allowed:
            return plain(405, "405 method not allowed", allow=allowed)
        return None
    if path.endswith("/") and methods_of(path[:-1]) is not None:
        return _moved(path[:-1], 301 if method == "GET" else 307)
    return None


def _moved(path: str, status: int) -> Response:
    location = f"{path}?{query}" if (query := request.query_string.decode("ascii", "replace")) else path
    text = "Moved Permanently" if status == 301 else "Temporary Redirect"
    body = f'<a href="{path}">{text}</a>.\n\n' if request.method in ("GET", "HEAD") else ""
    response = Response(body.encode(), status=status, content_type="text/html; charset=utf-8")
    response.headers["Location"] = location
    return response


def _http_problem(problem: HTTPException) -> Response:
    status = problem.code or 500
    ours = request.path.startswith(OUR_PREFIXES)
    if status == 404:
        return error(404, f"there is nothing at {request.path[:200]}") if ours else plain(404, "404 page not found")
    if isinstance(problem, MethodNotAllowed):
        allowed = tuple(sorted(method for method in problem.valid_methods or () if method != "OPTIONS"))
        response = error(405, f"{request.method} is not allowed here: use {' or '.join(allowed)}")
        response.headers["Allow"] = ", ".join(allowed)
        return response
    texts = {
        400: "the request cannot be understood",
        408: f"the request body did not come within {BODY_TIMEOUT_S:g} s",
        413: f"the request body is larger than {BODY_MAX_BYTES} bytes",
    }
    return error(status, texts.get(status, (problem.description or problem.name).rstrip(".")))


def ollama_json(value: Any, *, content_type: str = "application/json; charset=utf-8") -> Response:
    """`value` as Ollama's own JSON."""
    return Response(go_json(value), content_type=content_type)
