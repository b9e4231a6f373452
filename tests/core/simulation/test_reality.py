"""The timing model held against a real Ollama: each recorded conversation of group `sched`, played again.

What differs is named in `DIFFERS`, with the reason; the test fails when something else differs, and when something named does not any
more. `python -m tests.core.simulation.test_reality` prints the table of docs/simulation.md.
"""

import json
import math
from itertools import pairwise

import pytest

from core.simulation.node import Change
from tests.core.simulation.tapes import Run, Tape, agrees, disorder, figures, matched, replay, tapes

SCATTER = "a prompt of 17 tokens takes 86 to 107 ms by the server's own account, with no pattern; here 84"
STEP = "the slot of who leaves is free when the step that runs is through (14 and 17 ms), here at once; and one token took 46 ms"
LONG = "attention over a long context: 250 tokens a second at 512 tokens, 192 at 2,602; here one speed for all lengths"
STALLED = (
    "the client stood still for 58 ms while it was sending, and the third answer took 43 ms instead of 27: those behind waited for both"
)
POLLED = "`/api/ps` was asked without a pause, and held up this prompt more than the decoding after it"

DIFFERS = {
    ("cancel-decode", "a", "first byte"): SCATTER,
    ("one-slot", "a", "first byte"): SCATTER,
    ("prefill-stalls-decode", "a", "first byte"): SCATTER,
    ("unload-busy", "a", "first byte"): POLLED,
    ("cancel-decode", "b", "first byte"): STEP,
    ("cancel-decode", "b", "end"): STEP,
    ("cancel-decode-whole", "b", "first byte"): STEP,
    ("cancel-decode-whole", "b", "end"): STEP,
    ("prefill-stalls-decode", "a", "end"): LONG,
    ("prefill-stalls-decode", "b", "first byte"): LONG,
    ("prefill-stalls-decode", "b", "end"): LONG,
    **{("queue-not-for-hot", f"c{number}", "first byte"): STALLED for number in range(9) if number != 7},
    **{("queue-not-for-hot", f"c{number}", "end"): STALLED for number in range(9) if number not in (1, 7)},
}
SWAPPED = {
    "queue-full": {"c1": "c0", "c0": "c1", "c7": "c4", "c4": "c7"},
    "queue-full-v1-chat-completions": {"c2": "c3", "c3": "c4", "c4": "c5", "c5": "c1", "c1": "c2"},
    "queue-full-v1-messages": {"c2": "c5", "c5": "c1", "c1": "c2"},
    "queue-not-for-hot": {
        "c6": "c5",
        "c5": "c6",
        "c8": "c7",
        "c7": "c8",
        "c19": "c15",
        "c15": "c16",
        "c16": "c17",
        "c17": "c18",
        "c18": "c19",
    },
}
"""Equal requests within 10 ms of each other: whose part each one played here. Which goes first is up to the threads of the real server."""

PLAYED: dict[str, tuple[Tape, Run]] = {tape.case: (tape, replay(tape)) for tape in tapes()}


def compared(case: str) -> list[tuple[str, str, float, float]]:
    """(request, what, seconds in reality, seconds here)."""
    return [
        (real.name, what, before, math.inf if after is None else after)
        for real, ours in matched(*PLAYED[case])
        for what, (before, after) in figures(real, ours).items()
        if before is not None
    ]


def test_every_conversation_is_played() -> None:
    assert len(PLAYED) == 22
    assert sum(len(tape.asked) for tape, _ in PLAYED.values()) == 87
    assert {case for case, _, _ in DIFFERS} <= set(PLAYED)


@pytest.mark.parametrize("case", PLAYED)
def test_everybody_fares_as_recorded(case: str) -> None:
    for real, ours in matched(*PLAYED[case]):
        assert ours.outcome == real.outcome, real.name
    assert {real.name: ours.name for real, ours in matched(*PLAYED[case]) if real.name != ours.name} == SWAPPED.get(case, {})


@pytest.mark.parametrize("case", PLAYED)
def test_what_happens_happens_in_the_recorded_order(case: str) -> None:
    assert disorder(*PLAYED[case]) == []


