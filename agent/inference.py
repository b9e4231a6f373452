"""One inference request at the gateway: to the local Ollama and back, and how that ended.

Decides what its caller is told where there is no good answer; `edge.relay` decides which are. What ends it from outside (the caller
leaves) closes the connection to Ollama; the task that reads it finds out there, which costs nothing as long as nobody leaves.

Invariants: a caller that leaves closes the local request at once; nothing but a good answer's bytes, or one error, goes out; `report`
tells what the caller saw.
"""

import time
from typing import Final, Literal

import msgspec
import trio

from core.events import Failure, Route, Upstream, Usage
from core.messages import ENDING_TEXT_MAX, EndingReport
from core.units import MIB
from edge.body import Body
from edge.headers import request_head, response_head, simple_response
from edge.pool import DialFailed, Pool
from edge.relay import FAILURE_HEADER, Failed, Good, Poured, give_whole, open_answer, pour
from edge.told import telling
from edge.wire import ClientConnection, ClientGone, RequestHead, ResponseHead, UpstreamConnection, UpstreamCut
from edge.wire_heads import Framing

HOLD_BYTES: Final = 16 * MIB
"""A non-streaming answer is held until whole up to this size (contract 4)."""

ONE_SEND_BYTES: Final = 256 << 10
"""Smaller bodies leave together with their head."""

_LEFT: Final = "the caller left"
_JSON: Final = "application/json; charset=utf-8"
_NO_USAGE: Final = Usage()


