"""The agent's own port: the local Ollama, for callers that show the gateway's credential.

Decides who may pass; never which node serves a request. Inference routes (`agent.inference`) are counted, and told truly: a failure
before the first byte is a 502 that says which, a cut after it an error in-band and no last chunk. All other routes pass as they are,
streaming both ways.

Invariants: a request id is in `in_flight` exactly while its request is worked on; nothing but `/healthz` is answered without the
credential, and nothing at all before there is one; a caller that leaves closes the local request at once; an answer of Ollama that
says itself that it failed passes as it came, for the coordinator to judge.
"""

import errno
import hmac
import itertools
import socket
import uuid
from collections.abc import Callable
from typing import Final, cast
from urllib.parse import parse_qs, urlsplit

import msgspec
import structlog
import trio

from agent.config import port_of
from agent.inference import Inference
from agent.log import LINES_MAX, LogTail
from agent.pulls import Pulls, order_from
from agent.quick import GatewayLane
from core.errors import ConfigError
from core.events import Failure, Route, Upstream
from core.messages import EndingReport
from core.units import GIB
from edge.body import Body, BodyBudget, read_body
from edge.denied import Denied
from edge.headers import error_response, request_head, response_head, safe_value, simple_response
from edge.listener import Listener, bind
from edge.model_work import NodeOllama
from edge.pool import DialFailed, Pool
from edge.relay import FAILURE_HEADER
from edge.told import EDGE_KEY, NGINX
from edge.web import WebPass
from edge.wire import ClientConnection, ClientGone, HttpError, RequestHead, ResponseHead, UpstreamConnection, UpstreamCut, Watch

CREDENTIAL_HEADER: Final = b"x-ollama-router-credential"
BODY_MAX_BYTES: Final = 16 * GIB
"""The coordinator has its own, lower limit; this one only keeps the disk from filling up."""

LINES_DEFAULT: Final = 200
RECENT: Final = 0.2
"""Weight of the newest answer in the average response time."""

_UNKNOWN_CALLER: Final = "this is the gateway of an Ollama Router agent: send requests to the router, it alone has the credential"


