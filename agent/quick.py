"""The commonest request of all at a gateway, served without a task: small, whole in one read, and answered whole on a kept connection.

Decides what is that common, as `edge.quick` does for the coordinator; everything else goes to the connection's task, at whatever point it
stops being so: before a request was begun as the bytes that came, after that as the rest of it. A task costs two waits a request, each
of which is a turn of Trio's scheduler; here the watch calls, when the caller or Ollama has sent something.

Invariants: nothing here waits, or computes for long; a request that entered the gateway leaves it exactly once, here or in the task; it
is treated as the task would treat it: the same credential, the same bytes, the same report.
"""

from functools import partial
from typing import Final
from typing import Protocol as Interface

from agent.inference import Inference
from core.events import Route
from edge.body import Body
from edge.listener import quick_routes
from edge.quick import WholeAnswer, whole_answer
from edge.wire import ClientConnection, HttpError, RequestHead, UpstreamConnection, parse_request_head

REQUEST_MAX_BYTES: Final = 256 << 10
"""A read brings no more; nothing of it is understood here."""

_ROUTES: Final = quick_routes(None)


class Inside(Interface):
    """What is needed of `agent.gateway.Gateway`."""

    def allowed(self, head: RequestHead, /) -> bool: ...

    def idle_upstream(self) -> UpstreamConnection | None: ...

    def hold(self, data: bytes, /) -> Body | None: ...

    def enter(self, conn: ClientConnection, head: RequestHead, route: Route, /) -> Inference: ...

    def leave(self, one: Inference, /) -> None: ...

    def failed(self, error: Exception, /) -> None: ...


class GatewayLane:
    """One caller's connection. Implements `edge.wire.Lane`."""

    __slots__ = ("_body", "_conn", "_found", "_gateway", "_head", "_one", "_route")

    def __init__(self, gateway: Inside, conn: ClientConnection) -> None:
        self._gateway = gateway
        self._conn = conn
        self._one: Inference | None = None
        """What entered the gateway and has not left it; the next three are its."""
        self._body: Body | None = None
        self._head: RequestHead | None = None
        self._route: Route | None = None
        self._found: WholeAnswer | None = None
        """What Ollama answered, until the caller gets it."""

    def came(self) -> None:
        """The caller sent something."""
        conn = self._conn
        data = conn.take_up()
        if not data:
            return
        try:
            end = data.find(b"\r\n\r\n") + 4
            if end > 3 and len(data) <= REQUEST_MAX_BYTES and self._begin(parse_request_head(data[:end]), data[end:]):
                return
        except HttpError:
            pass
        except Exception as error:
            self._fail(error)
            return
        conn.hand_over(data)

    def _begin(self, head: RequestHead, data: bytes) -> bool:
        """Begin the request, if it is a common one."""
        gateway, conn = self._gateway, self._conn
        route = _ROUTES.get(head.path)
        if route is None or not head.is_common or head.content_length != len(data):
            return False
        if not gateway.allowed(head) or (body := gateway.hold(data)) is None:
            return False
        upstream = gateway.idle_upstream()
        if upstream is None:
            body.close()
            return False
        conn.begin_quick()
        self._body, self._head, self._route = body, head, route
        one = self._one = gateway.enter(conn, head, route)
        one.begin_now(upstream, data)
        upstream.eager = self.answered
        conn.watch.at_end.append(self._send_request)
        return True

    def _send_request(self) -> None:
        one = self._one
        if one is None or one.upstream is None or one.upstream.eager is None:
            return  # it was handed over already
        try:
            if not one.send_now():
                self._hand_over(one)
        except Exception as error:
            self._fail(error)

    def answered(self) -> None:
        """Ollama sent something, or its connection was closed."""
        one, route = self._one, self._route
        assert one is not None
        assert route is not None
        upstream = one.upstream
        assert upstream is not None
        try:
            found = whole_answer(upstream, route)
            if found is None:
                return
            if found is False:
                self._hand_over(one)
                return
            upstream.eager = None
            self._found = found
            self._conn.watch.at_end.append(self._send_answer)
        except Exception as error:
            self._fail(error)

    def _send_answer(self) -> None:
        one, found = self._one, self._found
        self._found = None
        assert one is not None, "nothing that ends a request comes between"
        assert found is not None
        try:
            if not one.is_sent:
                self._hand_over(one)
                return
            one.answer_now(*found)
            self._conn.watch.at_end.append(self._end)
        except Exception as error:
            self._fail(error)

    def _end(self) -> None:
        """The caller has its answer; others got theirs before this one left the gateway."""
        try:
            self._leave()
            self._conn.end_quick()
        except Exception as error:
            self._fail(error)

    def abandon(self) -> None:
        """The connection's task ends."""
        one = self._one
        if one is not None:
            upstream = one.upstream
            if upstream is not None:
                upstream.eager = None
                upstream.close()
            self._leave()

    def _leave(self) -> None:
        one, body = self._one, self._body
        assert one is not None
        assert body is not None
        self._one = self._body = None
        body.close()
        self._gateway.leave(one)

    # ------------------------------------------------------------ to the task

    def _hand_over(self, one: Inference) -> None:
        if one.upstream is not None:
            one.upstream.eager = None
        self._conn.hand_over(b"", self._head, self._carry_on)

    async def _carry_on(self) -> None:
        one, body = self._one, self._body
        assert one is not None
        assert body is not None
        self._one = self._body = None
        try:
            await one.run(body)
        finally:
            body.close()
            self._gateway.leave(one)

    def _fail(self, error: Exception) -> None:
        """A mistake of ours: the task reports it, and answers if nothing was."""
        began = self._one is not None
        try:
            self.abandon()
        except Exception as another:
            self._gateway.failed(another)
        if began:
            self._conn.hand_over(b"", self._head, partial(_raise, error))
        else:
            self._gateway.failed(error)
            self._conn.close()


async def _raise(error: Exception) -> None:
    raise error
