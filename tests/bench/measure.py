"""The router's speed against plain nginx and against a node itself, and its bars. Knows no program, only the ports they listen on.

All sides of a comparison take turns within one run, there and back; ratios are formed within a turn, and their medians count: other work on
the machine then hits all of them alike. A round begins with new processes. Turns are short where they may be, for the speed of a shared
machine changes within seconds, and nobody's turn begins before the history of the one before is written. A ratio says something on any
machine; absolute figures only beside the direct ones.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import msgspec

from tests.bench.programs import BURST, CHUNKS, PACED, SMALL, STREAM, Load, wrk
from tests.bench.sides import ALL, DIRECT, EDGE, EMBEDDED, EMBEDDED_ON, NGINX, Stage, stage

ADDED_P50_MS_MAX, ADDED_P99_MS_MAX = 0.2, 1.0
BARS: dict[tuple[str, str], float] = {
    ("small", EDGE): 0.4,
    ("small", EMBEDDED): 0.33,
    ("small", EMBEDDED_ON): 0.28,
    ("stream", EDGE): 0.85,
    ("stream", EMBEDDED): 0.7,
    ("burst", EDGE): 0.85,
    ("burst", EMBEDDED): 0.7,
}
"""Requests per second as a share of plain nginx's, by load and side."""
DROPS = ("ollama_router_history_bodies_dropped_total", "ollama_router_history_records_dropped_total")


class Kind(msgspec.Struct, frozen=True):
    """One load."""

    name: str
    title: str
    model: str
    connections: int
    is_slow: bool = False
    """One request takes a good part of a second, so turns are as long as asked for; else a second, and as many more."""


KINDS = (
    Kind("small", "Small answers, not streamed, 32 connections", SMALL, 32),
    Kind("alone", "Small answers, not streamed, 1 connection", SMALL, 1),
    Kind("stream", f"Streams of {CHUNKS} lines, each sent by itself, 32 connections", STREAM, 32),
    Kind("burst", f"Streams of {CHUNKS} lines, ten to a packet, 32 connections", BURST, 32),
    Kind("paced", f"Streams of {CHUNKS} lines, one each 2 ms, 64 connections", PACED, 64, is_slow=True),
)


class Compared(msgspec.Struct):
    """The rounds of one load on all sides."""

    kind: Kind
    rounds: dict[str, list[Load]]

    def middle(self, side: str, value: Callable[[Load], float]) -> float:
        return median(value(load) for load in self.rounds[side])

    def share(self, side: str, of: str = NGINX) -> float:
        """Requests per second, as a share of another side's in the same round."""
        both = zip(self.rounds[side], self.rounds[of], strict=True)
        return median(one.requests_per_s / max(1.0, other.requests_per_s) for one, other in both)

    def added_ms(self, side: str, value: Callable[[Load], float]) -> float:
        """Latency beyond that of the node itself in the same round."""
        return median(value(one) - value(other) for one, other in zip(self.rounds[side], self.rounds[DIRECT], strict=True))


class Speed(msgspec.Struct):
    """What one run found."""

    seconds: int
    rounds: int
    compared: list[Compared]
    history: dict[str, dict[str, float]]
    """By side with history: records written, and what was dropped."""


def compare(on: Stage, place: Path, kind: Kind, *, seconds: int, rounds: int, sides: Sequence[str] = ALL, back: bool = False) -> Compared:
    """The same load on all sides in turn; `back`: beginning with the last."""
    taken = [name for name in on.sides if name in sides]
    found: dict[str, list[Load]] = {name: [] for name in taken}
    for name in taken:
        wrk(place, on.sides[name].ports[kind.model], kind.model, connections=kind.connections, seconds=1)  # connections, learned speeds
    turn_s, turns = (seconds, rounds) if kind.is_slow else (1, seconds * rounds)
    for number in range(turns):
        for name in taken if (number % 2 == 0) is not back else reversed(taken):
            side = on.sides[name]
            found[name].append(
                wrk(place, side.ports[kind.model], kind.model, connections=kind.connections, seconds=turn_s, asked=side.children)
            )
            if side.behind is not None:
                side.behind.wait_written()
    return Compared(kind, found)


def run(place: Path, *, seconds: int, rounds: int, say: Callable[[str], None]) -> Speed:
    """Every load on every side; about `rounds * (seconds + 2) * 40` seconds.

    Each round has its own processes: how the memory of one happens to lie is worth some 6 % of what it does, for as long as it lives.
    """
    compared = {kind.name: Compared(kind, {}) for kind in KINDS}
    history: dict[str, dict[str, float]] = {}
    for number in range(1, rounds + 1):
        where = place / f"round-{number}"
        where.mkdir(mode=0o755)  # nginx's workers are somebody else
        with stage(where, ALL) as on:
            for kind in KINDS:
                say(f"round {number} of {rounds}: {kind.title}")
                for side, loads in compare(on, where, kind, seconds=seconds, rounds=1, back=number % 2 == 0).rounds.items():
                    compared[kind.name].rounds.setdefault(side, []).extend(loads)
            kept = on.sides.get(EMBEDDED_ON)
            if kept is not None and kept.behind is not None:
                told, counts = kept.behind.metrics(), history.setdefault(EMBEDDED_ON, {})
                for key in ("ollama_router_history_records_total", *DROPS):
                    counts[key] = counts.get(key, 0.0) + told.get(key, 0.0)
    return Speed(seconds, rounds, list(compared.values()), history)


