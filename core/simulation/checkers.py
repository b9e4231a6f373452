"""The numbered promises of the router, watched from outside.

Decides whether what the router answered may be; fed with events, effects and deliveries, and now and then with what the router shows of
itself, never with what it keeps inside. A broken promise is a `Violation` that begins with its number. What each number means:

R1   Every request that came waits, has a lease, was told its end, or is settled: never two of them, never none.
R2   Each request is settled once, and recorded once.
R3   Failures that may have cost work are followed by `retries_budgeted` tries at most; nobody is tried twice while another could be
     (who said 503 may be asked again after a wait).
R4   After the first byte there is no other attempt.
R5   Nobody is sent to an agent that is silent, out, pending, ill, without the model, or at its cap.
R6   A message older than what was taken already changes nothing. M3: nor does a copy.
R7   Leases per agent are what the router shows as in flight.
R8   A lease ends at the latest `lease_ttl_s` after it was renewed last.
R11  The waiting line is bounded for those who come, a wait ends in time, and nobody who was never tried is overtaken by a later
     request of the same client for the same (under `auto` only where one node alone holds the model: with more, the later one may rightly
     go elsewhere).
R12  Nobody waits while nothing runs on any node that holds the model (waiting for a fast one beside an idle slow one is a choice).
R13  After a tick the next deadline lies ahead, and a second tick at the same instant has nothing to do.
R14  Each effect names somebody known and is an answer that was due; each agent's call is answered once.
R15  An agent that was drained gets nothing new, and is held once nothing is in flight on it.
R16  Leases of clients that left end with the call that said so (their machines are the world's to check).
"""

import enum
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from core.config import RouterConfig
from core.events import (
    Accepted,
    AgentCommanded,
    AgentRegistered,
    AttemptEnded,
    Cut,
    Declined,
    Effect,
    Event,
    Failure,
    FirstByte,
    Forward,
    HeartbeatCame,
    MetricsCame,
    PassOn,
    Probe,
    Pulse,
    Record,
    Refuse,
    Registered,
    RequestCame,
    RequestEffect,
    SettingsChanged,
    Settled,
    Wait,
)  # fmt: skip
from core.names import key_or_none
from core.router import Router
from core.simulation.checkers_agents import GRACE_S, AgentBook
from core.units import AgentId, Instant, ModelKey, RequestId

IDLE_S: Final = 2.0
"""How long somebody may wait while all is idle (R12): a decision, not a hiccup."""


class Violation(Exception):
    """A promise was broken. `invariant` is its number."""

    def __init__(self, invariant: str, text: str) -> None:
        super().__init__(f"{invariant}: {text}")
        self.invariant = invariant


class Stand(enum.Enum):
    """Where a request stands."""

    NEW = "new"
    WAITING = "waiting"
    LEASED = "leased"
    BETWEEN = "between attempts"
    TOLD = "told its end"


class Request(msgspec.Struct, gc=False):
    """One request as the events and effects show it."""

    came: RequestCame
    key: ModelKey | None
    stand: Stand = Stand.NEW
    agent: AgentId | None = None
    renewed_at: float = 0.0
    waiting_since: float = 0.0
    first: bool = False
    again: bool = False
    """It was cut for a reason that does not keep it away from that node."""
    attempts: int = 0
    costly: int = 0
    tried: tuple[AgentId, ...] = ()
    busy: tuple[AgentId, ...] = ()
    """Who said 503 since it waited last: after that wait their chances are as good as anybody's."""


