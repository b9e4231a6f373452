"""Thousands of streams that say a token each second: none may be lost or reordered, and each may cost the coordinator so much memory.

Decides the numbers and the bar. Knows nothing of how streams are held.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec

from tests.bench.children import more_files
from tests.bench.client import Order, Seen
from tests.bench.sides import EDGE, EMBEDDED, SLOTS, Coordinator, coordinator, edge, has_edge
from tests.bench.streams import MODEL, sample, seen, streamers

STREAMS = {EMBEDDED: 5000, EDGE: 8000}
KB_MAX = 30.0
TOKENS_PER_S = 1.0
OPENED_PER_S = 250
HOLD_S = 15.0


class Held(msgspec.Struct):
    """One side's streams."""

    seen: Seen
    kb: float
    """Resident memory of the coordinator per stream, in KB (1,000 bytes)."""
    left: float
    """Requests still in flight afterwards."""


class Idle(msgspec.Struct):
    """By side."""

    held: dict[str, Held]


def hold(behind: Coordinator, port: int, streams: int, *, hold_s: float = HOLD_S, opened_per_s: float = OPENED_PER_S) -> Held:
    """So many streams through `port`, to their ends."""
    before = behind.child.memory_bytes()
    memory: list[float] = []
    ramp_s = streams / opened_per_s
    tokens = round((ramp_s + hold_s) * TOKENS_PER_S) + 5
    order = Order(
        port=port, models=[MODEL], streams=streams, rate=TOKENS_PER_S, tokens=tokens, ramp_s=ramp_s, hold_s=hold_s, to_the_end=True
    )
    found = seen(order, lambda: memory.extend(sample(behind.child.memory_bytes, seconds=hold_s * 0.8)))
    return Held(found, (max(memory) - before) / streams / 1000, behind.wait_idle())


def run(place: Path, *, say: Callable[[str], None], streams: dict[str, int] = STREAMS) -> Idle:
    """Each side by itself, with a coordinator of its own."""
    allowed = more_files()
    found: dict[str, Held] = {}
    for side, count in streams.items():
        if side == EDGE and not has_edge():
            continue
        if allowed < 2 * count + 500:
            raise RuntimeError(f"{count} streams need {2 * count + 500} open files, and 'ulimit -Hn' allows {allowed}")
        say(f"{count:,} idle streams, {side}")
        where = place / side.replace(" ", "-")
        where.mkdir()
        with ExitStack() as stack:
            nodes = stack.enter_context(streamers(where, -(-count // SLOTS) + 1))
            behind = stack.enter_context(coordinator(where, "coordinator", nodes, history=True))
            port = behind.port if side == EMBEDDED else stack.enter_context(edge(where, "edge", behind)).port
            hold(behind, port, 50, hold_s=1.0)  # what a first request loads stays in memory and belongs to no stream
            found[side] = hold(behind, port, count)
    return Idle(found)


def misses(found: Idle) -> list[str]:
    missed = []
    for side, held in found.held.items():
        if held.seen.whole < held.seen.streams or held.left:
            missed.append(
                f"{side}: of {held.seen.streams} idle streams {held.seen.lost} were lost, {held.seen.reordered} reordered,"
                f" {held.left:.0f} still in flight: {held.seen.errors}"
            )
        if held.kb > KB_MAX:
            missed.append(f"{side}: an idle stream takes {held.kb:.1f} KB of the coordinator, more than {KB_MAX:.0f}")
    return missed


def section(found: Idle) -> str:
    rows = [
        "## Idle streams",
        "",
        f"Streams of one token a second, all open at once, each token numbered, each stream read to its end. Opened {OPENED_PER_S} a"
        f" second, then held for {HOLD_S:.0f} s; history on. Bars: none lost, none reordered, ≤ {KB_MAX:.0f} KB of the coordinator's memory"
        " each.",
        "",
        "| | streams | lost | reordered | coordinator KB each | token late p50 ms | p99 ms | in flight afterwards |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for side, held in found.held.items():
        one = held.seen
        rows.append(
            f"| {side} | {one.streams:,} | {one.lost} | {one.reordered} | {held.kb:.1f}"
            f" | {one.late_p50_ms:.1f} | {one.late_p99_ms:.1f} | {held.left:.0f} |"
        )
    return "\n".join(rows)