def misses(found: Speed) -> list[str]:
    """The bars that were not reached, one line each."""
    missed = []
    for compared in found.compared:
        for name in compared.rounds:
            bar = BARS.get((compared.kind.name, name))
            if bar is not None and compared.share(name) < bar:
                missed.append(f"{name}, {compared.kind.title.lower()}: {compared.share(name):.2f} of plain nginx, not {bar}")
        if compared.kind.name == "alone" and EMBEDDED in compared.rounds:
            p50, p99 = compared.added_ms(EMBEDDED, _p50), compared.added_ms(EMBEDDED, _p99)
            if p50 > ADDED_P50_MS_MAX:
                missed.append(f"{EMBEDDED} adds {p50:.3f} ms (p50) at one connection, more than {ADDED_P50_MS_MAX}")
            if p99 > ADDED_P99_MS_MAX:
                missed.append(f"{EMBEDDED} adds {p99:.3f} ms (p99) at one connection, more than {ADDED_P99_MS_MAX}")
    missed += [f"{name}: {counts[key]:.0f} in {key}" for name, counts in found.history.items() for key in DROPS if counts[key]]
    return missed


def _p50(load: Load) -> float:
    return load.p50_ms


def _p99(load: Load) -> float:
    return load.p99_ms


def _coordinator_us(load: Load) -> float:
    return sum(taken for name, taken in load.parts_us.items() if name.startswith("coordinator"))


def section(found: Speed) -> str:
    """The figures as Markdown."""
    parts = [
        "## Against plain nginx",
        "",
        "The load generator (`wrk`, one thread), nginx as nodes that answer at once (one worker; the streams of ten lines to a packet come"
        " from a process of their own) and the proxy under test share the cores. *direct* asks a node itself; *plain nginx* has"
        " `worker_processes 2`, upstream `keepalive 64`, HTTP/1.1 and no access log, and for streams `proxy_buffering off`, without which"
        " it holds lines back. *embedded* is the coordinator's own port, *nginx edge* is nginx with the coordinator choosing; *history*:"
        " with it on, else off; *gateways*: through an agent's gateway before each node, on the same cores, history on.",
        f"{found.rounds} times everything is started anew, and the sides take turns, there and back: {found.seconds * found.rounds} of"
        f" 1 s each in all ({found.rounds} of {found.seconds} s for streams with a line each 2 ms). Figures are medians, ratios are formed"
        " within a turn."
        " *CPU* is what the side's own processes took for one request, *coordinator* the coordinator's part of that.",
    ]
    for compared in found.compared:
        parts += ["", f"### {compared.kind.title}", "", *_table(compared)]
        if compared.kind.name == "alone":
            parts += [
                "",
                f"Added to the node's own latency, p50 / p99: {_added(compared)}."
                f" The bars of the embedded edge: ≤ {ADDED_P50_MS_MAX} ms / ≤ {ADDED_P99_MS_MAX} ms.",
            ]
    for name, counts in found.history.items():
        dropped = sum(counts[key] for key in DROPS)
        written = counts["ollama_router_history_records_total"]
        parts += ["", f"Of all this, *{name}* wrote {written:,.0f} records and dropped {dropped:,.0f} (bar: 0)."]
    return "\n".join(parts)


def _added(compared: Compared) -> str:
    sides = [name for name in compared.rounds if name != DIRECT]
    return ", ".join(f"{name} {compared.added_ms(name, _p50):.3f} / {compared.added_ms(name, _p99):.3f} ms" for name in sides)


def _table(compared: Compared) -> list[str]:
    rows = [
        "| | requests/s | × plain nginx | bar | × direct | p50 ms | p99 ms | CPU µs | coordinator µs |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in compared.rounds:
        rate = compared.middle(name, lambda load: load.requests_per_s)
        bar = BARS.get((compared.kind.name, name))
        cpu, own = compared.middle(name, lambda load: load.cpu_us), compared.middle(name, _coordinator_us)
        rows.append(
            f"| {name} | {rate:,.0f} | {compared.share(name):.2f} | {f'≥ {bar}' if bar else ''} | {compared.share(name, DIRECT):.2f}"
            f" | {compared.middle(name, _p50):.3f} | {compared.middle(name, _p99):.3f} | {f'{cpu:,.0f}' if cpu else ''}"
            f" | {f'{own:,.0f}' if own else ''} |"
        )
    return rows