class Inference:
    """Of one request. `for_nginx`: failures are told as `edge.told` does it."""

    __slots__ = (
        "_began", "_begun", "_body_bytes", "_chunks", "_conn", "_dialling", "_error", "_fault", "_head", "_left", "_pool",
        "_request_id", "_route", "_status", "_to", "_ttft_ms", "_usage", "for_nginx", "serial", "success",
        "upstream",
    )  # fmt: skip

    def __init__(
        self, pool: Pool, to: Upstream, conn: ClientConnection, head: RequestHead, route: Route, request_id: str, *, for_nginx: bool
    ) -> None:
        self._pool = pool
        self._to = to
        self._conn = conn
        self._head = head
        self._route = route
        self._request_id = request_id
        self.for_nginx = for_nginx
        self.serial = 0
        """Which one it is in its gateway."""
        self._began = time.monotonic()
        self._begun: bytes | None = None
        """What is left to send of a request that was begun without a task; None: it was not."""
        self.upstream: UpstreamConnection | None = None
        self._dialling: trio.CancelScope | None = None
        self._left = False
        self.success = False
        self._ttft_ms: float | None = None
        self._status = 0
        self._error = ""
        self._fault: Failure | None = None
        self._usage: Usage | None = None
        self._body_bytes = 0
        self._chunks = 0

    def cancel(self) -> None:
        """The caller left (`conn.gone`)."""
        self._left = True
        if self.upstream is not None:
            self.upstream.abandon(_LEFT)
        if self._dialling is not None:
            self._dialling.cancel()

    async def run(self, body: Body) -> None:
        """Answer it; goes on from where `begin_now` left it.

        Raises:
            ClientGone: the caller left.
        """
        conn = self._conn
        conn.begin(self)
        try:
            opened = await self._open(body)
            if isinstance(opened, Good):
                self._ttft_ms = self.since_ms()
                await self._answer(opened)
        finally:
            conn.end()
            self._let_go()
        if self.success:
            return
        if self._left:
            raise ClientGone(_LEFT)
        if isinstance(opened, Failed):
            await self._tell(opened)

    def since_ms(self) -> float:
        """How long it has been here."""
        return 1000 * (time.monotonic() - self._began)

    # ------------------------------------------------------------ without a task

    def begin_now(self, upstream: UpstreamConnection, body: bytes) -> None:
        """Begin it on this idle connection, for `send_now`. `run` may take over at any time after it."""
        self.upstream = upstream
        self._conn.begin(self)
        self._begun = self._request_head(len(body)) + body

    def send_now(self) -> bool:
        """Send the request that `begin_now` began, as far as it goes without waiting. Returns `is_sent`."""
        upstream, data = self.upstream, self._begun
        if not data or upstream is None or self._left:
            return False
        try:
            sent = upstream.send_now(data)
        except OSError:
            return False
        self._begun = data[sent:]
        return sent == len(data)

    @property
    def is_sent(self) -> bool:
        """Whether Ollama has all of the request, and its caller is there."""
        return self._begun == b"" and not self._left

    def answer_now(self, head: ResponseHead, body: bytes, usage: Usage | None) -> None:
        """Give the caller Ollama's whole answer, which has status 200 and is good. Never waits, so it must be small."""
        conn, upstream = self._conn, self.upstream
        assert upstream is not None
        self._begun = None
        conn.end()
        self._ttft_ms = self.since_ms()
        self._status, self._body_bytes, self._chunks = head.status, len(body), upstream.chunks_seen
        self._usage = usage
        upstream.drop()
        try:
            conn.send_now(self._head_bytes(head, "length", len(body)) + body)
            self.success = True
        except ClientGone:
            self._left = True
        finally:
            self._let_go()

    # ------------------------------------------------------------ to Ollama

    async def _open(self, body: Body) -> Good | Failed:
        """Send the request and read the beginning of the answer. A stale kept connection is replaced once."""
        begun, self._begun = self._begun, None
        upstream = self.upstream
        if upstream is None and not self._left:
            upstream = self._pool.take(self._to)
        try:
            while True:
                upstream = self.upstream = upstream or await self._dial()
                if begun is None:
                    opened = await self._exchange(upstream, self._request_head(body.length), body)
                else:
                    opened, begun = await self._go_on(upstream, begun), None
                stale = upstream.reused and not upstream.bytes_received and not self._left
                if not (stale and isinstance(opened, Failed) and opened.failure in (Failure.DIED, Failure.NOT_TAKEN)):
                    return opened
                self._let_go()
                upstream = None
        except DialFailed as error:
            return Failed(failure=Failure.REFUSED, text=f"Ollama cannot be reached: {error}")

    async def _dial(self) -> UpstreamConnection:
        with trio.CancelScope() as self._dialling:
            if not self._left:
                try:
                    conn = await self._pool.dial(self._to)
                finally:
                    self._dialling = None
                if not self._left:
                    return conn
                conn.close()
        raise DialFailed(_LEFT)

    async def _exchange(self, upstream: UpstreamConnection, data: bytes, body: Body) -> Good | Failed:
        try:
            if body.data is not None and body.length <= ONE_SEND_BYTES:
                await upstream.send(data + body.data)
            else:
                await upstream.send(data)
                await body.send_to(upstream)
        except UpstreamCut as error:
            return Failed(failure=Failure.NOT_TAKEN, text=str(error))
        return await self._hear(upstream)

    async def _go_on(self, upstream: UpstreamConnection, rest: bytes) -> Good | Failed:
        try:
            if rest:
                await upstream.send(rest)
        except UpstreamCut as error:
            return Failed(failure=Failure.NOT_TAKEN, text=str(error))
        return await self._hear(upstream)

    async def _hear(self, upstream: UpstreamConnection) -> Good | Failed:
        route = self._route
        return await open_answer(upstream, route=route, stream=route.streams_by_default, hold_bytes=HOLD_BYTES)

    def _request_head(self, body_bytes: int) -> bytes:
        return request_head(self._head, self._to, request_id=self._request_id, body_length=body_bytes, client_host=self._conn.peer_host)

    def _let_go(self) -> None:
        """Back into the pool, which closes what cannot be used again."""
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            self._pool.give_back(upstream)

    # ------------------------------------------------------------ to the caller

    async def _answer(self, good: Good) -> None:
        conn, upstream = self._conn, self.upstream
        assert upstream is not None
        framing = good.framing_for(self._head)
        head_bytes = self._head_bytes(good.head, framing, good.length)
        self._status = good.head.status
        try:
            if good.whole:
                poured = await give_whole(good, upstream, conn, head_bytes=head_bytes, route=self._route)
            else:
                poured = await pour(good, upstream, conn, head_bytes=head_bytes, route=self._route)
        finally:
            self._body_bytes, self._chunks = good.body_bytes, upstream.chunks_seen
        self._poured(poured)

    def _head_bytes(self, head: ResponseHead, framing: Framing, length: int | None) -> bytes:
        extra = ((b"X-Request-Id", self._request_id.encode("ascii")),)
        return response_head(head, framing=framing, length=length, keep_alive=not self._conn.must_close, extra=extra)

    def _poured(self, poured: Poured) -> None:
        self._usage = poured.usage
        self.success = poured.clean
        self._error = poured.error_text
        self._fault = poured.node_failure

    async def _tell(self, failed: Failed) -> None:
        """Ollama's own words where it has any, else which failure it was."""
        conn = self._conn
        extra = [(b"X-Request-Id", self._request_id.encode("ascii"))]
        self._error, self._fault = failed.text, failed.failure
        kept = failed.kept
        if self.for_nginx:
            answer = telling(failed)
            self._status = answer.status
            extra += answer.headers
            await conn.send(
                simple_response(answer.status, answer.body, content_type=answer.content_type, extra=extra, keep_alive=not conn.must_close)
            )
            return
        if kept is not None:
            self._status = kept.head.status
            head = response_head(kept.head, framing=kept.framing, keep_alive=not conn.must_close, extra=extra)
            await conn.send(head + kept.framed())
            return
        self._status = 502
        if failed.failure is Failure.ANSWERED:  # an error too long to be held: its beginning is in the text
            self._status = failed.status
        else:
            extra.append((FAILURE_HEADER, failed.failure.value.encode()))
        body = msgspec.json.encode({"error": failed.text or "Ollama failed before it answered"})
        await conn.send(simple_response(self._status, body, extra=extra, keep_alive=not conn.must_close))

    # ------------------------------------------------------------ how it ended

    def refused(self, status: int, text: str) -> None:
        """The request itself could not be read."""
        self._status, self._error = status, text

    def report(self) -> EndingReport:
        """What became of it, once it is over."""
        status, message, fault = self._status, "", None
        ending: Literal["success", "error", "cancelled"] = "success"
        if not self.success:
            if self._left or self._conn.gone:
                status, ending, message = 499, "cancelled", _LEFT
            else:
                ending = "error"
                message = self._error[:ENDING_TEXT_MAX] or "the gateway stopped"
                fault = None if self._fault is None else self._fault._value_
        usage = self._usage or _NO_USAGE
        return EndingReport(
            request_id=self._request_id,
            ending=ending,
            status=status,
            message=message,
            node_fault=fault,
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.output_tokens,
            total_ns=usage.total_ns,
            load_ns=usage.load_ns,
            prompt_ns=usage.prompt_ns,
            eval_ns=usage.eval_ns,
            body_bytes=self._body_bytes,
            chunks=self._chunks,
            ttft_ms=self._ttft_ms,
            duration_ms=self.since_ms(),
        )
