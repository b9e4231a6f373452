"""One live request of a client: effect after effect of the router, until the client has its answer.

Decides nothing about nodes: each turn of `run` carries out one effect. Knows no policy, no registry, no history. Invariants: no attempt
begins after a byte of an answer went to the client; a client that leaves closes the node's connection at once; an answer that the node
did not end properly never ends properly for the client.
"""

from collections.abc import Callable
from typing import Final

import trio

from core.events import (
    AttemptEnded,
    Ending,
    Failure,
    FirstByte,
    Forward,
    Lease,
    PassOn,
    Refuse,
    Route,
    Settled,
    Upstream,
    Usage,
    Wait,
)
from core.units import AgentId
from edge.as_sent import as_sent
from edge.body import Body, BodyBudget
from edge.capture import Capture
from edge.desk import Decider, Desk, Explainer
from edge.headers import answer_head, error_body, own_request, request_head, response_head, safe_value, simple_response
from edge.pool import DialFailed, Pool
from edge.relay import Failed, Good, Kept, Poured, give_whole, open_answer, pour
from edge.resume import Resumable, resumable
from edge.splice import Patched
from edge.wire import ClientConnection, ClientGone, RequestHead, ResponseHead, UpstreamConnection, UpstreamCut

STALE_WITHIN_S: Final = 1.0
"""A re-used connection that breaks this soon after a request, without a byte, was closed by the node before it saw the request."""

ONE_SEND_BYTES: Final = 256 << 10
"""Up to this size head and body leave in one send."""

_SUCCESS: Final = Ending.SUCCESS  # members of enumerations cost a Python call each where they are looked up (up to CPython 3.11)
_ERROR: Final = Ending.ERROR

UNLOAD_WITHIN_S: Final = 2.0
"""Ollama answers an unload at once, before it is done."""

CREDENTIAL_HEADER: Final = b"X-Ollama-Router-Credential"


class ProxyOptions:
    """Limits of one proxy; None: no limit. `resume`: streams of plain text may go on from another node."""

    __slots__ = ("answer_hold_bytes", "first_token_timeout_s", "resume", "stall_timeout_s")

    def __init__(
        self,
        *,
        answer_hold_bytes: int,
        first_token_timeout_s: float | None = None,
        stall_timeout_s: float | None = None,
        resume: bool = False,
    ) -> None:
        self.answer_hold_bytes = answer_hold_bytes
        self.first_token_timeout_s = first_token_timeout_s
        self.stall_timeout_s = stall_timeout_s
        self.resume = resume


class Means:
    """What all live requests of one proxy share."""

    __slots__ = ("budget", "clock", "credential_of", "decider", "options", "pool")

    def __init__(
        self,
        *,
        decider: Decider,
        pool: Pool,
        budget: BodyBudget,
        options: ProxyOptions,
        credential_of: Callable[[AgentId], bytes | None],
        clock: Callable[[], float],
    ) -> None:
        self.decider = decider
        self.pool = pool
        self.budget = budget
        self.options = options
        self.credential_of = credential_of
        self.clock = clock


