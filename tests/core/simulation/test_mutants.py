"""Do the checkers bite? Every known-bad router must be caught, for the right reason, within 200 seeds.

The quick ones run always, with the seeds at which they are caught; all of them, from seed 0 on, with `python -m pytest -m prove`.
"""

import pytest

from core.simulation.world import Verdict
from tests.core.simulation.mutants import MUTANTS, Spoil, maker
from tests.core.simulation.worlds import drawn

SEEDS_MAX = 200
STEPS = 1500
QUICK_SEEDS = 100


def caught(spoil: Spoil, seeds: int) -> tuple[Verdict | None, list[Verdict]]:
    """The verdict that caught it as it should be, and those that stopped it for another reason before."""
    others = []
    for seed in range(seeds):
        verdict = drawn(seed, make_router=maker(spoil)).run(STEPS)
        if verdict.invariant in MUTANTS[spoil]:
            return verdict, others
        if not verdict.passed:
            others.append(verdict)
    return None, others


def names(spoil: Spoil) -> str:
    return spoil.__name__


QUICK = [spoil for spoil in MUTANTS if spoil.__name__ not in {
    "forgets_whom_it_tried", "sends_to_strangers", "drains_for_ever", "invents_agents", "lets_wait_without_end",
    "does_not_look_when_a_slot_gets_free", "never_ends_a_lease",
}]  # fmt: skip


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 12
    assert len({number for numbers in MUTANTS.values() for number in numbers}) >= 12


@pytest.mark.parametrize("spoil", QUICK, ids=names)
def test_a_quick_one_is_caught_soon(spoil: Spoil) -> None:
    verdict, _ = caught(spoil, QUICK_SEEDS)
    assert verdict is not None


@pytest.mark.prove
@pytest.mark.parametrize("spoil", list(MUTANTS), ids=names)
def test_every_one_is_caught(spoil: Spoil) -> None:
    verdict, others = caught(spoil, SEEDS_MAX)
    assert verdict is not None, others[:3]
