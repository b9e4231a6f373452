"""Known-bad variants of the router: each breaks one promise, as a plausible slip would. The simulator must catch them all.

A mutant is a function that spoils a fresh `Router`. `MUTANTS` says which promises' checks may catch it: being caught for another reason
would mean that the oracle does not see what it is there for.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from core.config import RouterConfig
from core.events import Count, Effect, Event, FirstByte, Forward, PassOn, Record, Refuse, Registered, RequestCame, Wait
from core.lifecycle import AgentState
from core.queue import FairQueue, Place
from core.requests import Phase
from core.router import Router
from core.units import NEVER, Instant
from tests.core.routing import instead

Spoil = Callable[[Router], None]


def maker(spoil: Spoil) -> Callable[..., Router]:
    """What a world takes as `make_router`."""

    def make(config: RouterConfig, *, now: Instant) -> Router:
        router = Router(config, now=now)
        spoil(router)
        return router

    return make


def _replace(router: Any, handle: Callable[[Callable[..., list[Effect]], Event, Instant], list[Effect]]) -> None:
    """Put `handle(real, event, now)` in the place of the router's own."""
    real = router.handle
    instead(router, "handle", lambda event, *, now: handle(real, event, now))


def _forget_clock(router: Any, clock: Any) -> None:
    """The router never wakes for what is due of this."""
    router._clocks = tuple(SimpleNamespace(earliest=NEVER) if other is clock else other for other in router._clocks)


def leaks_the_lease_of_a_client_that_left(router: Any) -> None:
    real = router._dispatcher.release

    def release(request: Any, effects: list[Effect], now: Instant) -> None:
        if request.phase is not Phase.TRYING or request.failed is not None:
            real(request, effects, now=now)

    instead(router._dispatcher, "release", release)


def believes_old_heartbeats(router: Any) -> None:
    real = router._registry.heartbeat

    def heartbeat(event: Any, *, beyond: int, now: Instant) -> list[Effect]:
        agent = router._registry.get(event.heartbeat.agent_id)
        if agent is not None:
            agent.last_report, agent.boot = (0, -1), 0
        return real(event, beyond=beyond, now=now)  # type: ignore[no-any-return]

    instead(router._registry, "heartbeat", heartbeat)


def tries_again_after_the_first_byte(router: Any) -> None:
    def handle(real: Any, event: Event, now: Instant) -> list[Effect]:
        effects: list[Effect] = real(event, now=now)
        if isinstance(event, FirstByte) and (request := router._requests.get(event.request_id)) is not None:
            router._dispatcher.release(request, effects, now=now)
            router._dispatcher.place(request, effects, now=now)
        return effects

    _replace(router, handle)


def forgets_the_queue_when_it_sets_its_timer(router: Any) -> None:
    _forget_clock(router, router._queue)
    instead(router._queue, "due", lambda *, now: [])


def forgets_silent_agents_when_it_sets_its_timer(router: Any) -> None:
    _forget_clock(router, router._registry.deadlines)
    instead(router._registry, "expire", lambda *, now: [])


def breaks_ties_by_the_first(router: Any) -> None:
    real = router._dispatcher._forward

    def forward(request: Any, choice: Any, effects: list[Effect], now: Instant) -> None:
        real(request, choice, effects, now=now)
        choice.agent.takes(choice.agent.in_flight, 0)

    instead(router._dispatcher, "_forward", forward)


def records_twice(router: Any) -> None:
    def handle(real: Any, event: Event, now: Instant) -> list[Effect]:
        effects: list[Effect] = real(event, now=now)
        return effects + [effect for effect in effects if isinstance(effect, Record)]

    _replace(router, handle)


def does_not_look_when_a_slot_gets_free(router: Any) -> None:
    real = router._dispatcher.look
    instead(
        router._dispatcher, "look", lambda effects, *, now: None if effects and isinstance(effects[-1], Count) else real(effects, now=now)
    )


def has_no_budget_of_retries(router: Any) -> None:
    real = router._attempt_ended

    def attempt_ended(event: Any, effects: list[Effect], now: Instant) -> None:
        if (request := router._requests.get(event.request_id)) is not None:
            request.spent = -9
        real(event, effects, now)

    router._handlers[next(kind for kind in router._handlers if kind.__name__ == "AttemptEnded")] = attempt_ended


def forgets_whom_it_tried(router: Any) -> None:
    real = router._dispatcher.place

    def place(request: Any, effects: list[Effect], now: Instant) -> None:
        request.tried.clear()
        request.busy.clear()
        real(request, effects, now=now)

    instead(router._dispatcher, "place", place)


def sends_to_whom_it_drains(router: Any) -> None:
    registry = router._registry
    instead(registry, "ready", lambda: tuple(agent for agent in registry.all() if agent.state in (AgentState.READY, AgentState.DRAINING)))
    instead(registry, "holders", lambda key: tuple(agent for agent in registry.ready() if agent.holds(key)))


def sends_to_strangers(router: Any) -> None:
    registry = router._registry
    instead(registry, "ready", lambda: tuple(agent for agent in registry.all() if agent.state in (AgentState.READY, AgentState.PENDING)))


def sends_to_anybody_when_a_model_is_new(router: Any) -> None:
    instead(router._registry, "holders", lambda key: router._registry.ready())
    instead(router._dispatcher, "_begin_load", lambda request, agent, key, effects, *, now: None)
    instead(router._dispatcher._strategy, "choose", _first_of(router))


def _first_of(router: Any) -> Any:
    from core.scoring import Choice

    return lambda ask, nodes, load, *, now: Choice(nodes[0], room=True, rows=[])


