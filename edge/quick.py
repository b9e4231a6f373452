"""The commonest request of all, served without a task: small, whole in one read, and answered whole by the first node that is asked.

Decides what is that common; everything else goes to the connection's task, at whatever point it stops being so: before a request was
begun as the bytes that came, after that as the rest of it (`edge.live`). A task costs two waits a request, each of which is a turn of
Trio's scheduler; here the watch calls, when a client or a node has sent something.

Invariants: nothing here waits, or computes for long; what was begun is settled exactly once, here or by the task; a request is
treated as the task would treat it: the same gate, the same router, the same bytes.
"""

from collections.abc import Callable
from functools import partial
from typing import Final, Literal
from typing import Protocol as Interface

from core.events import Lease, Route, Settled, Usage
from edge.body import inspect_ordinary
from edge.denied import Denied
from edge.facts import BodyFacts
from edge.live import Live
from edge.verdicts import judge_whole
from edge.wire import ClientConnection, ClientGone, HttpError, RequestHead, ResponseHead, UpstreamConnection
from edge.wire_heads import HeaderBlock, shared_request_head

REQUEST_MAX_BYTES: Final = 16 << 10
"""Of a larger request the reading of its body is more than a moment's work."""
ANSWER_MAX_BYTES: Final = 64 << 10

Gate = Callable[[ClientConnection, RequestHead], Denied | None]
LastingClient = Callable[[ClientConnection, RequestHead], str | None]
"""Who asks, where that and the leave to follow from the head alone, for as long as the connection lasts; None: ask for each request."""


WholeAnswer = tuple[ResponseHead, bytes, Usage | None]
"""A node's good answer, its body, and its cost."""


class Begins(Interface):
    """What is needed of `edge.proxy.Proxy`."""

    def has_room(self, length: int, /) -> bool: ...

    def begin_now(
        self, conn: ClientConnection, head: RequestHead, route: Route, data: bytes, facts: BodyFacts, client: str | None, /
    ) -> Live | Denied: ...

    async def carry_on(self, one: Live, /) -> None: ...

    def settle_now(self, one: Live, settled: Settled | None, answer: bytes = b"", /) -> None: ...


class Quick:
    """What the lanes of all connections share. `routes`: the POST routes by their paths."""

    __slots__ = ("gate", "lasting_client", "new_id", "proxy", "report", "routes")

    def __init__(
        self,
        proxy: Begins,
        *,
        gate: Gate,
        routes: dict[str, Route],
        new_id: Callable[[], str],
        report: Callable[[Exception], None],
        lasting_client: LastingClient = lambda *_: None,
    ) -> None:
        self.proxy = proxy
        self.gate = gate
        self.lasting_client = lasting_client
        self.routes = routes
        self.new_id = new_id
        self.report = report

    def lane(self, conn: ClientConnection) -> "QuickLane":
        """For one connection."""
        return QuickLane(self, conn)


