"""The dice are fair enough, and the same everywhere."""

import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.simulation.prng import NEVER, Lcg, Prng, Ratio


def test_the_same_seed_gives_the_same_values_for_ever() -> None:
    dice = Prng(7)
    assert [dice.below(1000) for _ in range(5)] == [again.below(1000) for again in [Prng(7)] for _ in range(5)]
    # Published test vector of SplitMix64 for seed 1234567.
    assert Lcg(1234567).getrandbits(64) == 6457827717110365317


def test_values_do_not_depend_on_the_hash_seed() -> None:
    program = "from core.simulation.prng import Prng; p = Prng('s').split('net'); print([p.below(10**6) for _ in range(4)], p.unit())"
    said = {subprocess.check_output([sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, text=True) for seed in ("0", "1", "77")}
    assert len(said) == 1


def test_children_are_independent_of_what_was_drawn_before() -> None:
    one, two = Prng(3), Prng(3)
    one.below(10)
    assert one.split("clients").below(10**9) == two.split("clients").below(10**9)
    assert Prng(3).split("a").below(10**9) != Prng(3).split("b").below(10**9)


@given(st.integers(), st.integers(1, 10**12))
def test_below_stays_below(seed: int, bound: int) -> None:
    assert 0 <= Prng(seed).below(bound) < bound


@given(st.integers(), st.integers(-50, 50), st.integers(0, 100))
def test_between_includes_both_ends(seed: int, low: int, span: int) -> None:
    assert low <= Prng(seed).between(low, low + span) <= low + span


def test_draws_are_about_even() -> None:
    dice = Prng("even")
    seen = Counter(dice.below(6) for _ in range(6000))
    assert all(850 < seen[side] < 1150 for side in range(6))
    assert 2800 < sum(dice.chance(Ratio(1, 2)) for _ in range(6000)) < 3200
    assert not any(dice.chance(NEVER) for _ in range(100))
    assert all(dice.chance(Ratio(1, 1)) for _ in range(100))


def test_weights_and_picks() -> None:
    dice = Prng("weights")
    seen = Counter(dice.weighted([1, 0, 3]) for _ in range(4000))
    assert seen[1] == 0
    assert 850 < seen[0] < 1150
    assert {dice.pick("abc") for _ in range(100)} == {"a", "b", "c"}


def test_an_iterator_of_weights_that_changes_is_caught() -> None:
    class Odd(list[int]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            total, self[:] = list(super().__iter__()), [0]
            return iter(total)

    with pytest.raises(AssertionError):
        Prng(1).weighted(Odd([5]))


@given(st.integers(), st.lists(st.integers(), max_size=30))
def test_shuffling_keeps_everything(seed: int, items: list[int]) -> None:
    assert sorted(Prng(seed).shuffled(items)) == sorted(items)


def test_durations() -> None:
    dice = Prng("time")
    gaps = [dice.exponential_s(2.0) for _ in range(5000)]
    assert min(gaps) >= 0
    assert 1.9 < sum(gaps) / len(gaps) < 2.1
    assert all(1.0 <= dice.uniform_s(1.0, 3.0) < 3.0 for _ in range(1000))


def test_another_source_of_bits_can_be_handed_in() -> None:
    assert Prng(0, random.Random(5)).below(100) == Prng(0, random.Random(5)).below(100)