def admits_one_too_many(router: Any) -> None:
    class Wide(FairQueue):
        __slots__ = ()

        @property
        def full(self) -> bool:
            return len(self) > self._max

        def client_full(self, client: str) -> bool:
            return self._clients.get(client, 0) > self._per_client

    router._queue.__class__ = Wide


def serves_the_last_one_first(router: Any) -> None:
    real = router._queue.new_place

    def new_place(client: str, *, cost: Any, number: int, burst: int = 0) -> Place:
        place: Place = real(client, cost=cost, number=number)
        return Place(-number, -place.number)

    instead(router._queue, "new_place", new_place)


def never_ends_a_lease(router: Any) -> None:
    instead(router._ledger, "expire", lambda *, now: [])
    _forget_clock(router, router._ledger.deadlines)


def gives_up_leases_too_early(router: Any) -> None:
    router._ledger._expiry.ttl_s = router._config.pulse_s / 3


def does_not_cut_what_runs_on_the_lost(router: Any) -> None:
    def drop(effects: list[Effect]) -> list[Effect]:
        return [effect for effect in effects if type(effect).__name__ != "Cut"]

    _replace(router, lambda real, event, now: drop(real(event, now=now)))
    tick = router.tick
    instead(router, "tick", lambda *, now: drop(tick(now=now)))


def forgets_caps(router: Any) -> None:
    real = router._registry.settings

    def settings(event: Any) -> list[Effect]:
        effects: list[Effect] = real(event)
        if (agent := router._registry.get(event.agent_id)) is not None:
            agent.max_concurrent = None
        return effects

    router._handlers[next(kind for kind in router._handlers if kind.__name__ == "SettingsChanged")] = lambda event, effects, now: (
        effects.extend(settings(event))
    )


def ticks_twice(router: Any) -> None:
    real = router.tick
    instead(router, "tick", lambda *, now: real(now=now) or [Count(name="ticks_total")])


def says_nothing_when_the_queue_is_full(router: Any) -> None:
    def handle(real: Any, event: Event, now: Instant) -> list[Effect]:
        effects: list[Effect] = real(event, now=now)
        if isinstance(event, RequestCame):
            return [effect for effect in effects if not (isinstance(effect, Refuse) and effect.status == 429)]
        return effects

    _replace(router, handle)


def answers_twice(router: Any) -> None:
    def handle(real: Any, event: Event, now: Instant) -> list[Effect]:
        effects: list[Effect] = real(event, now=now)
        for effect in effects:
            if isinstance(effect, Forward) and effect.lease.attempt > 1:
                return [*effects, PassOn(request_id=effect.request_id)]
        return effects

    _replace(router, handle)


def drains_for_ever(router: Any) -> None:
    instead(router._registry, "emptied", lambda agent: [])


def makes_room_for_those_who_left(router: Any) -> None:
    instead(router._dispatcher.obstacles, "clear", router._dispatcher.obstacles.alarm.clear)


def invents_agents(router: Any) -> None:
    def handle(real: Any, event: Event, now: Instant) -> list[Effect]:
        effects: list[Effect] = real(event, now=now)
        return [Registered(agent_id=f"{e.agent_id}-x", status=e.status) if isinstance(e, Registered) else e for e in effects]  # type: ignore[arg-type]

    _replace(router, handle)


def loses_who_waits(router: Any) -> None:
    """Shows a shorter line than there is."""
    real = router.waiting
    instead(router, "waiting", lambda: real()[:-1])


def lets_wait_without_end(router: Any) -> None:
    """Who comes back gets all its time anew, again and again; and nobody is sent away."""
    instead(
        router._dispatcher,
        "time_out",
        lambda request, effects, *, now: (
            router._queue.remove(request.id),
            router._queue.push(request.id, request.client, Place(0, request.number), deadline=Instant(now + 60.0)),
            effects.append(Wait(request_id=request.id, position=1, why="still")),
        ),
    )


MUTANTS: dict[Spoil, tuple[str, ...]] = {
    leaks_the_lease_of_a_client_that_left: ("R7",),
    believes_old_heartbeats: ("R6",),
    tries_again_after_the_first_byte: ("R4", "R14"),
    forgets_the_queue_when_it_sets_its_timer: ("R11",),
    forgets_silent_agents_when_it_sets_its_timer: ("R5", "L1", "L3"),
    breaks_ties_by_the_first: ("L4",),
    records_twice: ("R2",),
    does_not_look_when_a_slot_gets_free: ("R11", "R12", "L1", "L5"),
    has_no_budget_of_retries: ("R3",),
    forgets_whom_it_tried: ("R3",),
    sends_to_whom_it_drains: ("R5",),
    sends_to_strangers: ("R5",),
    sends_to_anybody_when_a_model_is_new: ("R5",),
    admits_one_too_many: ("R11",),
    serves_the_last_one_first: ("R11",),
    never_ends_a_lease: ("R8", "R13", "L1", "L2"),
    gives_up_leases_too_early: ("R2", "R14"),
    does_not_cut_what_runs_on_the_lost: ("L1",),
    forgets_caps: ("R5",),
    ticks_twice: ("R13",),
    says_nothing_when_the_queue_is_full: ("R1",),
    answers_twice: ("R14",),
    drains_for_ever: ("R15",),
    makes_room_for_those_who_left: ("R11", "R12", "L1", "L5"),
    invents_agents: ("R14",),
    loses_who_waits: ("R1",),
    lets_wait_without_end: ("R11",),
}
