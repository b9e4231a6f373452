"""Requests of clients as they come: read whole, told to the router, carried out by `edge.live`, settled.

Decides nothing about nodes. Knows no policy, no registry, no history. Invariant: `Settled` is applied exactly once per `RequestCame`,
whatever happens.
"""

from collections.abc import Awaitable, Callable
from typing import Final
from typing import Protocol as Interface

import trio

from core.aliases import Aliases
from core.events import (
    Ending,
    Failure,
    Pulse,
    Route,
    Settled,
)
from core.units import AgentId, RequestId
from edge.as_sent import read_facts
from edge.body import Body, BodyBudget, inspect_ordinary, read_body
from edge.capture import Recorder
from edge.denied import Denied
from edge.desk import Decider, Desk, Explainer
from edge.facts import BodyFacts
from edge.headers import error_response
from edge.live import Live, Means, ProxyOptions
from edge.pool import Pool
from edge.wire import ClientConnection, RequestHead

_V1_MODEL: Final = Route.V1_MODEL  # members of enumerations cost a Python call each where they are looked up (up to CPython 3.11)

KEYED: Final = "key:"
"""How the names of clients begin about which there may be rules (`JudgeModel`)."""


class JudgeModel(Interface):
    """Whether a client may reach the model that the node will see."""

    def __call__(self, client: str, model: str | None, /, *, told_once: bool) -> Denied | None: ...


class Begun(Interface):
    """A request that another edge began (`edge.handover`): its effects are at `desk`."""

    @property
    def desk(self) -> Desk: ...

    @property
    def route(self) -> Route: ...

    @property
    def stream(self) -> bool: ...

    def resume(self, one: Live, /) -> None:
        """Tell the router, and `one`, what became of it until now."""


def _open_to_all(_client: str, _model: str | None, /, *, told_once: bool) -> Denied | None:
    return None


async def _loaded_nowhere_else(_: str) -> str:
    return ""


