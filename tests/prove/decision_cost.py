"""`python -m tests.prove.decision_cost`: what one decision costs, from the look over the candidates to the choice.

The router is the real one. Each node has 20 models on its disk and three in memory, and four slots; half as many requests are in flight as
there are nodes. The figures are processor time.
"""

import statistics
import sys
import time
from collections.abc import Sequence

import msgspec

from core.config import RouterConfig
from core.events import BackendAdded, Effect, NodePolled, RequestCame, Route, Upstream
from core.requests import begin
from core.router import Router
from core.scoring import Ask
from core.units import AgentId, Instant, RequestId, UnixMs

MODELS = 20
LOADED = 3
SLOTS = 4
ROUNDS = 5
BARS_US = {10: 20.0, 1000: 100.0}
"""Nodes: the most that a decision may cost for a model that is in memory. Others come before a load of seconds, and are rare."""


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """µs of a decision among so many nodes: for a model that some node has in memory, and for one that none has."""

    nodes: int
    warm_us: float
    cold_us: float


def _row(model: int) -> dict[str, object]:
    return {"name": f"model{model}", "size": (2 + model) * 10**9, "digest": f"digest{model}"}


def fleet(nodes: int) -> Router:
    """So many nodes at work. The last model is in nobody's memory."""
    router = Router(RouterConfig(queue_max=10**6, queue_per_client=10**6), now=Instant(0.0))
    for index in range(nodes):
        agent_id = AgentId(f"node{index}")
        upstream = Upstream(host=f"10.0.{index // 250}.{index % 250}", port=11434)
        router.handle(
            BackendAdded(agent_id=agent_id, name=agent_id, upstream=upstream, slots=SLOTS, now_unix=UnixMs(index)), now=Instant(2.0)
        )
        installed = [_row(model) for model in range(MODELS)]
        loaded = [installed[(index + offset) % (MODELS - 1)] for offset in range(LOADED)]
        poll = NodePolled(agent_id=agent_id, alive=True, now_unix=UnixMs(index), installed=installed, loaded=loaded)
        router.handle(poll, now=Instant(2.0))
    for number in range(nodes // 2):
        _ask(router, f"busy{number}", number % (MODELS - 1), at=3.0 + number / 1e6)
    return router


def _ask(router: Router, request_id: str, model: int, *, at: float) -> list[Effect]:
    came = RequestCame(request_id=RequestId(request_id), route=Route.CHAT, model=f"model{model}", client="c", stream=True, input_tokens=500)
    return router.handle(came, now=Instant(at))


def cost(nodes: int) -> Cost:
    """Of a decision among so many."""
    router = fleet(nodes)
    dispatcher = router._dispatcher
    now = Instant(router._now + 1.0)
    found: dict[bool, list[float]] = {True: [], False: []}
    for model in range(MODELS):
        key = next(key for key in dispatcher._registry.get(AgentId("node0")).inventory.installed if f"model{model}:" in key)  # type: ignore[union-attr]
        came = RequestCame(request_id=RequestId("one"), route=Route.CHAT, model=f"model{model}", client="c", stream=True, input_tokens=500)
        request = begin(came, key, Ask(key, "", 500, 200, True), number=0, now=now)
        times = []
        for turn in range(ROUNDS + 1):
            began = time.process_time_ns()
            repeats = max(1, 2000 // nodes)
            for again in range(repeats):
                instant = Instant(now + model + (turn * repeats + again) / 1e6)  # a new instant each time, as in life
                candidates = dispatcher._candidates(request, now=instant)
                choice = dispatcher._choose(request, candidates, dispatcher._planned, now=instant)
                dispatcher.obstacles.of(request, choice, now=instant)
            times.append((time.process_time_ns() - began) / 1000 / repeats)
        found[model < MODELS - 1].append(min(times[1:]))
    return Cost(nodes=nodes, warm_us=statistics.median(found[True]), cold_us=statistics.median(found[False]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when a bar is missed."""
    status = 0
    for nodes in (10, 100, 1000):
        of = cost(nodes)
        bar = BARS_US.get(nodes)
        missed = bar is not None and of.warm_us > bar
        status |= missed
        print(
            f"{'MISSED: ' if missed else ''}{nodes} nodes, {MODELS} models: {of.warm_us:.1f} µs for a model in memory"
            f"{'' if bar is None else f' (at most {bar:g})'}, {of.cold_us:.1f} µs for one that is not"
        )
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
