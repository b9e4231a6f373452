"""`python -m tests.prove.routing_table`: make the tables of docs/routing.md anew.

Without traces: on the packaged extracts, in minutes. `--traces DIR` names a directory with the public traces (Azure's two CSVs,
`conversation_trace.jsonl`) for the figures to quote. One cell: `--only mixed --strategies auto --loads 0.35 --seeds 1`; then nothing is
written. `--keep FILE` writes each run's figures there, and takes those it finds there for made: long runs can be interrupted, and after a
change to one strategy `--again auto` makes only its runs anew. Exits with 1 when a bar of the issue is missed, which only figures from
whole traces can.
"""

import argparse
import hashlib
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from core.simulation.prng import Prng
from core.simulation.workload import arrivals
from servers.study import fleet_file
from servers.study.cells import Cell, Summary, plan_of, run_all
from servers.study.traces import Trace, mixes_of, rows
from tests.house.tree import ROOT

PAGE = ROOT / "docs" / "routing.md"
LOADS = (0.2, 0.35, 0.5, 0.7, 0.9)
SEEDS = 3
STRATEGIES = ("random", "round-robin", "metrics", "least-outstanding", "p2c", "warm+spill", "lmetric-like", "auto")
UNANSWERED_MAX = 3000
"""A run is cut when so many requests have come and not ended: it will not recover, and its percentiles only measure its length."""

ENDLESS_S = 1e9
"""How long a request that was refused waits."""

ADVISED = ("auto", "auto+advice", "auto+plan")
FEW = ("metrics", "least-outstanding", "warm+spill", "auto")


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """One table of the page: who under what."""

    name: str
    fleet: fleet_file.Fleet
    form: str = "azure"
    poisson: bool = False
    strategies: tuple[str, ...] = STRATEGIES
    loads: tuple[float, ...] = LOADS


def tables() -> list[Table]:
    """All of them."""
    mixed = fleet_file.mixed()
    return [
        Table(name="mixed", fleet=mixed),
        Table(name="mixed-poisson", fleet=mixed, poisson=True),
        Table(name="advice", fleet=mixed, poisson=True, strategies=ADVISED, loads=(0.35, 0.9)),
        Table(name="mooncake", fleet=mixed, form="mooncake", strategies=FEW, loads=(0.2, 0.35, 0.5, 0.7)),
        Table(name="equal-nodes", fleet=fleet_file.homogeneous(), strategies=FEW, loads=(0.35, 0.5, 0.7, 0.9)),
        Table(name="one-slot", fleet=fleet_file.mixed(slots=1), strategies=FEW, loads=(0.2, 0.35, 0.5)),
        Table(name="regrouping", fleet=regrouping(mixed), strategies=FEW, loads=(0.2, 0.35, 0.5)),
    ]


def regrouping(fleet: fleet_file.Fleet) -> fleet_file.Fleet:
    """The same on an Ollama that there is not: see `NodeTiming.regroups`."""
    nodes = tuple(msgspec.structs.replace(node, timing=msgspec.structs.replace(node.timing, regroups=True)) for node in fleet.nodes)
    return msgspec.structs.replace(fleet, nodes=nodes)


def trace_of(form: str, directory: Path | None) -> Trace:
    """The whole traces of that form below `directory`; the extract without one."""
    if directory is None:
        return Trace(form=form)
    found = sorted(directory.rglob("AzureLLMInferenceTrace_*.csv*" if form == "azure" else "conversation_trace.jsonl*"))
    if not found:
        raise SystemExit(f"there are no traces of the form {form} below {directory}")
    return Trace(paths=tuple(map(str, found)), form=form)


def plain_cell(table: Table, directory: Path | None, *, clients: int = 1) -> tuple[Cell, float]:
    """A cell of the table without strategy, rate and seed; and the bound that its loads are parts of. One client by default: fairness moves
    waits from one client to another, and simple rules know none."""
    trace = trace_of(table.form, directory)
    mixes = fleet_file.usable_mixes(table.fleet, trace, mixes_of(trace))
    cell = Cell(
        fleet=table.fleet.nodes, trace=trace, mixes=mixes, strategy="auto", rate_per_s=1.0, seed=1, poisson=table.poisson, limits=False,
        unanswered_max=UNANSWERED_MAX, clients=clients,
    )  # fmt: skip
    return cell, plan_of(cell).capacity_per_s


