"""Plays scripts: a kept failure, a shrunk one, or the corpus.

Decides nothing about the world; it only puts a script into it. Invariant D1: the record of a run, played again by the same code, gives the
same digest and the same verdict.
"""

from typing import Any

import msgspec

from core.simulation.script import Header, Script, Timed
from core.simulation.shrink import shrink
from core.simulation.world import Verdict, World

STEPS_MAX = 2_000_000
"""A script that takes longer than this does not end."""


def play(script: Script, **given: Any) -> Verdict:
    """The script's run. `given`: what `World` takes besides, to try other code on it."""
    return World(script.header.seed, script.header.options, actions=script.actions, **given).run(STEPS_MAX)


def shorten(script: Script, verdict: Verdict, *, tries_max: int = 400, **given: Any) -> Script:
    """The script with everything left out that its failure, `verdict`, does not need: same outcome, same number."""

    def fails(actions: list[Timed]) -> bool:
        again = play(Script(header=script.header, actions=actions), **given)
        return (again.outcome, again.invariant) == (verdict.outcome, verdict.invariant)

    actions = shrink(script.actions, fails, tries_max=tries_max)
    header: Header = msgspec.structs.replace(script.header, story=script.header.story or f"{verdict.outcome.name} {verdict.text}")
    return Script(header=header, actions=actions)
