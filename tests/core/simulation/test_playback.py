"""A dump that is played says whether the same comes of it."""

from typing import Any

import pytest

from core.dump import PLACEMENT, TICK, Dump, Step, frames, load
from core.events import Event, FirstByte
from core.router import Router
from core.simulation.playback import play, shorten
from core.snapshot import take
from core.units import Instant, RequestId
from tests.core.routing import World, instead


def recorded(*, requests: int = 3) -> Dump:
    """A few requests, as a coordinator would have recorded them."""
    world = World()
    world.backend("n", "m", loaded=("m",))
    start = take(world.router)
    steps: list[Step] = []
    handle = world.router.handle

    def record(event: Event, *, now: Instant) -> Any:
        try:
            effects = handle(event, now=now)
        except Exception:
            steps.append((now, event, None))
            raise
        steps.append((now, event, effects))
        return effects

    instead(world.router, "handle", record)
    for number in range(requests):
        world.ask(f"r{number}")
        world.first(f"r{number}")
        world.settle(f"r{number}")
    world.ask("twice")
    world.first("twice")
    with pytest.raises(Exception, match="cannot have a first byte"):
        world.do(FirstByte(request_id=RequestId("twice")))
    now = Instant(world.now + 1)
    world.router.placement()
    steps += [(now, PLACEMENT, []), (now, TICK, world.router.tick(now=now))]
    return load(b"".join(frames(start, steps, version="1", made_at="now")))


def test_the_same_comes_of_it() -> None:
    played = play(recorded())
    assert played.same
    assert (played.failure, played.difference) == ("", "")
    assert played.digest == played.recorded
    assert played.steps == 14


def test_other_effects_are_told_with_their_step() -> None:
    dump = recorded()
    at, what, _ = dump.steps[4]
    dump.steps[4] = (at, what, ["l", ["something else"]])
    played = play(dump)
    assert not played.same
    assert played.difference.startswith("step 5")
    assert "something else" in played.difference
    assert played.failure == ""


def test_what_raised_then_and_does_not_now_is_a_difference() -> None:
    dump = recorded()
    at, what, _ = dump.steps[0]
    dump.steps[0] = (at, what, None)
    assert "then: it raised" in play(dump).difference


def test_a_broken_invariant_is_told_and_the_dump_is_shortened_to_it() -> None:
    def at_most_two(router: Router, *, now: Instant) -> None:
        if router.statistics().requests_total >= 2:
            raise AssertionError("R99: two were settled")

    dump = recorded()
    played = play(dump, invariants=at_most_two)
    assert played.failure == "step 6: AssertionError: R99: two were settled"
    short = shorten(dump, played, invariants=at_most_two)
    assert len(short.steps) == 4
    assert play(short, invariants=at_most_two).failure == "step 4: AssertionError: R99: two were settled"