class Kept:
    """Figures of runs that were made before, in a file of JSON lines; without one nothing is kept. `again`: strategies to run anew."""

    def __init__(self, path: Path | None = None, again: Sequence[str] = ()) -> None:
        self._path = path
        self._made: dict[str, Summary] = {}
        if path is not None and path.exists():
            for line in path.read_bytes().splitlines():
                name, summary = msgspec.json.decode(line, type=tuple[str, Summary])
                if summary.strategy not in again:
                    self._made[name] = summary

    def find(self, cell: Cell) -> Summary | None:
        """What the run of this cell came to."""
        return self._made.get(self._name(cell))

    def add(self, cell: Cell, summary: Summary) -> None:
        """It was run."""
        if self._path is not None and summary.complete:
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode((self._name(cell), _finite(summary))) + b"\n")

    def _name(self, cell: Cell) -> str:
        return hashlib.sha256(msgspec.json.encode(cell)).hexdigest()


def _finite(summary: Summary) -> Summary:
    """JSON has no infinity: an endless wait becomes one of `ENDLESS_S`."""
    return msgspec.structs.replace(summary, ttft_s={percent: min(value, ENDLESS_S) for percent, value in summary.ttft_s.items()})


def measured(
    table: Table, cell: Cell, bound: float, seeds: int, kept: Kept, processes: int | None
) -> dict[tuple[str, float], list[Summary]]:
    """The figures of each strategy at each load."""
    wanted = [
        msgspec.structs.replace(cell, strategy=strategy, rate_per_s=load * bound, seed=seed)
        for load in table.loads
        for strategy in table.strategies
        for seed in range(1, seeds + 1)
    ]
    places = [(strategy, load) for load in table.loads for strategy in table.strategies for _ in range(seeds)]
    made = {number: summary for number, one in enumerate(wanted) if (summary := kept.find(one)) is not None}
    left = [number for number in range(len(wanted)) if number not in made]
    began = time.monotonic()

    def progress(done: float) -> None:
        if sys.stderr.isatty():
            print(f"\r{table.name}: {done:.1f} of {len(left)} runs, {time.monotonic() - began:.0f} s ", end="", file=sys.stderr, flush=True)

    for number, summary in run_all([wanted[number] for number in left], progress=progress, processes=processes) if left else ():
        made[left[number]] = summary
        kept.add(wanted[left[number]], summary)
    found: dict[tuple[str, float], list[Summary]] = {}
    for number in sorted(made):
        found.setdefault(places[number], []).append(made[number])
    print(f"\r{table.name}: {len(left)} runs in {time.monotonic() - began:.0f} s" + " " * 20, file=sys.stderr)
    if sum(map(len, found.values())) < len(wanted) or not all(summary.complete for runs in found.values() for summary in runs):
        raise SystemExit("interrupted: nothing was written")
    return found


def floor(cell: Cell) -> tuple[float, ...]:
    """p50, p95, p99 that not even a clairvoyant router can beat: each prompt read at once by the fastest node that holds the model."""
    drawn = arrivals(rows(cell.trace), rate_per_s=1.0, mixes=cell.mixes, prng=Prng(cell.seed), jitter_s=cell.trace.jitter_s())
    fastest = {
        model: max(node.models[model].prefill_tokens_s for node in cell.fleet if model in node.models)
        for model in {arrival.model for arrival in drawn}
    }
    waits = sorted(arrival.input_tokens / fastest[arrival.model] for arrival in drawn)
    return tuple(waits[min(len(waits) - 1, int(len(waits) * percent / 100))] for percent in (50, 95, 99))


# ---------------------------------------------------------------- shown


def short(value: float) -> str:
    """Seconds, with the digits that mean something."""
    return "∞" if value >= ENDLESS_S / 1000 else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def mean(runs: Sequence[Summary], percent: float) -> float:
    """Of the seeds' percentiles."""
    return sum(run.ttft_s[percent] for run in runs) / len(runs)


def loads_of(runs: Sequence[Summary]) -> float:
    """Per 1,000 requests."""
    return sum(run.loads_per_1000 for run in runs) / len(runs)


def shown(table: Table, found: dict[tuple[str, float], list[Summary]], cell: Cell, bound: float, seeds: int) -> str:
    """The table in Markdown."""
    head = [f"p50 / p95 / p99 / loads at {load:g}" for load in table.loads]
    lines = [f"| strategy | {' | '.join(head)} |", "| --- |" + " --- |" * len(head)]
    for strategy in table.strategies:
        row = []
        for load in table.loads:
            runs = found[strategy, load]
            star = "†" if any(run.cut for run in runs) else "*" if any(run.unstable for run in runs) else ""
            figures = " / ".join(short(mean(runs, percent)) for percent in (50, 95, 99))
            row.append(f"{figures} / {short(loads_of(runs))}{star}")
        lines.append(f"| {strategy} | {' | '.join(row)} |")
    goodput = [
        f"{strategy} {' '.join(f'{sum(run.goodput for run in found[strategy, load]) / seeds:.2f}' for load in table.loads)}"
        for strategy in table.strategies
    ]
    least = " / ".join(map(short, floor(cell)))
    return "\n".join([
        f"{len(rows(cell.trace)):,} requests of {cell.trace.title()}, {'Poisson' if table.poisson else 'its own'} timing, mean of {seeds} "
        f"seeds; load 1 is {bound:.2f} requests/s. Seconds; `*`: a seed was unstable, its queue still grew at the end; `†`: "
        f"a seed was cut when {UNANSWERED_MAX:,} requests waited, so the waits are at least these.",
        "",
        *lines,
        "",
        f"Nobody can beat {least}: every prompt read at once by the fastest node.",
        f"Goodput at those loads: {'; '.join(goodput)}.",
    ])  # fmt: skip