@pytest.mark.parametrize("case", PLAYED)
def test_models_are_loaded_in_the_recorded_order(case: str) -> None:
    tape, run = PLAYED[case]
    names = {Change.LOADED: "{}", Change.ABORTED: "{} aborted"}
    ended = [names[change.change].format(change.model) for change in run.changes if change.change in names]
    assert tuple(ended[1:] if tape.scene.warm else ended) == tape.scene.loads


@pytest.mark.parametrize("case", PLAYED)
def test_times_are_within_15_percent_but_for_those_that_are_named(case: str) -> None:
    far = {(case, name, what) for name, what, real_s, ours_s in compared(case) if not agrees(real_s, ours_s)}
    assert far == {named for named in DIFFERS if named[0] == case}


@pytest.mark.parametrize("case", ["eviction-waits", "expires-while-busy", "load-and-ps", "unload-busy"])
def test_ps_shows_the_same_models_at_the_same_times(case: str) -> None:
    tape, run = PLAYED[case]
    for (at_s, text), shown in zip(tape.notes, run.shown, strict=True):
        listed = {row["name"].partition(":")[0] for row in json.loads(text[text.index("[") :])}
        assert listed == set(shown) or _changes_soon(run, at_s), at_s
    if case == "unload-busy":
        gone = {round(shown["mid"], 3) for (at_s, _), shown in zip(tape.notes, run.shown, strict=True) if at_s > 0.51 and shown}
        assert gone == {0.502}  # in the past: busy, about to go


def _changes_soon(run: Run, at_s: float) -> bool:
    """A model came or went around `at_s`, which is when the answer was there, or some milliseconds before: what it shows is chance."""
    return any(abs(change.at - 10.0 - at_s) < 0.1 for change in run.changes)


def test_a_keep_alive_stays_until_another_one_is_set() -> None:
    tape, run = PLAYED["keep-alive-sticks"]
    ends = [one.end_s for one in run.asked if one.end_s is not None]
    left = [shown["tiny"] - end for shown, end in zip(run.shown[:-1], ends, strict=True)]
    assert left == pytest.approx([30, 30, math.inf, math.inf, 600, 0.5, 0.5])
    assert tape.notes[-1][1] == "1.2 s later ps: []"
    assert run.shown[-1] == {}


def test_the_silences_of_a_stream_beside_a_long_prompt() -> None:
    """Recorded: 4.7, 5.7 and 3.1 s; shorter here for the reason that the tape's times are (`LONG`)."""
    _, run = PLAYED["prefill-stalls-decode"]
    times = [at_s for at_s, name, _ in run.produced if name == "a"]
    silences = [after - before for before, after in pairwise(times) if after - before > 1]
    assert silences == pytest.approx([4.5, 4.5, 2.4], abs=0.1)


def table() -> str:
    """The table of docs/simulation.md, and its notes."""
    lines = ["| conversation | requests | figures | worst within | beyond 15 % |", "| --- | --- | --- | --- | --- |"]
    notes = dict.fromkeys(DIFFERS.values())
    marks = {reason: chr(ord("a") + place) for place, reason in enumerate(notes)}
    for case, (tape, _) in PLAYED.items():
        rows = compared(case)
        near = [abs(ours_s - real_s) / real_s for name, what, real_s, ours_s in rows if (case, name, what) not in DIFFERS and real_s > 0.1]
        far = [
            f"{name} {what} {1000 * real_s:.0f} → {1000 * ours_s:.0f} ms ({marks[DIFFERS[case, name, what]]})"
            for name, what, real_s, ours_s in rows
            if (case, name, what) in DIFFERS
        ]
        shown = ", ".join(far) if len(far) <= 4 else f"{far[0]} to {far[-1]}: {len(far)} figures"
        lines.append(f"| `{case}` | {len(tape.asked)} | {len(rows)} | {f'{100 * max(near):.0f} %' if near else ''} | {shown} |")
    lines.append("")
    lines += [f"({mark}) {reason}.  " for reason, mark in marks.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