class Gateway:
    """One gateway in front of one Ollama. `credential` is what callers must show; until it is set none may pass."""

    def __init__(self, ollama_url: str, *, tail: LogTail | None = None) -> None:
        parts = urlsplit(ollama_url)
        self.credential: bytes | None = None
        self.average_response_time_ms: float | None = None
        self.pulls: Pulls | None = None
        """Who does the downloads that the coordinator orders."""
        self.ended: Callable[[EndingReport], None] = lambda _: None
        """Is told how each request that nginx brought ended."""
        self._upstream = Upstream(host=parts.hostname or "", port=port_of(ollama_url), base_path=parts.path)
        self._tail = tail
        self._watch = Watch()
        self._pool = Pool(self._watch)
        self._budget = BodyBudget(max_body_bytes=BODY_MAX_BYTES)
        self._serials = itertools.count()
        self._in_flight: dict[int, str] = {}
        self._sockets: list[socket.socket] = []
        self._log = structlog.get_logger()

    def in_flight(self) -> tuple[str, ...]:
        """The ids of the inference requests inside, oldest first."""
        return tuple(self._in_flight.values())

    def ollama(self) -> NodeOllama:
        """The local Ollama, for work on its models; once the gateway runs."""
        return NodeOllama(self._pool, self._upstream)

    def listen(self, host: str, port: int) -> int:
        """Open the port, 0 for any free one; before `run`. Returns which it is.

        Raises:
            ConfigError: the port cannot be used.
        """
        try:
            self._sockets = bind(host, port)
        except OSError as error:
            why = "another program uses it" if error.errno == errno.EADDRINUSE else error.strerror
            raise ConfigError(f"AGENT_API_PORT: port {port} cannot be opened ({why}); set another one") from None
        return int(self._sockets[0].getsockname()[1])

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        listener = Listener(
            gate=self._gate,
            proxy=self,
            web=cast(WebPass, _Others(self)),  # all that the listener asks of it is `serve`
            watch=self._watch,
            new_id=_new_id,
            report=self.failed,
            quick=lambda conn: GatewayLane(self, conn),
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(self._watch.run)
            await nursery.start(listener.serve, self._sockets)
            task_status.started()

    def allowed(self, head: RequestHead) -> bool:
        """Whether the caller shows the credential. Takes equally long for all wrong ones."""
        shown = head.fields.get(CREDENTIAL_HEADER, b"")
        return self.credential is not None and hmac.compare_digest(shown, self.credential)

    def _gate(self, _: ClientConnection, head: RequestHead) -> Denied | None:
        return None if self.allowed(head) else Denied(status=401, text=_UNKNOWN_CALLER)

    # ------------------------------------------------------------ inference

    async def serve(self, conn: ClientConnection, head: RequestHead, route: Route) -> None:
        """Answer one inference request; called by the listener, behind the gate.

        Raises:
            HttpError: the request itself cannot be read; nothing was sent.
            ClientGone: the caller left.
        """
        one = self.enter(conn, head, route)
        try:
            body = await read_body(conn, head, self._budget)
            try:
                await one.run(body)
            finally:
                body.close()
        except HttpError as error:
            one.refused(error.status, error.text)
            raise
        finally:
            self.leave(one)

    def enter(self, conn: ClientConnection, head: RequestHead, route: Route) -> Inference:
        """A request that is worked on from now on, until `leave`."""
        request_id = _id_of(head)
        one = Inference(self._pool, self._upstream, conn, head, route, request_id, for_nginx=head.fields.get(EDGE_KEY) == NGINX)
        one.serial = next(self._serials)
        self._in_flight[one.serial] = request_id
        return one

    def leave(self, one: Inference) -> None:
        """It is over."""
        del self._in_flight[one.serial]
        if one.success:
            self._took(one.since_ms())
        if one.for_nginx:
            self.ended(one.report())

    def idle_upstream(self) -> UpstreamConnection | None:
        """A kept connection to Ollama that nobody uses; None: there is none."""
        return self._pool.take(self._upstream)

    def hold(self, data: bytes) -> Body | None:
        """`data` as a request's body; None: there is no room for it in memory."""
        budget = self._budget
        if budget.held_bytes + len(data) > budget.memory_bytes:
            return None
        budget.held_bytes += len(data)
        return Body(data, length=len(data), budget=budget)

    def failed(self, error: Exception) -> None:
        """A mistake of ours."""
        self._log.error("a request failed inside the gateway", exc_info=error)

    def _took(self, ms: float) -> None:
        before = self.average_response_time_ms
        self.average_response_time_ms = ms if before is None else before + RECENT * (ms - before)


class _Others:
    """Everything that is not inference; called by the listener in the web app's place."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def serve(self, conn: ClientConnection, head: RequestHead) -> None:
        """Answer one request. Raises HttpError, ClientGone."""
        gateway = self._gateway
        if head.path == "/healthz":
            await self._show(conn, head, 200, {"status": "ok"})
        elif not gateway.allowed(head):
            await conn.send(error_response(401, _UNKNOWN_CALLER, request_id=_new_id(), keep_alive=not conn.must_close))
        elif head.path == "/logs":
            await self._logs(conn, head)
        elif head.path == "/pull" or head.path.startswith("/pull/"):
            await self._order(conn, head)
        else:
            await self._pass(conn, head)

    async def _logs(self, conn: ClientConnection, head: RequestHead) -> None:
        asked = parse_qs(head.query.decode("latin-1")).get("tail", [str(LINES_DEFAULT)])[-1]
        count = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 6 else 0
        if not 1 <= count <= LINES_MAX:
            await self._show(conn, head, 400, {"error": f"tail must be a whole number from 1 to {LINES_MAX}"})
            return
        tail = self._gateway._tail
        await self._show(conn, head, 200, {"lines": tail.last(count) if tail is not None else []})

    async def _order(self, conn: ClientConnection, head: RequestHead) -> None:
        """`POST /pull`: begin a download. `DELETE /pull/<task id>`: stop it."""
        pulls, task_id = self._gateway.pulls, head.path.removeprefix("/pull").strip("/")
        if head.method != ("DELETE" if task_id else "POST"):
            await self._say(conn, head, 405, {"error": "download with POST /pull, stop one with DELETE /pull/<task id>"})
        elif pulls is None:
            await self._say(conn, head, 503, {"error": "the agent is not ready for downloads yet"})
        elif task_id:
            found = pulls.stop(task_id)
            await self._say(conn, head, 202 if found else 404, {"status": "stopping"} if found else {"error": "there is no such task"})
        else:
            body = await read_body(conn, head, self._gateway._budget)
            try:
                order = order_from(body.data or b"")
            except msgspec.MsgspecError:
                await self._say(conn, head, 400, {"error": 'the body must be {"task_id": ..., "model": ...}'})
            else:
                pulls.take(order)
                await self._say(conn, head, 202, {"status": "accepted", "task_id": order.task_id})
            finally:
                body.close()

    async def _show(self, conn: ClientConnection, head: RequestHead, status: int, value: object) -> None:
        if head.method not in ("GET", "HEAD"):
            status, value = 405, {"error": f"{head.path} takes GET only"}
        await self._say(conn, head, status, value, allow=b"GET, HEAD")

    async def _say(self, conn: ClientConnection, head: RequestHead, status: int, value: object, *, allow: bytes = b"POST, DELETE") -> None:
        extra = [(b"X-Request-Id", _new_id().encode())] + ([(b"Allow", allow)] if status == 405 else [])
        head_only = head.method == "HEAD"
        await conn.send(
            simple_response(status, msgspec.json.encode(value), extra=extra, keep_alive=not conn.must_close, head_only=head_only)
        )

    async def _pass(self, conn: ClientConnection, head: RequestHead) -> None:
        """Through to Ollama and back, byte for byte. A chunked body is read whole first, any other streams."""
        gateway = self._gateway
        body = await read_body(conn, head, gateway._budget) if head.chunked else None
        upstream: UpstreamConnection | None = None
        try:
            with trio.CancelScope() as scope:
                upstream = await gateway._pool.dial(gateway._upstream)
                upstream.start(reused=False, no_body=head.method == "HEAD")
                await self._send(conn, head, body, upstream)
                conn.begin(scope)
                await self._pour(conn, head, await upstream.read_head(), upstream)
            if scope.cancelled_caught:
                raise ClientGone("the caller left")
        except (DialFailed, UpstreamCut) as error:
            if conn.answered:
                conn.must_close = True
                return
            failure = Failure.REFUSED if isinstance(error, DialFailed) else Failure.DIED
            extra = ((b"X-Request-Id", _new_id().encode()), (FAILURE_HEADER, failure.value.encode()))
            answer = msgspec.json.encode({"error": f"Ollama did not answer: {error}"})
            await conn.send(simple_response(502, answer, extra=extra, keep_alive=not conn.must_close))
        finally:
            conn.end()
            if upstream is not None:
                gateway._pool.give_back(upstream)
            if body is not None:
                body.close()

    async def _send(self, conn: ClientConnection, head: RequestHead, body: Body | None, upstream: UpstreamConnection) -> None:
        gateway = self._gateway
        length = body.length if body is not None else head.content_length or 0
        request_id = _id_of(head)
        await upstream.send(request_head(head, gateway._upstream, request_id=request_id, body_length=length, client_host=conn.peer_host))
        if body is not None:
            await body.send_to(upstream)
            return
        while not upstream.answer_waiting() and (piece := await conn.read_body_some()):
            await upstream.send(piece)

    async def _pour(self, conn: ClientConnection, head: RequestHead, answer: ResponseHead, upstream: UpstreamConnection) -> None:
        framing = answer.framing
        if framing in ("chunked", "close"):
            framing = "chunked" if head.version == "1.1" else "close"
        if framing == "close":
            conn.must_close = True
        await conn.send(response_head(answer, framing=framing, keep_alive=not conn.must_close))
        while piece := await upstream.read_some():
            await conn.send(b"%x\r\n%b\r\n" % (len(piece), piece) if framing == "chunked" else piece)
        if framing == "chunked":
            await conn.send(b"0\r\n\r\n")


def _id_of(head: RequestHead) -> str:
    """The id that the caller gave this request, else a new one."""
    if head.request_id:
        return head.request_id.decode("ascii")
    text = head.fields.get(b"x-request-id", b"").decode("latin-1")[:200]
    if text.isascii() and text.isprintable():
        return text or _new_id()
    return safe_value(text).decode("ascii") or _new_id()


def _new_id() -> str:
    return str(uuid.uuid4())