def bars(table: Table, found: dict[tuple[str, float], list[Summary]]) -> list[str]:
    """What the issue asks for and this table shows: a line each, with the figure; those missed begin with MISSED."""
    out: list[str] = []

    def bar(what: str, figure: float, least: float) -> None:
        out.append(f"{'' if figure >= least else 'MISSED: '}{table.name}: {what} {figure:.2f}, at least {least:g}")

    def ratio(other: str, load: float, percent: float) -> float:
        return mean(found[other, load], percent) / max(mean(found["auto", load], percent), 1e-9)

    if table.name in ("mixed", "mooncake"):
        for percent, least in ((50, 8), (95, 4), (99, 4)):
            bar(f"metrics / auto at 0.35, p{percent}", ratio("metrics", 0.35, percent), least)
        bar("warm+spill / auto at 0.35, p95", ratio("warm+spill", 0.35, 95), 2)
        bar("10 / loads per 1000 of auto at 0.35", 10 / max(loads_of(found["auto", 0.35]), 1e-9), 1)
        bar("auto stable at 0.7", float(not any(run.unstable for run in found["auto", 0.7])), 1)
    elif table.name == "equal-nodes":
        for load in table.loads:
            bar(
                f"least-outstanding / auto at {load:g}, worst percentile",
                min(ratio("least-outstanding", load, p) for p in (50, 95, 99)),
                0.95,
            )
    elif table.name == "one-slot":
        bar("metrics / auto at 0.35, p95", ratio("metrics", 0.35, 95), 2.5)
    elif table.name == "regrouping":
        for percent, least in ((50, 8), (95, 4), (99, 4)):
            bar(f"metrics / auto at 0.35, p{percent}", ratio("metrics", 0.35, percent), least)
        bar("warm+spill / auto at 0.35, p95", ratio("warm+spill", 0.35, 95), 2)
    elif table.name == "advice":
        better = mean(found["auto", 0.9], 95) / max(mean(found["auto+plan", 0.9], 95), 1e-9)
        bar("auto / auto+plan at 0.9, p95", better, 1.5)
    return out


def written(page: str, name: str, text: str) -> str:
    """The page with what stands between the marks of that name replaced."""
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    assert pattern.search(page), f"docs/routing.md has lost the marks of {name}"
    return pattern.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.prove.routing_table", description="Make the tables of docs/routing.md anew.")
    parser.add_argument("--traces", type=Path, help="directory with the whole public traces")
    parser.add_argument("--only", action="append", help="tables by name: " + ", ".join(table.name for table in tables()))
    parser.add_argument("--strategies", help="separated by commas; nothing is written then")
    parser.add_argument("--loads", help="separated by commas; nothing is written then")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--clients", type=int, default=1, help="who ask, drawn by the seed; nothing is written then")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    parser.add_argument("--keep", type=Path, help="file for the figures of each run; those in it are not made again")
    parser.add_argument("--again", default="", help="strategies, separated by commas, whose runs in that file are not used")
    parser.add_argument("--processes", type=int, help="at once; as many as there are processors without it")
    given = parser.parse_args(arguments)
    kept = Kept(given.keep, given.again.split(","))
    part = given.strategies is not None or given.loads is not None or given.clients != 1
    misses = 0
    for table in tables():
        if given.only and table.name not in given.only:
            continue
        if given.strategies is not None:
            table = msgspec.structs.replace(table, strategies=tuple(given.strategies.split(",")))
        if given.loads is not None:
            table = msgspec.structs.replace(table, loads=tuple(map(float, given.loads.split(","))))
        cell, bound = plain_cell(table, given.traces, clients=given.clients)
        found = measured(table, cell, bound, given.seeds, kept, given.processes)
        text = shown(table, found, cell, bound, given.seeds)
        if not part:
            judged = bars(table, found)
            misses += sum(line.startswith("MISSED") for line in judged)
            text += "\n\n" + "\n".join(f"* {line}" for line in judged)
        print(text, end="\n\n")
        if not part and not given.dry:
            PAGE.write_text(written(PAGE.read_text("utf-8"), table.name, text), encoding="utf-8")
    return 1 if misses and given.traces is not None else 0


if __name__ == "__main__":
    sys.exit(main())
