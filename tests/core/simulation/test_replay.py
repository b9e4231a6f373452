"""Replay: a recorded run plays to the same digest, a failure shortens to a script that still fails, and the corpus stays well."""

from pathlib import Path
from typing import Any

import pytest

from core.invariants import check
from core.simulation.replay import play, shorten
from core.simulation.script import Crash, load
from core.simulation.world import Outcome, Verdict, World
from tests.core.simulation.mutants import does_not_cut_what_runs_on_the_lost, maker, sends_to_whom_it_drains
from tests.core.simulation.worlds import drawn

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.jsonl"))


@pytest.mark.parametrize("seed", range(100, 112))
def test_a_recorded_run_plays_to_the_same_digest(seed: int) -> None:
    world = drawn(seed)
    verdict = world.run(400)
    assert verdict.passed, verdict
    assert play(world.script()) == verdict


def failing(outcome: Outcome, make: Any) -> tuple[World, Verdict]:
    """The first drawn world that fails so."""
    for seed in range(50):
        world = drawn(seed, make_router=make)
        verdict = world.run(1500)
        if verdict.outcome is outcome:
            return world, verdict
    raise AssertionError("a known-bad router was not caught")


def test_a_failure_shortens_to_a_script_that_still_fails() -> None:
    make = maker(sends_to_whom_it_drains)
    world, verdict = failing(Outcome.CORRECTNESS, make)
    assert verdict.invariant == "R5"
    short = shorten(world.script(), verdict, make_router=make)
    assert 0 < len(short.actions) < len(world.actions)
    assert "R5" in short.header.story
    again = play(short, make_router=make)
    assert (again.outcome, again.invariant) == (verdict.outcome, verdict.invariant)
    assert play(short).passed


def test_what_comes_to_no_rest_shortens_too() -> None:
    make = maker(does_not_cut_what_runs_on_the_lost)
    world, verdict = failing(Outcome.LIVENESS, make)
    short = shorten(world.script("kept"), verdict, tries_max=40, make_router=make)
    assert short.header.story == "kept"
    assert len(short.actions) < len(world.actions)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_the_corpus_stays_well(path: Path) -> None:
    with path.open(encoding="utf-8") as lines:
        script = load(lines)
    assert script.header.story
    verdict = play(script, invariants=check, every=1)
    assert verdict.passed, f"{script.header.story}: {verdict}"


def test_a_script_without_heal_ends_by_itself() -> None:
    world = drawn(5)
    world.run(300)
    cut = world.script()
    cut = type(cut)(header=cut.header, actions=[timed for timed in cut.actions[:5] if not isinstance(timed.do, Crash)])
    assert play(cut).passed
