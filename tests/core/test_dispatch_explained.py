"""Why a request went where it went: what is kept of the decisions, and for how long."""

from core.events import Failure, Record
from core.units import RequestId
from tests.core.routing import World, one, usage


def test_decisions_are_explained() -> None:
    world = World()
    world.backend("warm", "m", loaded=("m",))
    world.backend("cold", "m")
    world.silent(world.backend("gone", "m"))
    world.ask("r")
    world.fail("r", Failure.DIED)
    why = world.router.why("r")  # type: ignore[arg-type]
    assert why is not None
    assert (why.model, why.strategy) == ("m", "auto")
    first, second = why.decisions
    assert [(candidate.name, candidate.chosen) for candidate in first.candidates] == [("warm", True), ("cold", False)]
    assert first.candidates[0].parts.keys() == {"work", "ahead", "cold", "displaced"}
    assert first.out == {"gone": "is offline: refuses connections"}
    assert [candidate.name for candidate in second.candidates] == ["cold"]
    assert second.out["warm"] == "was tried for this request"
    assert world.router.why("nobody") is None  # type: ignore[arg-type]


def test_reasons_for_passing_over_are_told() -> None:
    world = World(eject_after=1, strategy="round-robin", retries_budgeted=9)
    for name in ("busy", "sick", "good"):
        world.backend(name, "m", slots=9)
    world.ask("r1")
    world.busy("r1")
    world.fail("r1", Failure.DIED)
    world.ask("r2")
    why = world.router.why("r2")  # type: ignore[arg-type]
    assert why is not None
    assert why.decisions[0].out == {"busy": "said that it is busy", "sick": "is passed over: died"}
    world.serve("r1")
    world.wait(31)
    for number in range(6):
        world.ask(f"s{number}")
        world.serve(f"s{number}")
    world.ask("clean")
    assert world.router.why("clean").decisions[0].out == {}  # type: ignore[union-attr, arg-type]


def test_explanations_are_bounded() -> None:
    world = World(explain_ring=3, strategy="round-robin", busy_pause_s=0.125, busy_pause_max_s=0.125)
    for number in range(12):
        world.backend(f"n{number}", "m", slots=99)
    for number in range(5):
        world.ask(f"r{number}")
    assert [world.router.why(f"r{number}") is not None for number in range(5)] == [False, False, True, True, True]  # type: ignore[arg-type]
    for _ in range(30):
        if world.router.waiting():
            world.wait(0.125)
        else:
            world.busy("r4")
    why = world.router.why("r4")  # type: ignore[arg-type]
    assert why is not None
    assert len(why.decisions) == 16
    assert len(why.decisions[0].candidates) == 8


def test_when_it_began_is_kept_with_a_request_as_long_as_its_decisions_are() -> None:
    world = World(explain_ring=1)
    world.backend("one", "m", loaded=("m",), slots=2)
    world.ask("forgotten")
    world.ask("kept")
    world.serve("forgotten", usage=usage())
    assert world.router.why("forgotten") is None  # type: ignore[arg-type]
    assert [world.router._dispatcher.explained(RequestId(name)) for name in ("forgotten", "kept", "another's")] == [False, True, False]
    running = world.router.why("kept")  # type: ignore[arg-type]
    assert running is not None
    assert (running.predicted_start_ms, running.observed_start_ms) == (None, None), "what the other one's record says is not about it"
    record = one(world.serve("kept", usage=usage()), Record)
    over = world.router.why("kept")  # type: ignore[arg-type]
    assert over is not None
    assert over.observed_start_ms == record.observed_start_ms is not None
    assert over.start_error_ms == record.observed_start_ms - (record.predicted_start_ms or 0.0)