class Proxy:
    """Serves the forwarded routes of one coordinator; one instance for all connections."""

    def __init__(
        self,
        decider: Decider,
        pool: Pool,
        *,
        budget: BodyBudget,
        options: ProxyOptions,
        new_id: Callable[[], RequestId],
        credential_of: Callable[[AgentId], bytes | None],
        client_of: Callable[[ClientConnection, RequestHead], str] = lambda conn, _: conn.peer_host,
        judge_model: JudgeModel = _open_to_all,
        unload_elsewhere: Callable[[str], Awaitable[str]] = _loaded_nowhere_else,
        recorder: Recorder | None = None,
        aliases: Aliases | None = None,
        explainer: Explainer | None = None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._means = Means(decider=decider, pool=pool, budget=budget, options=options, credential_of=credential_of, clock=clock)
        self._decider = decider
        self._budget = budget
        self._stall_timeout_s = options.stall_timeout_s
        self._new_id = new_id
        self._client_of = client_of
        self._judge_model = judge_model
        self._unload_elsewhere = unload_elsewhere
        self._recorder = recorder
        self._aliases = aliases or None
        self._explainer = explainer
        self._clock = clock
        self._live: dict[RequestId, Live] = {}

    def pulse(self) -> Pulse:
        """What is still worked on, and which nodes were heard since the last call. Also ends attempts that stalled too long."""
        heard: dict[AgentId, None] = {}
        now, limit_s = self._clock(), self._stall_timeout_s
        for one in self._live.values():
            upstream = one.upstream
            if upstream is None or one.agent_id is None:
                continue
            progress = upstream.bytes_received
            if progress != one.progress:
                one.progress, one.heard_at = progress, now
                heard[one.agent_id] = None
            elif limit_s and progress and now - one.heard_at > limit_s:
                one.end(Failure.TIMEOUT, "the node stopped in mid-answer for longer than the configured limit")
        return Pulse(requests=tuple(self._live), heard=tuple(heard))

    async def serve(self, conn: ClientConnection, head: RequestHead, route: Route) -> None:
        """Answer one request.

        Raises:
            HttpError: the request itself cannot be read; nothing was sent.
            ClientGone: the client left; nothing is owed.
        """
        body = await read_body(conn, head, self._budget)
        try:
            facts = None
            if route is _V1_MODEL:
                facts = BodyFacts(model=head.path.rpartition("/")[2])
            elif body.data is not None:
                facts = inspect_ordinary(route, body.data)
            if facts is None:
                facts = await read_facts(route, head, body, self._budget)
            request_id = self._new_id()
            client = self._client_of(conn, head)
            model = facts.model
            others: tuple[str, ...] = ()
            if self._aliases or client.startswith(KEYED):
                model, others, denied = self._models(client, facts)
                if denied is not None:
                    await conn.send(denied.response(route.protocol, request_id, keep_alive=not conn.must_close))
                    return
            if facts.unload and model is not None and (problem := await self._unload_elsewhere(model)):
                await conn.send(error_response(500, problem, request_id=request_id, keep_alive=not conn.must_close))
                return
            explainer = self._explainer
            if explainer is not None and (head.fields.get(b"x-explain") != b"1" or not await explainer.is_for(conn, head)):
                explainer = None
            one = self._begin(conn, head, route, body, facts, request_id, client, model, others)
            one.explainer = explainer
            self.capture(one)
            await self.finish(one)
        finally:
            body.close()

    def _begin(
        self,
        conn: ClientConnection,
        head: RequestHead,
        route: Route,
        body: Body,
        facts: BodyFacts,
        request_id: RequestId,
        client: str,
        model: str | None,
        others: tuple[str, ...],
    ) -> Live:
        """Tell the router that a request came. `model`: which is asked for; `others`: those that will do as well.

        What is returned must be finished, and `capture` be called before it is.
        """
        decider = self._decider
        one = Live(self._means, conn, head, route, body, decider.open_desk(request_id), stream=facts.stream)
        if model is not facts.model:
            one.model = model
        if self._recorder is not None:
            one.number = self._recorder.number()
        self._live[request_id] = one
        try:
            decider.apply(facts.came(request_id, route, client, model, others))
        except BaseException:
            self.capture(one)
            self._settle(one, None)
            raise
        return one

    def capture(self, one: Live) -> None:
        """Have history take what passes, if it wants that; at the latest before the request is settled."""
        if self._recorder is not None:
            one.capture = self._recorder.open(one.request_id, one.conn, one.head, one.route, one.stream, one.number)

    async def go_on(self, conn: ClientConnection, head: RequestHead, begun: Begun) -> None:
        """Answer a request that the router was told of elsewhere. Raises as `serve`."""
        desk = begun.desk
        try:
            body = await read_body(conn, head, self._budget)
        except BaseException:
            gone = Settled(request_id=desk.request_id, ending=Ending.CANCELLED, message="its body did not come to the embedded edge")
            self._decider.apply(gone)
            self._decider.close_desk(desk.request_id)
            raise
        try:
            one = Live(self._means, conn, head, begun.route, body, desk, stream=begun.stream)
            if self._recorder is not None:
                one.number = self._recorder.number()
            self.capture(one)
            self._live[desk.request_id] = one
            try:
                begun.resume(one)
            except BaseException:
                self._settle(one, None)
                raise
            await self.finish(one)
        finally:
            body.close()

    def has_room(self, length: int) -> bool:
        """Whether a body of `length` bytes may be held now."""
        budget = self._budget
        return length <= budget.max_body_bytes and budget.held_bytes + length <= budget.memory_bytes

    def begin_now(
        self, conn: ClientConnection, head: RequestHead, route: Route, data: bytes, facts: BodyFacts, client: str | None = None
    ) -> Live | Denied:
        """Begin a request whose body is `data`, for which there is room, without waiting. It must be settled, or carried on.

        `client`: its client's name, where that is known.
        """
        budget, model, length = self._budget, facts.model, len(data)
        if client is None:
            client = self._client_of(conn, head)
        others: tuple[str, ...] = ()
        if self._aliases or client.startswith(KEYED):
            model, others, denied = self._models(client, facts)
            if denied is not None:
                return denied
        budget.held_bytes += length
        body = Body(data, length, budget)
        try:
            return self._begin(conn, head, route, body, facts, self._new_id(), client, model, others)
        except BaseException:
            body.close()
            raise

    async def carry_on(self, one: Live) -> None:
        """Finish what `begin_now` began."""
        try:
            self.capture(one)
            await self.finish(one)
        finally:
            one.body.close()

    def settle_now(self, one: Live, settled: Settled | None, answer: bytes = b"") -> None:
        """What `begin_now` began is over. None: it was given up. `answer`: the body of its whole answer."""
        recorder, body = self._recorder, one.body
        data = body.data
        try:
            if recorder is None:
                self._settle(one, settled)
            elif settled is None or data is None:
                self.capture(one)
                self._settle(one, settled)
            else:  # what history does with it comes later, when nobody waits
                self._settle(one, settled)
                recorder.leave(one.request_id, one.conn, one.head, one.route, one.stream, one.number, data, answer)
        finally:
            body.close()

    async def finish(self, one: Live) -> None:
        """Carry out what the router wants for a request that has begun, and settle it."""
        settled: Settled | None = None
        try:
            settled = await one.run()
            if one.capture is not None:
                await one.capture.take_request(one.body)
        finally:
            self._settle(one, settled)

    def _settle(self, one: Live, settled: Settled | None) -> None:
        """The request is over. None: it was given up."""
        request_id = one.request_id
        del self._live[request_id]
        if settled is None:
            settled = Settled(request_id=request_id, ending=Ending.UNKNOWN, message="the router stopped")
        decider = self._decider
        decider.apply(settled)
        decider.close_desk(request_id)
        one.close()

    def _models(self, client: str, facts: BodyFacts) -> tuple[str | None, tuple[str, ...], Denied | None]:
        """The model that is asked for and those that will do as well, as far as the client may reach them; or why it may reach none."""
        models = self._aliases.models(facts.model) if self._aliases else ()
        if not client.startswith(KEYED):
            return (models[0], models[1:], None) if models else (facts.model, (), None)
        judged = [(model, self._judge_model(client, model, told_once=facts.named_once)) for model in models or (facts.model,)]
        allowed = [model for model, denied in judged if denied is None]
        if not allowed:
            return facts.model, (), judged[0][1]
        return allowed[0], tuple(model for model in allowed[1:] if model is not None), None