class QuickLane:
    """One client connection's requests. Implements `edge.wire.Lane`."""

    __slots__ = ("_block", "_client", "_conn", "_found", "_lease", "_one", "_quick", "_settled")

    def __init__(self, quick: Quick, conn: ClientConnection) -> None:
        self._quick = quick
        self._conn = conn
        self._block: HeaderBlock | None = None
        """Headers of the last request; who sends these again is `_client`."""
        self._client: str | None = None
        self._one: Live | None = None
        """What was begun and is not settled."""
        self._lease: Lease | None = None
        self._found: WholeAnswer | None = None
        """What its node answered, until the client gets it."""
        self._settled: Settled | None = None
        """What became of it, until the router is told."""

    def came(self) -> None:
        """The client sent something."""
        conn = self._conn
        data = conn.take_up()
        if not data:
            return
        head: RequestHead | None = None
        try:
            end = data.find(b"\r\n\r\n") + 4
            if end > 3 and len(data) <= REQUEST_MAX_BYTES:
                head = shared_request_head(data[:end])
                if self._begin(head, data[end:]):
                    return
        except HttpError:
            pass
        except Exception as error:
            self._fail(error, head)
            return
        conn.hand_over(data)

    def _begin(self, head: RequestHead, data: bytes) -> bool:
        """Begin the request, if it is a common one."""
        quick, conn, proxy = self._quick, self._conn, self._quick.proxy
        route = quick.routes.get(head.path)
        if route is None or not head.is_common or head.content_length != len(data):
            return False
        facts = inspect_ordinary(route, data)
        if facts is None or facts.unload or not proxy.has_room(len(data)):
            return False
        if head.block is not self._block:
            self._block, self._client = head.block, quick.lasting_client(conn, head)
        client = self._client
        denied = quick.gate(conn, head) if client is None else None
        conn.begin_quick()
        one = denied or proxy.begin_now(conn, head, route, data, facts, client)
        if isinstance(one, Live):
            self._one = one
            lease = self._lease = one.begin_now()
            upstream = one.upstream
            if lease is None or upstream is None:
                self._hand_over()
            else:
                upstream.eager = self.answered
                conn.watch.at_end.append(self._send_request)
        else:
            try:
                conn.send_now(one.response(route.protocol, quick.new_id(), keep_alive=not conn.must_close))
            except ClientGone:
                pass
            conn.end_quick()
        return True

    def _send_request(self) -> None:
        one = self._one
        if one is None or one.upstream is None or one.upstream.eager is None:
            return  # it was handed over already
        try:
            if not one.send_now():
                self._hand_over()
        except Exception as error:
            self._fail(error, one.head)

    def answered(self) -> None:
        """The node sent something, or its connection was closed."""
        one = self._one
        assert one is not None
        upstream = one.upstream
        assert upstream is not None
        try:
            found = whole_answer(upstream, one.route)
            if found is None:
                return
            if found is False:
                self._hand_over()
                return
            upstream.eager = None
            self._found = found
            self._conn.watch.at_end.append(self._send_answer)
        except Exception as error:
            self._fail(error, one.head)

    def _send_answer(self) -> None:
        one, lease, found = self._one, self._lease, self._found
        assert one is not None, "nothing that ends a request comes between"
        assert lease is not None
        assert found is not None
        try:
            if not one.is_sent:
                self._found = None
                self._hand_over()
                return
            self._settled = one.answer_now(lease, *found)
            self._conn.watch.at_end.append(self._settle)
        except Exception as error:
            self._fail(error, one.head)

    def _settle(self) -> None:
        """The client has its answer; others got theirs before this one's settlement."""
        one, settled, found = self._one, self._settled, self._found
        self._one = self._settled = self._found = None
        assert one is not None
        assert found is not None
        try:
            self._quick.proxy.settle_now(one, settled, found[1])
            self._conn.end_quick()
        except Exception as error:
            self._fail(error, one.head)

    def abandon(self) -> None:
        """The connection's task ends."""
        one, self._one = self._one, None
        if one is not None:
            self._end(one)

    # ------------------------------------------------------------ to the task

    def _hand_over(self) -> None:
        one = self._one
        assert one is not None
        if one.upstream is not None:
            one.upstream.eager = None
        self._conn.hand_over(b"", one.head, self._carry_on)

    async def _carry_on(self) -> None:
        one, self._one = self._one, None
        assert one is not None, "handed over twice"
        await self._quick.proxy.carry_on(one)

    def _fail(self, error: Exception, head: RequestHead | None) -> None:
        """A mistake of ours: the task reports it, and answers if nothing was."""
        one, self._one = self._one, None
        if one is not None:
            try:
                self._end(one)
            except Exception as another:
                self._quick.report(another)
        if head is None:
            self._quick.report(error)
            self._conn.close()
        else:
            self._conn.hand_over(b"", head, partial(_raise, error))

    def _end(self, one: Live) -> None:
        upstream = one.upstream
        if upstream is not None:
            upstream.eager = None
        try:
            self._quick.proxy.settle_now(one, None)
        finally:
            if upstream is not None:
                upstream.close()


def whole_answer(upstream: UpstreamConnection, route: Route) -> WholeAnswer | Literal[False] | None:
    """Read what a node has sent: its good answer, here whole, and its cost. None: more is to come; False: it is not that common."""
    if not upstream.closed and not upstream.receive_now():
        return None
    found = upstream.whole()
    if found is None:
        head = upstream.head
        common = head is None or (head.status == 200 and not head.streams)
        uncommon = upstream.is_cut or upstream.readable or not common or upstream.bytes_received > ANSWER_MAX_BYTES
        return False if uncommon else None
    head, body = found
    if head.status != 200 or head.streams:
        return False
    fault, usage = judge_whole(route, body)
    return (head, body, usage) if fault is None else False


async def _raise(error: Exception) -> None:
    raise error
