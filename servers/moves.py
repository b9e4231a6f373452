"""Carries out what `core.tasks` decides: orders to agents, work on nodes without one, and the time for both.

Decides how a node is reached, nothing about which task is next. Agents download by themselves and report; every other work on a node's
models is done from here, through the gateway where there is one. Invariants: each attempt that is begun ends in one `AttemptOver`, unless
the coordinator stops; what a node lists after the work is known to the router before the task is over; no step here is long, however
many lines a download has.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import msgspec
import trio

from core.events import NodePolled, Note
from core.messages import PullOrder, PullReport
from core.names import key_or_none
from core.tasks import (
    FINISHED,
    LEASE_S,
    Abort,
    Asked,
    AttemptOver,
    Begin,
    Cancelled,
    Changed,
    Effect,
    Event,
    Joined,
    Kind,
    NodesSeen,
    Progressed,
    TaskRestored,
    Tasks,
    TaskView,
    WatcherLeft,
    What,
)
from core.transfer import Layer
from core.units import AgentId, ModelKey
from core.views import AgentView
from edge.model_work import Done, NodeOllama, row_of
from edge.pool import DialFailed, Pool
from edge.wire import UpstreamCut
from servers import clock
from servers.driver import Driver

CREDENTIAL_HEADER: Final = b"X-Ollama-Router-Credential"
LOOK_S: Final = 0.5
"""How often nodes and deadlines are looked at while there are tasks."""
IDLE_LOOK_S: Final = 5.0
AT_ONCE: Final = 10
"""Tasks that are asked for or begun in one step of the loop."""
UNLOAD_LIMIT_S: Final = 30.0
"""Ollama answers an unload at once, unless it is busy loading."""
LISTED_WITHIN_S: Final = 10.0
"""How long a client waits, after the work, until the router knows what came of it."""

Sayer = Callable[[str, str, dict[str, Any]], None]


class Moves:
    """One per coordinator. `say`: where notes go (level, event, fields)."""

    def __init__(self, driver: Driver, pool: Pool, *, credential_of: Callable[[AgentId], bytes], say: Sayer) -> None:
        self.tasks = Tasks()
        self.changed = trio.Event()
        """Set, and replaced, when the state of a task changes."""
        self.keep: Callable[[str], None] = lambda task_id: None
        """Told of each task whose state changed."""
        self._driver = driver
        self._pool = pool
        self._credential_of = credential_of
        self._say = say
        self._scopes: dict[tuple[str, int], trio.CancelScope] = {}
        self._unheard: dict[AgentId, Begin] = {}
        """Orders that their agents have not reported on yet."""
        self._nursery: trio.Nursery | None = None
        self._wake = trio.Event()

    # ------------------------------------------------------------ asking

    def restore(self, kept: Iterable[TaskRestored]) -> None:
        """Tasks of a former run, the oldest first; before anything is asked."""
        for task in kept:
            self._apply(task)

    async def ask(self, whats: Sequence[What], *, kept: bool) -> list[str]:
        """Have all of this done; the tasks that do it, in order. Raises RemoteError, before anything is begun."""
        for what in whats:
            _ = what.keys  # names are checked before the first is asked for
        made: list[str] = []
        with trio.CancelScope(shield=True):  # who leaves meanwhile still leaves all of them
            for number, what in enumerate(whats, 1):
                effects = self._apply(Asked(task_id=clock.new_request_id(), what=what, kept=kept, now_unix=clock.unix_ms()))
                made += [effect.task_id for effect in effects if isinstance(effect, Joined)]
                if number % AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
        self._wake.set()
        return made

    def leave(self, task_ids: Sequence[str]) -> None:
        """Who asked for them, without having them kept, is not there any more."""
        for task_id in task_ids:
            self._apply(WatcherLeft(task_id=task_id, now_unix=clock.unix_ms()))

    def cancel(self, task_id: str, why: str) -> None:
        """Stop a task."""
        self._apply(Cancelled(task_id=task_id, why=why, now_unix=clock.unix_ms()))

    def views(self, task_ids: Sequence[str]) -> list[TaskView]:
        """How they stand."""
        return [view for task_id in task_ids if (view := self.tasks.get(task_id)) is not None]

    async def finished(self, task_ids: Sequence[str]) -> list[TaskView]:
        """Wait until all of them are over."""
        while True:
            changed, views = self.changed, self.views(task_ids)
            if all(view.status in FINISHED for view in views):
                return views
            await changed.wait()

    async def listed(self, agent_ids: Sequence[AgentId], key: ModelKey, *, present: bool = True) -> None:
        """Wait until the router knows that these nodes hold the model (or do not), `LISTED_WITHIN_S` at most."""
        with trio.move_on_after(LISTED_WITHIN_S):
            while not all(self._holds(agent_id, key) is present for agent_id in agent_ids):  # noqa: ASYNC110  (the core has no events)
                await trio.sleep(0.02)

    def _holds(self, agent_id: AgentId, key: ModelKey) -> bool:
        agent = self._driver.router.agent(agent_id)
        return agent is not None and row_of(agent.installed, key) is not None

    def ollama(self, agent: AgentView) -> NodeOllama:
        """The Ollama of a node, through its gateway where there is one."""
        extra = [(CREDENTIAL_HEADER, self._credential_of(agent.id))] if agent.upstream.gateway else []
        return NodeOllama(self._pool, agent.upstream, extra=extra)

    async def unload(self, model: str) -> str:
        """Have every node unload `model` where several have it in memory; what went wrong, "" when nothing did. A request to unload is
        forwarded to one node as any other is, which is enough when no other node has the model."""
        key = key_or_none(model)
        nodes = self._driver.router.inventories()
        loaded = [node.agent_id for node in nodes if node.ready and key is not None and row_of(node.loaded, key) is not None]
        if len(loaded) < 2:
            return ""
        wrong: list[str] = []

        async def one(agent: AgentView) -> None:
            done = Done(error="the node did not answer in time")
            with trio.move_on_after(UNLOAD_LIMIT_S):
                done = await self.ollama(agent).unload(model)
            if done.error is not None and done.status != 404:
                wrong.append(f"{agent.name}: {done.error}")

        async with trio.open_nursery() as nursery:
            for agent_id in loaded:
                if (agent := self._driver.router.agent(agent_id)) is not None:
                    nursery.start_soon(one, agent)
        return "; ".join(sorted(wrong))

    # ------------------------------------------------------------ agents

    def orders(self, agent_id: AgentId) -> list[PullOrder]:
        """What an agent should be pulling, for the answer to its heartbeat."""
        begun = self.tasks.on(agent_id)
        if begun is None or begun.what.kind is not Kind.PULL or (begun.task_id, begun.attempt) in self._scopes:
            return []
        return [_order(begun)]

    def report(self, agent_id: AgentId, reports: Sequence[PullReport]) -> list[str]:
        """An agent tells how its downloads stand. Returns the tasks that are not to go on."""
        stop: list[str] = []
        for report in reports:
            view = self.tasks.get(report.task_id)
            if view is None or view.agent_id != agent_id:
                stop += [] if report.over else [report.task_id]
                continue
            self._unheard.pop(agent_id, None)
            said = Progressed(
                task_id=report.task_id,
                attempt=report.attempt,
                phase=report.phase,
                layers=tuple(report.layers),
                now_unix=clock.unix_ms(),
            )
            self._apply(said)
            if report.over:
                self._over(report.task_id, report.attempt, Done(error=report.error, lost=report.lost))
            elif view.status in FINISHED or view.attempts != report.attempt:
                stop.append(report.task_id)
        return stop

    # ------------------------------------------------------------ the loop

    async def run(self) -> None:
        """Keep tasks going until cancelled."""
        async with trio.open_nursery() as self._nursery:
            while True:
                self._wake = trio.Event()
                await self._look()
                with trio.move_on_after(LOOK_S if self.tasks.unfinished else IDLE_LOOK_S):
                    await self._wake.wait()

    async def _look(self) -> None:
        if not self.tasks.unfinished:
            return
        nodes = self._driver.router.inventories()
        ready = frozenset(node.agent_id for node in nodes if node.ready)
        seen = NodesSeen(known=frozenset(node.agent_id for node in nodes), ready=ready, now_unix=clock.unix_ms())
        effects = self.tasks.handle(seen, now=self._driver.now())
        effects += self.tasks.tick(now=self._driver.now(), now_unix=clock.unix_ms())
        for at in range(0, len(effects), AT_ONCE):
            self._carry_out(effects[at : at + AT_ONCE])
            await trio.lowlevel.checkpoint()
        for begun in list(self._unheard.values()):
            if self.tasks.on(begun.what.agent_id) != begun:
                del self._unheard[begun.what.agent_id]

    def _apply(self, event: Event) -> list[Effect]:
        effects = self.tasks.handle(event, now=self._driver.now())
        self._carry_out(effects)
        return effects

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Begin():
                    self._begin(effect)
                case Abort():
                    self._abort(effect)
                case Changed(task_id=task_id):
                    self.keep(task_id)
                    self.changed.set()
                    self.changed = trio.Event()
                case Note(level=level, event=event, fields=fields):
                    self._say(level, event, fields)
                case Joined():
                    pass

    # ------------------------------------------------------------ the work

    def _begin(self, begun: Begin) -> None:
        if self.tasks.on(begun.what.agent_id) != begun:  # cancelled before its turn came
            self._over(begun.task_id, begun.attempt, Done(error="cancelled"))
            return
        agent = self._driver.router.agent(begun.what.agent_id)
        if agent is None or self._nursery is None:
            self._over(begun.task_id, begun.attempt, Done(error="the node is not there", lost=True))
            return
        if agent.upstream.gateway and begun.what.kind is Kind.PULL:
            self._unheard[agent.id] = begun
            self._nursery.start_soon(self._order, agent, begun)
            return
        scope = self._scopes[begun.task_id, begun.attempt] = trio.CancelScope()
        self._nursery.start_soon(self._work, agent, begun, scope)

    def _abort(self, abort: Abort) -> None:
        scope = self._scopes.get((abort.task_id, abort.attempt))
        agent = self._driver.router.agent(abort.agent_id)
        if scope is not None:
            scope.cancel()
        elif agent is not None and self._nursery is not None:
            self._nursery.start_soon(self._stop_at_agent, agent, abort.task_id)

    async def _order(self, agent: AgentView, begun: Begin) -> None:
        """Tell an agent what to pull. One that cannot be dialled hears it with its next heartbeat; an older one is done without."""
        try:
            with trio.move_on_after(LEASE_S / 2):
                status = await self.ollama(agent).order("POST", "/pull", _order(begun))
                if status in (404, 405, 501) and self.tasks.on(agent.id) == begun:
                    self._unheard.pop(agent.id, None)
                    scope = self._scopes[begun.task_id, begun.attempt] = trio.CancelScope()
                    assert self._nursery is not None
                    self._nursery.start_soon(self._work, agent, begun, scope)
        except (DialFailed, UpstreamCut):
            pass

    async def _stop_at_agent(self, agent: AgentView, task_id: str) -> None:
        """Its next report is answered with the same; this is only sooner."""
        try:
            with trio.move_on_after(LEASE_S / 2):
                await self.ollama(agent).order("DELETE", f"/pull/{task_id}", None)
        except (DialFailed, UpstreamCut):
            pass

    async def _work(self, agent: AgentView, begun: Begin, scope: trio.CancelScope) -> None:
        """One attempt on a node from here."""
        key = (begun.task_id, begun.attempt)
        done = Done(error="stopped")
        try:
            async with trio.open_nursery() as nursery:
                with scope:
                    nursery.start_soon(self._stay_alive, begun)
                    try:
                        done = await self._do(self.ollama(agent), begun)
                    except Exception as problem:  # a fault of ours must not end the coordinator
                        self._say("error", "a task failed unexpectedly", {"task_id": begun.task_id, "exc_info": problem})
                        done = Done(error="the router failed on this task; its log says more")
                    if done.rows is not None:
                        polled = NodePolled(agent_id=agent.id, installed=done.rows, alive=False, now_unix=clock.unix_ms())
                        self._driver.apply(polled)
                nursery.cancel_scope.cancel()
        finally:
            del self._scopes[key]
        self._over(begun.task_id, begun.attempt, done)

    async def _do(self, ollama: NodeOllama, begun: Begin) -> Done:
        what = begun.what
        if what.kind is Kind.DELETE:
            return await ollama.delete(what.model)
        if what.kind is Kind.COPY:
            return await ollama.copy(what.model, what.destination)

        def tell(phase: str, layers: tuple[Layer, ...]) -> None:
            said = Progressed(task_id=begun.task_id, attempt=begun.attempt, phase=phase, layers=layers, now_unix=clock.unix_ms())
            self._apply(said)

        return await ollama.pull(what.model, insecure=what.insecure, tell=tell)

    async def _stay_alive(self, begun: Begin) -> None:
        """The work may be silent for long; that it is done here is sign enough."""
        while True:
            self._apply(Progressed(task_id=begun.task_id, attempt=begun.attempt, now_unix=clock.unix_ms()))
            await trio.sleep(LEASE_S / 4)

    def _over(self, task_id: str, attempt: int, done: Done) -> None:
        over = AttemptOver(task_id=task_id, attempt=attempt, error=done.error, lost=done.lost, now_unix=clock.unix_ms())
        self._apply(over)


def _order(begun: Begin) -> PullOrder:
    return PullOrder(task_id=begun.task_id, attempt=begun.attempt, model=begun.what.model, insecure=begun.what.insecure)


def task_json(task: TaskView, names: dict[AgentId, str]) -> dict[str, Any]:
    """A task as contract 5 shows it."""
    shown = msgspec.structs.asdict(task)
    shown["agent_name"] = names.get(task.agent_id)
    shown["created_at"] = clock.rfc3339(task.created_at)
    shown["updated_at"] = clock.rfc3339(task.updated_at)
    return shown