class Checkers:
    """A `Witness` of one world. `every`: how many calls lie between two looks at what the router shows (R1, R7, R12, R15)."""

    def __init__(self, config: RouterConfig, *, every: int = 8, invariants: Callable[..., None] | None = None) -> None:
        self._config = config
        self._every = every
        self._invariants = invariants
        self._calls = 0
        self.requests: dict[RequestId, Request] = {}
        self._waiting: dict[str, dict[RequestId, Request]] = {}
        self._waiting_count = 0
        self.settled = 0
        self.records: list[Record] = []
        self._idle_since: Instant | None = None
        self._may_be_named: tuple[AgentId, ...] = ()
        """Whom the answer to a registration may name."""
        self.last_agent: AgentId | None = None
        """Who was given the last request."""

    # ------------------------------------------------------------ the witness

    def started(self, router: Router, *, now: Instant) -> None:
        """A new coordinator knows nobody."""
        config = self._config
        self._router = router
        self.requests.clear()
        self._waiting.clear()
        self._waiting_count = 0
        self._idle_since = None
        self.book = AgentBook(timeout_s=config.agent_timeout_s, calm_s=config.eject_max_s + config.busy_pause_max_s)

    def before(self, event: Event | None, *, now: Instant) -> None:
        """Remember what must not change (R6), and whether a deadline comes into force first."""
        due = self._router.next_deadline()
        self._overdue = due is not None and due <= now
        self._stale = None
        if isinstance(event, AgentRegistered):
            self._may_be_named = (*self.book.agents, event.new_id)
        if isinstance(event, HeartbeatCame) and not self._overdue and (stale := self.book.stale(event)) is not None:
            self._stale = (stale, self._shown(stale), self._router.statistics())

    def after(self, event: Event | None, effects: Sequence[Effect], *, now: Instant) -> None:
        """Judge one call of the router."""
        self._calls += 1
        early = self._before_it(event, effects) if self._overdue else ()
        for effect in early:
            self._judge(effect, None, now)
        if isinstance(event, HeartbeatCame) and self.book.stale(event) is None:
            self._renewed_by(event, now)
        self.book.take(event, effects, now=now)
        self._take(event, now)
        for effect in effects:
            if effect not in early:
                self._judge(effect, event, now)
        self._must_be_answered(event, effects)
        if event is None:
            self._timer_laws(now)
        elif isinstance(event, Pulse):
            self._leases_in_time(now)
        if self._stale is not None:
            self._nothing_changed(event, effects)
        if self._calls % self._every == 0:
            self.look(now=now)
            if self._invariants is not None:
                try:
                    self._invariants(self._router, now=now)
                except AssertionError as error:
                    raise Violation("inside", str(error)) from error

    def _before_it(self, event: Event | None, effects: Sequence[Effect]) -> Sequence[Effect]:
        """What a deadline that had passed did to the request that the event is about, before the event was looked at."""
        match event:
            case Settled(request_id=request_id):  # which ends with nothing but its record
                return [effect for effect in effects if isinstance(effect, RequestEffect) and effect.request_id == request_id]
            case AttemptEnded(request_id=request_id) | FirstByte(request_id=request_id):  # it was on a node: all that can befall it
                return [effect for effect in effects if isinstance(effect, Cut) and effect.request_id == request_id]
            case _:
                return ()

    # ------------------------------------------------------------ what happened

    def _take(self, event: Event | None, now: Instant) -> None:
        match event:
            case RequestCame(request_id=request_id):
                self.requests[request_id] = Request(event, key_or_none(event.model) if event.model is not None else None)
            case FirstByte(request_id=request_id):
                if (request := self.requests.get(request_id)) is not None and request.agent is not None:
                    request.first, request.renewed_at = True, now
            case AttemptEnded():
                self._attempt_ended(event, now)
            case Settled(request_id=request_id):
                request = self.requests.get(request_id)
                if request is not None and request.agent is not None and event.node_fault is not None:
                    self.book.trouble(request.agent, now=now)
                self._gone(request_id)
            case Pulse(requests=requests):
                for request_id in requests:
                    if (request := self.requests.get(request_id)) is not None:
                        request.renewed_at = now
            case _:
                pass

    def _renewed_by(self, event: HeartbeatCame, now: Instant) -> None:
        """A gateway says what it works on: leases on that node live on, whoever forgot them."""
        for request_id in event.heartbeat.in_flight or ():
            request = self.requests.get(RequestId(request_id))
            if request is not None and request.agent == event.heartbeat.agent_id:
                request.renewed_at = now

    def _attempt_ended(self, event: AttemptEnded, now: Instant) -> None:
        request = self.requests.get(event.request_id)
        if request is None or request.stand is not Stand.LEASED or request.agent is None:
            return
        if event.failure in _COSTLY or (event.failure is Failure.ANSWERED and event.status == 500):
            request.costly += 1
        if (event.failure is Failure.ANSWERED and event.status == 503) or (event.failure is Failure.VANISHED and request.again):
            request.busy = (*request.busy, request.agent)
        else:
            request.tried = (*request.tried, request.agent)
        self.book.trouble(request.agent, now=now)
        self._release(request)
        request.stand, request.again = Stand.BETWEEN, False

    def _release(self, request: Request) -> None:
        if request.agent is not None:
            if (agent := self.book.agents.get(request.agent)) is not None:
                agent.leases -= 1
            request.agent = None

    def _stand(self, request: Request, stand: Stand, now: Instant) -> None:
        """Move a request; keeps the waiting line."""
        if request.stand is not Stand.WAITING and stand is Stand.WAITING:
            self._waiting.setdefault(request.came.client, {})[request.came.request_id] = request
            self._waiting_count += 1
            request.waiting_since, request.busy = now, ()
        elif request.stand is Stand.WAITING and stand is not Stand.WAITING:
            line = self._waiting[request.came.client]
            del line[request.came.request_id]
            if not line:
                del self._waiting[request.came.client]
            self._waiting_count -= 1
        request.stand = stand

    def _gone(self, request_id: RequestId) -> None:
        request = self.requests.pop(request_id, None)
        if request is not None:
            self._release(request)
            self._stand(request, Stand.TOLD, Instant(0.0))

    # ------------------------------------------------------------ what the router did about it

    def _judge(self, effect: Effect, event: Event | None, now: Instant) -> None:
        match effect:
            case Forward():
                self._forward(effect, now)
            case Wait(request_id=request_id):
                request = self._named(effect, request_id, Stand.NEW, Stand.BETWEEN, Stand.WAITING)
                _demand(not request.first, "R4", f"{request_id} is to wait after its first byte")
                new = request.stand is Stand.NEW
                self._stand(request, Stand.WAITING, now)
                if new:  # one that comes back is always let in
                    self._line_bounded(request)
            case Refuse(request_id=request_id) | PassOn(request_id=request_id):
                request = self._named(effect, request_id, Stand.NEW, Stand.BETWEEN, Stand.WAITING)
                _demand(not request.first, "R4", f"{request_id} is given another answer after its first byte")
                _demand(isinstance(effect, Refuse) or request.attempts > 0, "R14", f"{request_id} has no node's answer to pass on")
                self._stand(request, Stand.TOLD, now)
            case Cut(request_id=request_id, again=again):
                self._named(effect, request_id, Stand.LEASED).again = again
            case Record():
                self._recorded(effect, event, now)
            case Registered(agent_id=agent_id):
                _demand(agent_id in self._may_be_named, "R14", f"{agent_id} was registered, an id that nobody made")
            case Accepted(agent_id=agent_id) | Probe(agent_id=agent_id):
                deleted = isinstance(event, AgentCommanded) and event.agent_id == agent_id
                _demand(deleted or agent_id in self.book.agents, "R14", f"{type(effect).__name__} names {agent_id}, whom nobody knows")
            case _:
                pass

    def _named(self, effect: Forward | Wait | Refuse | PassOn | Cut, request_id: RequestId, *due: Stand) -> Request:
        request = self.requests.get(request_id)
        what = type(effect).__name__
        if request is None:
            raise Violation("R14", f"{what} names {request_id}, which is not alive")
        _demand(request.stand in due, "R14", f"{what} for {request_id}, which is {request.stand.value}")
        return request

    def _forward(self, effect: Forward, now: Instant) -> None:
        lease = effect.lease
        request = self._named(effect, effect.request_id, Stand.NEW, Stand.BETWEEN, Stand.WAITING)
        name, agent_id = effect.request_id, lease.agent_id
        _demand(not request.first, "R4", f"{name} is sent to {agent_id} after its first byte")
        forbidden = self.book.forbids(agent_id, request.key, capped=request.came.route.runs_model and not request.came.unload, now=now)
        _demand(not forbidden, "R5", f"{name} is sent to {agent_id}, which {forbidden}")
        _demand(request.costly <= self._config.retries_budgeted, "R3", f"{name} is tried again after {request.costly} costly failures")
        if agent_id in request.tried or agent_id in request.busy:
            other = next((agent.id for agent in self.book.agents.values() if self._untried(agent.id, request, now)), None)
            _demand(other is None, "R3", f"{name} is sent to {agent_id} again while {other} was never tried")
        if not request.attempts:
            self._nobody_overtaken(request)
        self._stand(request, Stand.LEASED, now)
        request.attempts += 1
        _demand(lease.attempt == request.attempts, "R3", f"{name}: attempt {request.attempts} is called {lease.attempt}")
        request.agent, request.renewed_at = agent_id, now
        self.book.agents[agent_id].leases += 1
        self.last_agent = agent_id

    def _untried(self, agent_id: AgentId, request: Request, now: Instant) -> bool:
        return (
            agent_id not in request.tried
            and agent_id not in request.busy
            and self.book.certain(self.book.agents[agent_id], request.key, now=now)
        )

    def _nobody_overtaken(self, request: Request) -> None:
        line = self._waiting.get(request.came.client)
        if not line or not _ordinary(request) or (self._config.strategy == "auto" and len(self.book.holders(request.key)) > 1):
            return
        for other in line.values():
            if other is request:
                return
            if (
                other.key == request.key
                and other.came.runner_options == request.came.runner_options
                and not other.attempts
                and _ordinary(other)
            ):
                text = f"{request.came.request_id} overtakes {other.came.request_id} of {request.came.client}"
                raise Violation("R11", text)

    def _line_bounded(self, request: Request) -> None:
        config, line = self._config, self._waiting[request.came.client]
        _demand(self._waiting_count <= config.queue_max, "R11", f"{self._waiting_count} requests wait, {config.queue_max} may")
        most = config.queue_per_client
        _demand(len(line) <= most, "R11", f"{len(line)} requests of {request.came.client} wait, {most} may")

    def _recorded(self, record: Record, event: Event | None, now: Instant) -> None:
        if isinstance(event, Settled) and event.request_id == record.request_id:
            _demand(
                record.ending is event.ending, "R2", f"{record.request_id} ended {event.ending.value}, recorded as {record.ending.value}"
            )
        else:  # nobody renewed it
            request = self.requests.get(record.request_id)
            if request is None:
                raise Violation("R2", f"{record.request_id} is recorded, and is not alive")
            silent_s = now - max(request.renewed_at, request.waiting_since)
            _demand(silent_s >= self._config.pulse_s, "R2", f"{record.request_id} is given up {silent_s:.3f} s after its last sign")
            self._gone(record.request_id)
        self.settled += 1
        self.records.append(record)

    def _must_be_answered(self, event: Event | None, effects: Sequence[Effect]) -> None:
        match event:
            case RequestCame(request_id=request_id) | AttemptEnded(request_id=request_id):
                request = self.requests.get(request_id)
                if request is not None and request.stand in (Stand.NEW, Stand.BETWEEN):
                    raise Violation("R1", f"{request_id} was left {request.stand.value}, without an answer")
            case Settled(request_id=request_id):
                count = sum(isinstance(effect, Record) and effect.request_id == request_id for effect in effects)
                _demand(count == 1, "R2", f"{request_id} was settled and recorded {count} times")
            case AgentRegistered() | HeartbeatCame() | MetricsCame() | SettingsChanged() | AgentCommanded():
                count = sum(isinstance(effect, Registered | Accepted | Declined) for effect in effects)
                _demand(count == 1, "R14", f"{type(event).__name__} was answered {count} times")
            case _:
                pass

    # ------------------------------------------------------------ laws

    def _timer_laws(self, now: Instant) -> None:
        due = self._router.next_deadline()
        if due is not None and due <= now:
            raise Violation("R13", f"after a tick at {now:.6f} the next deadline is {due:.6f}")
        again = self._router.tick(now=now)
        _demand(not again, "R13", f"a second tick at {now:.6f} still finds {len(again)} things to do")

    def _leases_in_time(self, now: Instant) -> None:
        config = self._config
        for request in self.requests.values():
            name = request.came.request_id
            if request.stand is Stand.LEASED:
                age_s = now - request.renewed_at
                _demand(age_s <= config.lease_ttl_s + GRACE_S, "R8", f"the lease of {name} lives {age_s:.3f} s after its last renewal")
            elif request.stand is Stand.WAITING:
                waited_s = now - request.waiting_since
                _demand(waited_s <= config.queue_timeout_s + GRACE_S, "R11", f"{name} waits for {waited_s:.3f} s already")

    def _nothing_changed(self, event: Event | None, effects: Sequence[Effect]) -> None:
        assert self._stale is not None
        agent_id, view, statistics = self._stale
        told = [effect for effect in effects if isinstance(effect, Forward | Wait | Refuse | PassOn | Cut)]
        _demand(not told, "R6", f"an old message of {agent_id} caused {told}")
        _demand(self._shown(agent_id) == view, "R6", f"an old message of {agent_id} changed it")
        _demand(self._router.statistics() == statistics, "R6", f"an old message of {agent_id} changed what is in flight or waits")

    def _shown(self, agent_id: AgentId) -> object:
        """The agent as it is shown, without what only counts down."""
        view = self._router.agent(agent_id)
        if view is None:
            return None
        return msgspec.structs.replace(view, ejections=[msgspec.structs.replace(ejection, until_s=0.0) for ejection in view.ejections])

    # ------------------------------------------------------------ what it shows

    def look(self, *, now: Instant) -> None:
        """Compare with what the router shows of itself."""
        statistics = self._router.statistics()
        leases = {agent.id: agent.leases for agent in self.book.agents.values() if agent.leases}
        shown = {agent_id: count for agent_id, count in statistics.in_flight_by_agent.items() if count and agent_id in self.book.agents}
        _demand(leases == shown, "R7", f"in flight are {leases}, shown are {shown}")
        waiting = self._waiting_count
        _demand(statistics.waiting == waiting, "R1", f"{waiting} requests wait, shown are {statistics.waiting}")
        if waiting:
            listed = dict.fromkeys(view.request_id for view in self._router.waiting())
            lost = [name for line in self._waiting.values() for name in line if name not in listed]
            _demand(len(listed) == waiting and not lost, "R1", f"the waiting line leaves out {lost}")
            self._nobody_waits_for_nothing(now)
        else:
            self._idle_since = None
        for agent in self.book.agents.values():
            if agent.out and not agent.leases and not agent.pending:
                view = self._router.agent(agent.id)
                state = view.state if view is not None else "unknown"
                _demand(state in ("held", "offline"), "R15", f"{agent.id} was ordered out, has nothing in flight and is {state}")

    def _nobody_waits_for_nothing(self, now: Instant) -> None:
        found = None
        wanted = {request.key: request for line in self._waiting.values() for request in line.values() if _plain(request)}
        for key, request in wanted.items():
            holders = self.book.holders(key)
            if any(agent.leases or agent.reported for agent in holders):
                continue
            idle = next((agent.id for agent in holders if self.book.certain(agent, key, now=now)), None)
            if idle is not None:
                found = f"{request.came.request_id} waits for {key} while {idle} holds it, and nothing runs on any holder"
        if found is None:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        else:
            _demand(now - self._idle_since <= IDLE_S, "R12", found)


_COSTLY: Final = (Failure.DIED, Failure.EMPTY)


def _ordinary(request: Request) -> bool:
    return request.came.route.runs_model and not request.came.load_only


def _plain(request: Request) -> bool:
    return _ordinary(request) and not request.attempts and not request.came.runner_options and request.key is not None


def _demand(holds: bool, invariant: str, text: str) -> None:
    if not holds:
        raise Violation(invariant, text)