class Live:
    """One request between its coming and its end.

    What ends an attempt from outside (the client leaves, the router cuts, a limit passes) closes the node's connection and says why;
    the task that reads it finds out there. That costs nothing as long as nobody does; a cancel scope costs each request 5 to 9 µs.
    """

    __slots__ = (
        "_begun", "_decoded", "_dialling", "_ended", "_unload", "_why", "agent_id", "body", "capture", "conn", "desk", "explainer", "head",
        "heard_at", "kept", "means", "model", "number", "progress", "request_id", "resumable", "route", "sent", "sent_head", "stream",
        "upstream",
    )  # fmt: skip

    def __init__(
        self,
        means: Means,
        conn: ClientConnection,
        head: RequestHead,
        route: Route,
        body: Body,
        desk: Desk,
        *,
        stream: bool,
    ) -> None:
        self.means = means
        self.conn = conn
        self.head = head
        self.route = route
        self.body = body
        self.stream = stream
        self.desk = desk
        self.request_id = desk.request_id
        self.sent: Body | Patched = body
        """The body that the node gets, and the head, where they are not as they came."""
        self.sent_head = head
        self.model: str | None = None
        """The model to name to the node; None: the one that the body names."""
        self.resumable: Resumable | None = None
        """Keeps what the client got, for another node to go on from; None: no other node can."""
        self.kept: tuple[Kept, str] | None = None
        """The last node's own error answer, and that node's name."""
        self.explainer: Explainer | None = None
        """Set when the client asked why, and may know."""
        self.number = 0
        """Its place in history, where that wants it."""
        self.capture: Capture | None = None
        """Takes what history wants; None: it wants nothing, or nothing yet."""
        self.agent_id: AgentId | None = None
        self.upstream: UpstreamConnection | None = None
        self.progress = 0
        self.heard_at = 0.0
        self._decoded: Body | None = None
        self._dialling: trio.CancelScope | None = None
        self._begun: bytes | None = None
        """What is left to send of an attempt that was begun without a task; None: none was."""
        self._ended: Failure | None = None
        self._why = ""
        self._unload: tuple[str, ...] = ()

    # ------------------------------------------------------------ from outside

    def cancel(self) -> None:
        """The client left (`conn.gone`)."""
        self.end(Failure.VANISHED, "the client left")

    def give_up(self, why: str, unload: tuple[str, ...] = ()) -> None:
        """The router wants no more of this attempt, and the node is to unload these models after it."""
        self._unload = unload
        self.end(Failure.VANISHED, why)

    def end(self, failure: Failure, why: str) -> None:
        """End the running attempt."""
        if self._ended is None:
            self._ended, self._why = failure, why
        if self.upstream is not None:
            self.upstream.abandon(why)
        if self._dialling is not None:
            self._dialling.cancel()

    # ------------------------------------------------------------ effect after effect

    async def run(self) -> Settled:
        """Carry out effect after effect until the client has its answer."""
        try:
            while True:
                effect = self.desk.take_nowait()
                if effect is None or isinstance(effect, Wait):
                    effect = await self._wait()
                match effect:
                    case Forward(lease=lease, unload=unload):
                        self.model = effect.model or self.model
                        if self.model is not None or effect.raise_context is not None or self.resumable is not None:
                            await self._dress(effect.raise_context)
                        settled = await self._attempt(lease, unload)
                        if settled is not None:
                            return settled
                    case PassOn() | Refuse() if self.resumable is not None and self.resumable.broken:
                        return self._settled(await self.resumable.end(None, self.conn, capture=self.capture), 200)
                    case PassOn():
                        return await self._pass_on(effect)
                    case Refuse():
                        return await self._refuse(effect)
                    case Wait():
                        continue
        except ClientGone:
            return self._left()

    async def _dress(self, raise_context: int | None) -> None:
        """Make the request what the next node is to get. Raises HttpError 503."""
        self.close()
        resumable, budget = self.resumable, self.means.budget
        more = resumable.patches() if resumable is not None and resumable.broken else ()
        made = await as_sent(self.route, self.head, self.body, budget, model=self.model, raise_context=raise_context, more=more)
        self.sent_head, self.sent, self._decoded = made.head, made.body, made.decoded

    def close(self) -> None:
        """Give back what was made of the body."""
        decoded, self._decoded = self._decoded, None
        if decoded is not None:
            self.sent = self.body
            decoded.close()

    async def _wait(self) -> Forward | Wait | PassOn | Refuse:
        """The next effect; a client that leaves meanwhile ends the request."""
        with trio.CancelScope() as scope:
            self.conn.begin(scope)
            try:
                return await self.desk.take()
            finally:
                self.conn.end()
        raise ClientGone

    # ------------------------------------------------------------ attempts

    async def _attempt(self, lease: Lease, unload: tuple[str, ...]) -> Settled | None:
        """Try one node. None: another effect is to be carried out."""
        self._about_to_try(lease)
        try:
            if unload:
                await self._make_room(lease, unload)
            limit_s = self.means.options.first_token_timeout_s
            opened = await (self._open_within(lease, limit_s) if limit_s else self._open(lease))
            if self.resumable is not None and self.resumable.broken and isinstance(opened, Good) and opened.judge is None:
                opened = Failed(failure=Failure.GARBLED, text="the node was asked for the rest of a stream, and its answer is none")
            if isinstance(opened, Good) and self._ended is None:
                if self.means.options.resume and self.resumable is None and opened.judge is not None:
                    self.resumable = await resumable(self.route, self.body)
                return await self._answer(opened, lease)
        finally:
            self.desk.end()
            self.conn.end()
            self._let_go()
        if self.conn.gone:
            raise ClientGone
        if self._ended is not None:
            if self._unload:
                unload, self._unload = self._unload, ()
                await self._make_room(lease, unload)
            self._attempt_ended(self._ended, 0, self._why, repeat_guard=False)
        elif isinstance(opened, Failed):
            if opened.kept is not None:
                self.kept = (opened.kept, lease.agent_name)
            self._attempt_ended(opened.failure, opened.status, opened.text, opened.repeat_guard)
        return None

    def _about_to_try(self, lease: Lease) -> None:
        self.agent_id = lease.agent_id
        if self._begun is None:
            self._ended = None
        self.desk.begin(self)
        self.conn.begin(self)

    async def _make_room(self, lease: Lease, models: tuple[str, ...]) -> None:
        """Have the node unload these models. What fails is left to the node: it then makes room as it would have without us."""
        pool = self.means.pool
        extra = self._credential(lease)
        for model in models:
            with trio.move_on_after(UNLOAD_WITHIN_S):
                try:
                    conn = pool.take(lease.upstream) or await pool.dial(lease.upstream)
                except DialFailed:
                    return
                try:
                    await conn.send(own_request(lease.upstream, b"/api/generate", {"model": model, "keep_alive": 0}, extra=extra))
                    await open_answer(conn, route=Route.GENERATE, stream=False, hold_bytes=self.means.options.answer_hold_bytes)
                except UpstreamCut:
                    pass
                finally:
                    pool.give_back(conn)

    async def _answer(self, good: Good, lease: Lease) -> Settled | None:
        """Pour a good answer out. None: its rest is to come from another node."""
        upstream = self.upstream
        assert upstream is not None
        if not good.whole:  # else the settlement, which follows at once, says it all
            self.means.decider.apply(FirstByte(request_id=self.request_id))
        head_bytes = self._head_bytes(good, lease)
        capture = self.capture
        if good.whole:
            if capture is not None:
                capture.take(good.first)
            poured = await give_whole(good, upstream, self.conn, head_bytes=head_bytes, route=self.route)
        elif self.resumable is not None:
            went = await self.resumable.pour(good, upstream, self.conn, head_bytes=head_bytes, capture=capture)
            if not isinstance(went, Poured):
                self._ask_for_the_rest(self.resumable, *went)
                return None
            poured = went
        else:
            on_chunk = None if capture is None else capture.take
            poured = await pour(good, upstream, self.conn, head_bytes=head_bytes, route=self.route, on_chunk=on_chunk)
        return self._settled(poured, good.head.status)

    def _ask_for_the_rest(self, resumable: Resumable, failure: Failure, text: str) -> None:
        """The client has the beginning of an answer: ask the router for a node that goes on."""
        if self.conn.gone:
            raise ClientGone
        failure = self._ended or failure
        self.means.decider.apply(
            AttemptEnded(
                request_id=self.request_id,
                failure=failure,
                status=500 if failure is Failure.ANSWERED else 0,
                text=text[:4096],
                resume=True,
                thinks_unasked=resumable.asked.thinks_unasked,
            )
        )

    def _settled(self, poured: Poured, status: int) -> Settled:
        """What the router is told of an answer that was poured out."""
        failure = poured.node_failure
        resumed = self.resumable is not None and self.resumable.broken and poured.clean
        return Settled(
            request_id=self.request_id,
            ending=_SUCCESS if poured.clean else _ERROR,
            status=status,
            message=self.resumable.note if resumed and self.resumable is not None else poured.error_text,
            node_fault=failure if failure is None or self._ended is None else self._ended,
            usage=poured.usage,
            tokens_before=self.resumable.tokens if resumed and self.resumable is not None else 0,
            body_bytes=poured.body_bytes,
            chunks=poured.chunks,
        )

    def _let_go(self) -> None:
        """Back into the pool, which closes what cannot be used again."""
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            self.means.pool.give_back(upstream)

    async def _open_within(self, lease: Lease, limit_s: float) -> Good | Failed:
        with trio.move_on_after(limit_s):
            return await self._open(lease)
        return Failed(failure=Failure.TIMEOUT, text="the node gave no token within the configured limit")

    async def _open(self, lease: Lease) -> Good | Failed:
        """Send the request to the node and read the beginning of its answer. `upstream` is the connection."""
        try:
            begun, self._begun = self._begun, None
            if begun is not None:
                assert self.upstream is not None, "begun with nobody"
                upstream = self.upstream
                opened = await self._go_on(upstream, begun)
            else:
                upstream = self.upstream = self._take(lease.upstream) or await self._dial(lease.upstream)
                opened = await self._exchange(upstream, lease)
            if isinstance(opened, Failed) and self._was_stale(upstream, opened):
                self._let_go()
                upstream = self.upstream = await self._dial(lease.upstream)
                opened = await self._exchange(upstream, lease)
        except DialFailed as error:
            return Failed(failure=Failure.REFUSED, text=str(error))
        return opened

    def _take(self, upstream: Upstream) -> UpstreamConnection | None:
        """An idle connection to the node, if there is one."""
        return None if self._ended is not None else self.means.pool.take(upstream)

    async def _dial(self, upstream: Upstream) -> UpstreamConnection:
        """A new connection to the node. Raises DialFailed, also when the attempt was ended meanwhile."""
        conn: UpstreamConnection | None = None
        with trio.CancelScope() as self._dialling:
            if self._ended is not None:
                raise DialFailed(self._why)
            try:
                conn = await self.means.pool.dial(upstream)
            finally:
                self._dialling = None
        if conn is None:
            raise DialFailed(self._why)
        if self._ended is not None:
            conn.close()
            raise DialFailed(self._why)
        return conn

    def _was_stale(self, upstream: UpstreamConnection, failed: Failed) -> bool:
        return (
            upstream.reused
            and upstream.bytes_received == 0
            and self._ended is None
            and failed.failure in (Failure.DIED, Failure.NOT_TAKEN)
            and self.means.clock() - self.heard_at < STALE_WITHIN_S
        )

    async def _exchange(self, upstream: UpstreamConnection, lease: Lease) -> Good | Failed:
        self.progress, self.heard_at = 0, self.means.clock()
        head = self._request_head(lease)
        try:
            data = self.sent.data
            if data is not None and len(data) <= ONE_SEND_BYTES:
                await upstream.send(head + data)
            else:
                await upstream.send(head)
                await self.sent.send_to(upstream)
        except UpstreamCut as error:
            return Failed(failure=Failure.NOT_TAKEN, text=str(error))
        return await open_answer(upstream, route=self.route, stream=self.stream, hold_bytes=self.means.options.answer_hold_bytes)

    async def _go_on(self, upstream: UpstreamConnection, begun: bytes) -> Good | Failed:
        """`_exchange` from where `begin_now` left it."""
        try:
            if begun:
                await upstream.send(begun)
        except UpstreamCut as error:
            return Failed(failure=Failure.NOT_TAKEN, text=str(error))
        return await open_answer(upstream, route=self.route, stream=self.stream, hold_bytes=self.means.options.answer_hold_bytes)

    # ------------------------------------------------------------ without a task (edge.quick)

    def begin_now(self) -> Lease | None:
        """Begin what the router wants, if that needs no waiting: take a kept connection to the node, for `send_now`. None: `run` must.

        `run` may take over at any time after it: it goes on from here.
        """
        effect, means = self.desk.first, self.means
        if type(effect) is not Forward or effect.unload or effect.model or self.model or effect.raise_context is not None:
            return None
        lease, data = effect.lease, self.body.data
        if data is None or means.options.first_token_timeout_s:
            return None
        upstream = means.pool.take(lease.upstream)
        if upstream is None:
            return None
        self.upstream = upstream
        self._about_to_try(lease)
        self.heard_at = means.clock()
        self._begun = self._request_head(lease) + data
        return lease

    def send_now(self) -> bool:
        """Send the request that `begin_now` began, as far as it goes without waiting. Returns `is_sent`."""
        upstream, data = self.upstream, self._begun
        if not data or upstream is None or self._ended is not None:
            return False
        try:
            sent = upstream.send_now(data)
        except OSError:
            return False
        if sent == len(data):
            self._begun = b""
            return True
        self._begun = data[sent:]
        return False

    @property
    def is_sent(self) -> bool:
        """Whether the node has all of the request, and nobody wants the attempt to end."""
        return self._begun == b"" and self._ended is None

    def answer_now(self, lease: Lease, head: ResponseHead, body: bytes, usage: Usage | None) -> Settled:
        """Give the client its whole answer, which has status 200 and is good. Never waits, so it must be small."""
        conn, upstream, request_id, size = self.conn, self.upstream, self.request_id, len(body)
        assert upstream is not None, "an answer of nobody"
        self._begun = None
        self.desk.end()
        conn.end()
        upstream.drop()
        made = answer_head(
            head,
            framing="length",
            length=size,
            keep_alive=not conn.must_close,
            request_id=request_id.encode(),
            node=lease.agent_name,
        )
        try:
            conn.send_now(made + body)
        except ClientGone:
            return self._left()
        finally:
            self.upstream = None
            self.means.pool.give_back(upstream)
        return Settled(request_id=request_id, ending=_SUCCESS, status=200, usage=usage, body_bytes=size, chunks=upstream.chunks_seen)

    def _left(self) -> Settled:
        self.conn.must_close = True
        return Settled(request_id=self.request_id, ending=Ending.CANCELLED, status=499, message="the client left")

    # ------------------------------------------------------------ what the node gets

    def _request_head(self, lease: Lease) -> bytes:
        return request_head(
            self.sent_head,
            lease.upstream,
            request_id=self.request_id,
            body_length=self.sent.length,
            client_host=self.conn.peer_host,
            extra=self._credential(lease),
        )

    def _credential(self, lease: Lease) -> tuple[tuple[bytes, bytes], ...]:
        """What a gateway wants to see."""
        if lease.upstream.gateway and (credential := self.means.credential_of(lease.agent_id)):
            return ((CREDENTIAL_HEADER, credential),)
        return ()

    def _attempt_ended(self, failure: Failure, status: int, text: str, repeat_guard: bool) -> None:
        self.means.decider.apply(
            AttemptEnded(request_id=self.request_id, failure=failure, status=status, text=text[:4096], repeat_guard=repeat_guard)
        )

    # ------------------------------------------------------------ answers

    def _extra(self, node: str | None) -> list[tuple[bytes, bytes]]:
        extra = [(b"X-Request-Id", self.request_id.encode())]
        if node is not None:
            extra.append((b"X-Ollama-Node", safe_value(node)))
        if self.explainer is not None:
            extra.append((b"X-Explain", safe_value(self.explainer.line(self.request_id))))
        return extra

    def _head_bytes(self, good: Good, lease: Lease) -> bytes:
        framing = good.framing_for(self.head)
        if framing == "close":
            self.conn.must_close = True
        made = answer_head(
            good.head,
            framing=framing,
            length=good.length,
            keep_alive=not self.conn.must_close,
            request_id=self.request_id.encode(),
            node=lease.agent_name,
        )
        if self.explainer is not None:
            made = b"%b\r\nX-Explain: %b\r\n\r\n" % (made[:-4], safe_value(self.explainer.line(self.request_id)))
        return made

    async def _pass_on(self, effect: PassOn) -> Settled:
        """The last node's own answer, as it came."""
        if self.kept is None:
            return await self._refuse(Refuse(request_id=self.request_id, status=502, text="the node failed before it answered; try again"))
        kept, node = self.kept
        extra = self._extra(node)
        if effect.retry_after_s is not None:
            extra.append((b"Retry-After", b"%d" % effect.retry_after_s))
        if self.capture is not None:
            self.capture.take(kept.body)
        head = response_head(kept.head, framing=kept.framing, keep_alive=not self.conn.must_close, extra=extra)
        await self.conn.send(head + kept.framed())
        return Settled(
            request_id=self.request_id,
            ending=Ending.ERROR,
            status=kept.head.status,
            message=kept.text[:4096],
            body_bytes=len(kept.body),
        )

    async def _refuse(self, effect: Refuse) -> Settled:
        """The router's own error, in the route's envelope."""
        body, content_type = error_body(self.route.protocol, effect.status, effect.text)
        extra = self._extra(None)
        if effect.retry_after_s is not None:
            extra.append((b"Retry-After", b"%d" % effect.retry_after_s))
        if self.capture is not None:
            self.capture.take(body)
        await self.conn.send(
            simple_response(effect.status, body, content_type=content_type, extra=extra, keep_alive=not self.conn.must_close)
        )
        return Settled(request_id=self.request_id, ending=Ending.ERROR, status=effect.status, message=effect.text, body_bytes=len(body))
