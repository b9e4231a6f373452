"""What befalls the world: the same for the same seed, in the order of time, and everything there is."""

from itertools import islice

from core.config import RouterConfig
from core.simulation import script
from core.simulation.fate import FOR_EVER_S, KEEP_ALIVES_S, draw, trouble
from core.simulation.options import TROUBLES, Options, lite, performance, swarm
from core.simulation.prng import Prng


def test_the_same_seed_gives_the_same_stream_in_order() -> None:
    for seed in range(20):
        options = swarm(Prng(seed))
        one = list(islice(draw(options, Prng(seed)), 300))
        assert one == list(islice(draw(options, Prng(seed)), 300))
        assert [timed.at_s for timed in one] == sorted(timed.at_s for timed in one)


def test_requests_are_numbered_and_without_troubles_there_are_only_requests() -> None:
    actions = [timed.do for timed in islice(draw(performance(), Prng(1)), 500)]
    assert all(isinstance(action, script.Ask) for action in actions)
    assert [action.request for action in actions if isinstance(action, script.Ask)] == list(range(500))
    assert {action.kind for action in actions if isinstance(action, script.Ask)} >= {"chat", "load", "show"}


def test_every_kind_of_trouble_does_something_of_its_own() -> None:
    kinds = {}
    for index, kind in enumerate(TROUBLES):
        weights = tuple(int(other == index) for other in range(len(TROUBLES)))
        options = Options(nodes=3, troubles=weights, trouble_gap_s=1.0)
        kinds[kind] = {type(trouble(10, options, Prng(seed))) for seed in range(10)}
    assert all(len(types) == 1 for types in kinds.values())
    assert len({next(iter(types)) for types in kinds.values()}) == len(TROUBLES) - 1  # the two crashes differ in silence only
    assert kinds["crash"] == kinds["power_loss"] == {script.Crash}


def test_lite_only_crashes() -> None:
    actions = [timed.do for seed in range(10) for timed in islice(draw(lite(Prng(seed)), Prng(seed)), 300)]
    assert {type(action) for action in actions} == {script.Ask, script.Crash, script.OllamaDeath, script.Restart}


def test_models_are_kept_for_ever_only_where_the_router_makes_room() -> None:
    for name in ("auto", "metrics"):
        options = Options(config=RouterConfig(strategy=name))
        kept = {timed.do.keep_alive_s for timed in islice(draw(options, Prng(1)), 3000) if isinstance(timed.do, script.Ask)}
        assert (FOR_EVER_S in kept) is (name == "auto")
        assert kept >= set(KEEP_ALIVES_S)
