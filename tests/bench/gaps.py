"""The gaps between tokens, while all of history is exported and a model plan is made: how many tokens a second may pass until they grow.

Decides the steps and the bar. The same streams go to a node itself and through each edge, in turns, with the export and the plans at work
in all of them: what is compared is the router's part, not the machine's. Each stream's 99th percentile is taken; the worst stream counts.
"""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import msgspec

from tests.bench.children import Child, more_files, running
from tests.bench.client import Order, Seen
from tests.bench.rows import fill
from tests.bench.sides import DIRECT, EDGE, EMBEDDED, Coordinator, coordinator, edge, has_edge
from tests.bench.streams import MODEL, seen, streamers

ROWS = 1_000_000
STEPS = ((100, 20), (200, 20), (200, 35), (200, 50), (300, 50), (400, 50), (500, 50), (600, 50))
"""Streams, and tokens per second of each."""
MUST_HOLD = (200, 50)
"""Up to this step the bar is a bar; beyond it is found where it breaks."""
ADDED_MS_MAX = 20.0
CLIENT_SHARE_MAX = 0.85
"""Of a core: a client that takes more is what is measured."""
RAMP_S = 1.5
NODES = 2


class Step(msgspec.Struct):
    """One number of streams at one rate; by side, one for each round."""

    streams: int
    rate: float
    seen: dict[str, list[Seen]]

    @property
    def per_s(self) -> float:
        return self.streams * self.rate

    def added_ms(self, side: str) -> float:
        """How much larger the worst stream's p99 is than to the node itself; median of the rounds."""
        return median(one.worst_p99_ms - other.worst_p99_ms for one, other in zip(self.seen[side], self.seen[DIRECT], strict=True))

    def holds(self, side: str) -> bool:
        return self.added_ms(side) <= ADDED_MS_MAX and all(one.whole == one.streams for one in self.seen[side])

    def middle(self, side: str, value: Callable[[Seen], float]) -> float:
        return median(value(one) for one in self.seen[side])


class Gaps(msgspec.Struct):
    """All steps, and what was done beside them."""

    rows: int
    rounds: int
    hold_s: float
    steps: list[Step]
    beside: dict[str, float]
    """Exports and plans finished, rows read, failures, in so many seconds."""

    def highest(self, side: str) -> Step | None:
        """The last step before the first that did not hold."""
        last = None
        for step in self.steps:
            if side not in step.seen or not step.holds(side):
                break
            last = step
        return last


def _step(ports: dict[str, int], streams: int, rate: float, *, hold_s: float, rounds: int) -> Step:
    found: dict[str, list[Seen]] = {side: [] for side in ports}
    for _ in range(rounds):
        for side, port in ports.items():
            order = Order(port=port, models=[MODEL], streams=streams, rate=rate, tokens=999_999, ramp_s=RAMP_S, hold_s=hold_s)
            found[side].append(seen(order))
    return Step(streams, rate, found)


def _beside(stack: ExitStack, place: Path, behind: Coordinator) -> Child:
    command = [sys.executable, "-m", "tests.bench.background", str(behind.port)]
    return stack.enter_context(running(Child("background", command, place / "background.log")))


def run(
    place: Path, *, hold_s: float, rounds: int, say: Callable[[str], None], rows: int = ROWS, steps: Sequence[tuple[int, float]] = STEPS
) -> Gaps:  # fmt: skip
    """All steps until no side holds any more; about `(hold_s + 3) * rounds * 25` seconds, and a minute to make the rows."""
    more_files()
    say(f"{rows:,} records of history are made")
    fill(place / "coordinator", rows)
    found: list[Step] = []
    with ExitStack() as stack:
        nodes = stack.enter_context(streamers(place, NODES))
        behind = stack.enter_context(coordinator(place, "coordinator", nodes, history=True, HISTORY_MAX_BYTES="1024GiB"))
        ports = {DIRECT: next(iter(nodes.values())), EMBEDDED: behind.port}
        if has_edge():
            ports[EDGE] = stack.enter_context(edge(place, "edge", behind)).port
        with ExitStack() as while_measured:
            background = _beside(while_measured, place, behind)
            for streams, rate in steps:
                say(f"{streams} streams of {rate:g} tokens/s")
                step = _step(ports, streams, rate, hold_s=hold_s, rounds=rounds)
                found.append(step)
                behind.wait_idle()
                for side in list(ports):
                    if side != DIRECT and not step.holds(side) and streams * rate >= MUST_HOLD[0] * MUST_HOLD[1]:
                        del ports[side]
                if list(ports) == [DIRECT]:
                    break
        beside: dict[str, float] = json.loads(background.said().strip().splitlines()[-1])
    return Gaps(rows, rounds, hold_s, found, beside)


def misses(found: Gaps) -> list[str]:
    missed = [
        f"{side}: {step.streams} streams of {step.rate:g} tokens/s: the worst stream's gap p99 is {step.added_ms(side):.1f} ms"
        f" above direct, more than {ADDED_MS_MAX:.0f} (or streams broke: {step.seen[side][0].errors})"
        for step in found.steps
        for side in step.seen
        if side != DIRECT and step.per_s <= MUST_HOLD[0] * MUST_HOLD[1] and not step.holds(side)
    ]
    if not found.beside.get("plans") or not found.beside.get("rows"):
        missed.append(f"nothing was exported or planned beside the streams: {found.beside}")
    return missed


def section(found: Gaps) -> str:
    beside = found.beside
    parts = [
        "## Gaps between tokens",
        "",
        f"Streams at the pace of real models while {found.rows:,} records of history are exported again and again and a model"
        f" plan is made every ten seconds ({beside.get('rows', 0):,.0f} rows read and {beside.get('plans', 0):,.0f} plans asked for in"
        f" {beside.get('seconds', 0):,.0f} s;"
        " the direct runs have the same work beside them). In the table: the p99 of all gaps, and of the stream whose p99 is the largest."
        f" Bar: the latter at most {ADDED_MS_MAX:.0f} ms above direct, up to {MUST_HOLD[0]} streams of {MUST_HOLD[1]} tokens/s.",
        "",
        "| streams × tokens/s | tokens/s | | gap p99 ms | worst stream's p99 ms | above direct ms | token late p50 ms | p99 ms | holds |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for step in found.steps:
        for side in step.seen:
            judged = "" if side == DIRECT else ("yes" if step.holds(side) else "no")
            added = "" if side == DIRECT else f"{step.added_ms(side):.1f}"
            busy = step.middle(side, lambda one: one.cpu_share) > CLIENT_SHARE_MAX
            late, late_p99 = step.middle(side, lambda one: one.late_p50_ms), step.middle(side, lambda one: one.late_p99_ms)
            parts.append(
                f"| {step.streams} × {step.rate:g} | {step.per_s:,.0f} | {side}{' (client busy)' if busy else ''}"
                f" | {step.middle(side, lambda one: one.gap_p99_ms):.1f} | {step.middle(side, lambda one: one.worst_p99_ms):.1f} | {added}"
                f" | {late:.1f} | {late_p99:.1f} | {judged} |"
            )
    highest = [(side, found.highest(side)) for side in found.steps[0].seen if side != DIRECT] if found.steps else []
    said = "; ".join(f"{side}: {step.per_s:,.0f} tokens/s" if step else f"{side}: at no step" for side, step in highest)
    parts += ["", f"The most at which it holds: {said} (clients, node, export and router on the same cores)."]
    return "\n".join(parts)
