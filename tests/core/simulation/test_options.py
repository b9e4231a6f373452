"""Options: the same seed draws the same, everything drawn is usable, and the swarm leaves things out."""

from hypothesis import given
from hypothesis import strategies as st

from core.config import STRATEGIES
from core.simulation.options import TROUBLES, lite, performance, swarm
from core.simulation.prng import NEVER, Prng


@given(st.integers(0, 2**64))
def test_the_same_seed_draws_the_same(seed: int) -> None:
    assert swarm(Prng(seed)) == swarm(Prng(seed))
    assert lite(Prng(seed)) == lite(Prng(seed))


@given(st.integers(0, 2**64))
def test_everything_drawn_is_usable(seed: int) -> None:
    options = swarm(Prng(seed))
    assert 0 <= options.agentless <= options.nodes <= 8
    assert len(options.troubles) == len(TROUBLES)
    assert options.config.queue_per_client <= options.config.queue_max


def test_the_swarm_leaves_things_out_and_puts_things_in() -> None:
    drawn = [swarm(Prng(seed)) for seed in range(200)]
    assert {options.config.strategy for options in drawn} == set(STRATEGIES)
    assert {options.loss == NEVER for options in drawn} == {True, False}
    for kind in range(len(TROUBLES)):
        assert {options.troubles[kind] > 0 for options in drawn} == {True, False}
    assert swarm(Prng(1), nodes=3).nodes == 3


def test_lite_has_crashes_and_a_good_network() -> None:
    options = lite(Prng(3), nodes=5)
    assert options.nodes == 5
    assert options.loss == options.duplicate == options.reorder == NEVER
    assert {kind for kind, weight in zip(TROUBLES, options.troubles, strict=True) if weight} == {
        "crash", "power_loss", "ollama_death", "restart",
    }  # fmt: skip


def test_performance_is_fixed_and_faultless() -> None:
    assert performance() == performance(nodes=8)
    assert performance().trouble_gap_s == 0
